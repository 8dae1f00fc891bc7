"""Linears as AWQ tools store them in a checkpoint ("gemm" format), and the way to our own layout."""

"""Residual addition and root-mean-square normalisation of the last dim."""

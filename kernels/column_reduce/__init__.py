"""Attention column reduction: how much chosen rows attend each key, without the matrix."""

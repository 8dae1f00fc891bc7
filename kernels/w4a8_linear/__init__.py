"""Linear with 4-bit groupwise weights that multiplies many rows in float8."""

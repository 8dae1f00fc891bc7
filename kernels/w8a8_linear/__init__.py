"""Linear with 8-bit weights and activations (int8 or float8_e4m3fn), scaled per row."""

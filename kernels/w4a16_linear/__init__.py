"""Linear with 4-bit groupwise weights and 16-bit (or 32-bit) activations."""

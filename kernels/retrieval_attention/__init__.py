"""Decode attention over retrieved cache positions and a contiguous tail, read in place."""

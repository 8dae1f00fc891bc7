"""Fixed-size selection of the highest scores of each segment, in ascending order of index."""

"""``greedy_step``: the most likely tokens, and what a decode loop advances with them."""

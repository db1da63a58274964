"""`id3-optim compare`: a grid of training runs, its results, its table and its page."""

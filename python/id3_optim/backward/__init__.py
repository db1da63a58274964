"""Backward passes that make a weight's gradient at active entries alone."""

"""Measured on a GPU: `python -m benchmarks.gpu`, or `make gpu-check`."""

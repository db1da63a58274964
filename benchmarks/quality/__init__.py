"""`python -m benchmarks quality`: which method, at which budget and learning rate, on real tasks."""

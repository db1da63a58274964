"""`python -m benchmarks.gpu`: the same as `python -m benchmarks gpu`."""

from benchmarks.gpu.check import main

if __name__ == "__main__":
    main()

"""`python -m steepest`, and `torchrun -m steepest` for several processes."""

from steepest.cli import main

if __name__ == "__main__":
    main()

"""Tasks, the training loop, run records and comparisons.

The package itself imports nothing heavy: torch, scikit-learn and the optimizers come in with the
modules that need them, so that the command line starts at once.
"""

"""Pure tensor functions: no module, no optimizer."""

from steepest.linalg.frequent_directions import FrequentDirections
from steepest.linalg.spectral import Spectrum, damped_solve, range_finder, spectral_filter, symmetric_spectrum

__all__ = ["FrequentDirections", "Spectrum", "damped_solve", "range_finder", "spectral_filter", "symmetric_spectrum"]

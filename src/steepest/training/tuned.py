"""How the options that tasks store were chosen."""

__all__ = ["TUNED"]

TUNED = (
    "learning rates as stored: best mean validation loss of 7 rates x 3 seeds (1000 to 1002) for each optimizer, which "
    "is --tune 7; Sven's rows and solver were chosen before that, in trials that the others did not get"
)

"""How the options that tasks store were chosen."""

from collections.abc import Mapping

__all__ = ["NOT_TUNED", "TUNED", "rates", "tuned_rates"]

NOT_TUNED = "defaults, not tuned for this task"

TUNED = (
    "learning rates as stored: best mean validation loss of 7 rates x 3 seeds (1000 to 1002) for each optimizer, which "
    "is --tune 7; Sven's rows and solver were chosen before that, in trials that the others did not get"
)


def rates(**lrs: float) -> Mapping[str, Mapping[str, object]]:
    """Options of a task that are nothing but learning rates.

    Args:
        **lrs: Learning rate by optimizer.

    Returns:
        Options by optimizer.

    Example:
        >>> rates(sgd=0.1)
        {'sgd': {'lr': 0.1}}
    """
    return {name: {"lr": lr} for name, lr in lrs.items()}


def tuned_rates(trials: int) -> str:
    """How stored learning rates were chosen where nothing else was.

    Args:
        trials: Learning rates that were tried for each optimizer.

    Returns:
        Words for people.
    """
    return (
        f"learning rates as stored: best mean validation loss of {trials} rates x 3 seeds (1000 to 1002) for each "
        f"optimizer, which is --tune {trials}; all else as the optimizers have it by default"
    )

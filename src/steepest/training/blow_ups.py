"""Validation losses that are finite and yet lost: an optimizer sees the training loss alone and does not notice."""

from collections.abc import Sequence

from steepest.training.records import EpochPoint

__all__ = ["REMEDY", "blow_up"]

REMEDY = "a smaller lr or more damping shortens the steps"
# Noise, and the overfitting of a run that goes well, stay below it: the loss is ten times what the run had already.
_RATIO = 10.0


def blow_up(history: Sequence[EpochPoint]) -> EpochPoint | None:
    """Find where the validation loss of a run blew up.

    It has if it is above ten times its best so far and above its value before training, at two evaluations in a row:
    one bad batch that the next ones make good again is none, and a loss that only stops falling neither. A loss that is
    not finite ends a run anyway.

    Args:
        history: The points of a run, the untrained model first.

    Returns:
        The first of the two evaluations, None if there is none.
    """
    if not history or history[0].val_loss is None:
        return None
    untrained = best = history[0].val_loss
    before: EpochPoint | None = None
    for point in history[1:]:
        loss = point.val_loss
        if loss is not None and loss > max(untrained, _RATIO * best):
            if before is not None:
                return before
            before = point
        else:
            before = None
            best = best if loss is None else min(best, loss)
    return None

"""How many terms a mean loss is the mean of: the gradients of single samples are that many times larger."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from steepest.errors import CaptureError, InvalidOptionError

__all__ = ["LossTerms", "check_terms", "count_terms"]

LossTerms = Literal["auto", "samples", "positions"] | Callable[[Any], int]
CHOICES = ("auto", "samples", "positions")


def check_terms(terms: LossTerms) -> None:
    """Check the option.

    Args:
        terms: What the user gave.

    Raises:
        InvalidOptionError: If it is none of the choices and no function.
    """
    if not callable(terms) and terms not in CHOICES:
        raise InvalidOptionError(
            f"loss_terms={terms!r}: choose one of {', '.join(map(repr, CHOICES))}, or give a function of the output."
        )


def count_terms(terms: LossTerms, output: Any, rows: int) -> int:
    """Count the terms of a batch's mean loss.

    Args:
        terms: "samples": one for each sample; "positions": one for each entry of the output's leading dimensions, all
            but the last; "auto": samples, where the output leaves no doubt; or a function of the output.
        output: What the model returned.
        rows: Number of samples.

    Returns:
        The number.

    Raises:
        CaptureError: If the output does not tell.
    """
    if callable(terms):
        return int(terms(output))
    if terms == "samples" or (terms == "auto" and isinstance(output, Tensor) and output.ndim <= 2):
        return rows
    if terms == "positions" and isinstance(output, Tensor):
        return output.shape[:-1].numel()
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise CaptureError(
        f"The model returned {shape}, which does not tell how many terms the mean loss has: give loss_terms='samples' "
        "(a mean over the batch), 'positions' (a mean over all but the last dimension, as for language models), or a "
        "function of the output."
    )

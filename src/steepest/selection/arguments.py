"""What `select_subset` is given, checked: how many, by which method, of which data, with which model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from steepest._validation import check_integer, check_real
from steepest.errors import InvalidOptionError
from steepest.selection.checks import check_path
from steepest.selection.method import Method, Run
from steepest.selection.passes import Role
from steepest.selection.sage import SAGE
from steepest.selection.samples import Samples
from steepest.selection.scan import BatchLosses, LossFn

__all__ = ["Amount", "check_callers", "check_joins", "checked_method", "on_device", "roles", "takes_model"]


class Amount:
    """How many samples to keep, of a number that may not be known yet.

    Args:
        fraction: In (0, 1], or None.
        count: At least 1, or None. Exactly one of both.

    Raises:
        InvalidOptionError: If it is not one of both, or impossible.
    """

    def __init__(self, fraction: float | None, count: int | None) -> None:
        if (fraction is None) == (count is None):
            given = "neither was given" if fraction is None else f"fraction={fraction!r} and count={count!r} were given"
            raise InvalidOptionError(f"{given}: give either fraction, in (0, 1], or count, a number of samples.")
        if fraction is not None:
            check_real("fraction", fraction, low=0.0, high=1.0, open_low=True)
        else:
            check_integer("count", count, low=1)
        self._fraction, self._count = fraction, count

    def of(self, number: int) -> int:
        """Tell how many to keep.

        Args:
            number: How many there are.

        Returns:
            At least 1; a fraction is rounded to the nearest number, halves upwards.

        Raises:
            InvalidOptionError: If there are not so many.

        Example:
            >>> Amount(fraction=0.1, count=None).of(25)
            3
        """
        if self._fraction is not None:
            return max(1, math.floor(self._fraction * number + 0.5))
        count = self._count or 0
        if count > number:
            raise InvalidOptionError(f"count={count}: the data have {number} samples; keep 1 to {number} of them.")
        return count


def checked_method(method: Method | None) -> Method:
    """Fill in the default method, or refuse what is none.

    Args:
        method: What the user gave.

    Returns:
        A method.

    Raises:
        InvalidOptionError: If it is none.
    """
    if method is None:
        return SAGE()
    if isinstance(method, type) and issubclass(method, Method):
        raise InvalidOptionError(f"method={method.__name__} is a class: give an instance, {method.__name__}().")
    if not isinstance(method, Method):
        raise InvalidOptionError(f"method={method!r} is no selection method: give one such as SAGE() or Random().")
    return method


def check_callers(progress: Any, checkpoint: Any) -> None:
    """Refuse what would fail only after the first batch.

    Args:
        progress: What the user gave.
        checkpoint: What the user gave.

    Raises:
        InvalidOptionError: If one of them is of another kind.
    """
    if progress is not None and not callable(progress):
        raise InvalidOptionError(f"progress={progress!r}: give a function that takes a Progress, or None.")
    if checkpoint is not None:
        check_path("checkpoint", checkpoint)


def roles(run: Run, method: Method, data: Samples, reference: Any, batch_size: int | None) -> dict[Role, Samples]:
    """Put data and reference set side by side, if the method reads both.

    Args:
        run: The method's.
        method: The method.
        data: The samples to choose from.
        reference: What the user gave as such.
        batch_size: What the user gave.

    Returns:
        Samples by role.

    Raises:
        InvalidOptionError: If the reference set is missing, or given for nothing.
    """
    wanted = any(run.reads(number) == "reference" for number in range(run.passes))
    if wanted and reference is None:
        raise InvalidOptionError(
            f"{method} compares with a reference set, and none was given: give reference=, such as a validation set."
        )
    if reference is None:
        return {"data": data}
    if not wanted:
        raise InvalidOptionError(
            f"{method} looks at no reference set: leave reference= out, or choose a method that does."
        )
    return {"data": data, "reference": Samples(reference, batch_size=None if _batched(reference) else batch_size)}


def _batched(data: Any) -> bool:
    """Whether data come in batches of their own, so that another size is refused."""
    try:
        return Samples(data).batch_size is None
    except InvalidOptionError:
        return False


def takes_model(
    run: Run,
    method: Method,
    model: nn.Module | None,
    loss_fn: LossFn | None,
    batch_losses: BatchLosses | None,
    review: bool,
) -> bool:
    """Tell whether the model is to be looked at, by the method or at least in the review.

    Args:
        run: The method's.
        method: The method.
        model: What the user gave.
        loss_fn: What the user gave.
        batch_losses: What the user gave.
        review: Whether there is a review.

    Returns:
        True where a `FixedModel` is needed.

    Raises:
        InvalidOptionError: If something is missing or given twice.
    """
    losses = (loss_fn is not None) + (batch_losses is not None)
    if run.passes and model is None:
        raise InvalidOptionError(f"{method} scores samples with a model, and model is None: give the model.")
    if model is not None and not isinstance(model, nn.Module):
        raise InvalidOptionError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
    if losses == 2 or (run.passes and not losses):
        raise InvalidOptionError(
            f"{'both loss_fn and batch_losses were' if losses else 'neither loss_fn nor batch_losses was'} given: give "
            "loss_fn(outputs, targets) for batches of pairs, or batch_losses(model, batch) for all others; both return "
            "one loss per sample, [B]."
        )
    return model is not None and losses == 1 and (run.passes > 0 or review)


def check_joins(run: Run, method: Method) -> None:
    """Refuse a method that several processes cannot share.

    Args:
        run: The method's.
        method: The method.

    Raises:
        InvalidOptionError: If it goes through the data and does not say how to join what each process learnt.
    """
    if run.passes and type(run).join is Run.join:
        raise InvalidOptionError(
            f"{method} does not say how several processes join what each of them learnt: give {type(run).__name__} a "
            "method join(), or select in one process, with alone=True."
        )


@contextmanager
def on_device(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Move a model, and back.

    Args:
        model: The model.
        device: Where to; None leaves it where it is.

    Yields:
        Nothing.

    Raises:
        InvalidOptionError: If the device cannot be used, or the model lies on several.
    """
    if device is None:
        yield
        return
    homes = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidOptionError(f"device={device!r} cannot be used ({reason}): name another one.") from error
    if len(homes) > 1:
        raise InvalidOptionError(
            f"the model lies on {', '.join(sorted(map(str, homes)))}, so it cannot be moved to {target} and back: "
            "leave device= out."
        )
    try:
        model.to(target)
        yield
    finally:
        for home in homes:
            model.to(home)

"""Small things that every process must know of all, and failures that must be everybody's."""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar, cast

import torch

from steepest.distributed.ranks import RankError, Ranks
from steepest.errors import InvalidOptionError, NonFiniteError

__all__ = ["NonFiniteRankError", "attempt_together", "check_alike", "fail_together", "tell"]

T = TypeVar("T")


class NonFiniteRankError(RankError, NonFiniteError):
    """Another process met NaN or infinity; this one stops with it, unchanged."""


def tell(ranks: Ranks, thing: T | None, error: Exception | None) -> list[T]:
    """Exchange small Python objects, or let every rank fail where one does. Every rank must come here.

    Args:
        ranks: The ranks.
        thing: What this rank has to say; None only together with an error.
        error: What went wrong on this rank, or None.

    Returns:
        What every rank said, in order.

    Raises:
        RankError: On the ranks where nothing went wrong, if it did elsewhere (a `NonFiniteRankError`, which is a
            `NonFiniteError` too, where all that happened is NaN or infinity); on the others their own error. A
            `NonFiniteError` may be skipped and others may not, so these win.
    """
    failure = None if error is None else (isinstance(error, NonFiniteError), f"{type(error).__name__}: {error}")
    told = ranks.gather_objects((thing, failure))
    failures = [(soft, rank, text) for rank, (_, failed) in enumerate(told) if failed for soft, text in [failed]]
    if not failures:
        return [cast("T", said) for said, _ in told]
    soft, rank, text = min(failures)  # False before True
    if error is not None and isinstance(error, NonFiniteError) == soft:
        raise error
    kind = NonFiniteRankError if soft else RankError
    raise kind(f"Rank {rank} of {ranks.size} failed, so that none goes on. It said: {text}") from error


def fail_together(ranks: Ranks, error: Exception | None) -> NoReturn:
    """Raise on every rank, after a mark that travelled with the numbers told that one of them failed.

    Args:
        ranks: The ranks.
        error: What went wrong on this rank, or None.

    Raises:
        RuntimeError: If no rank failed.
    """
    tell(ranks, None, error)
    raise RuntimeError("A failure was marked, but no rank has one.")


def attempt_together(ranks: Ranks, compute: Callable[[], T], device: torch.device) -> T:
    """Do this rank's part of something; where it fails on one rank it fails on all. Every rank must come here.

    Args:
        ranks: The ranks, which sum 8 bytes.
        compute: What may fail.
        device: Where messages come from.

    Returns:
        What it gave.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = compute()
    except Exception as error:
        failure = error
    failures = torch.full((1,), float(failure is not None), dtype=torch.float64, device=device)
    ranks.sum_([failures])
    if failures.item() > 0:
        fail_together(ranks, failure)
    return cast("T", result)


def check_alike(what: str, told: Sequence[Mapping[str, object]], remedy: str) -> None:
    """Refuse ranks that were set up differently; the same everywhere, as long as all were told the same.

    Args:
        what: Whose settings they are.
        told: The settings of every rank.
        remedy: What the user can do.

    Raises:
        InvalidOptionError: With the first setting that differs.
    """
    first = told[0]
    for rank, other in enumerate(told):
        for name in [*first, *(key for key in other if key not in first)]:
            mine, theirs = first.get(name, "missing"), other.get(name, "missing")
            if mine != theirs:
                raise InvalidOptionError(
                    f"{what} differs between processes: {name} is {mine} on rank 0 and {theirs} on rank {rank}. "
                    f"Parameters are unchanged. Remedy: {remedy}."
                )

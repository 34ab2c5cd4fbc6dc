"""What to do about a checkpoint that cannot be used: only who asked for it knows."""

from collections.abc import Iterator
from contextlib import contextmanager

from steepest.errors import CheckpointError

__all__ = ["advised"]


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """Add what to do to the message of a `CheckpointError`, once.

    Args:
        advice: As it reads after a semicolon.

    Yields:
        Nothing.

    Raises:
        CheckpointError: Of the same kind, with the advice.

    Example:
        >>> with advised("begin anew"):
        ...     raise CheckpointError("it is damaged")
        Traceback (most recent call last):
        steepest.errors.CheckpointError: it is damaged; begin anew
    """
    try:
        yield
    except CheckpointError as error:
        if str(error).endswith(advice):
            raise
        raise type(error)(f"{error}; {advice}") from error

"""What several processes write to one terminal: every line says whose it is, and the same warning comes once."""

import hashlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from steepest.training.rendezvous import Store

__all__ = ["label", "shared_warnings", "tell_user"]


def label(rank: int, size: int) -> str:
    """How a line of one process begins.

    Args:
        rank: Its number.
        size: How many there are.

    Returns:
        Such as ``[rank 1/2]``.
    """
    return f"[rank {rank}/{size}]"


def tell_user(rank: int, size: int, message: str) -> None:
    """Write an error of one process to standard error, in one line.

    Args:
        rank: Its number.
        size: How many there are.
        message: The error.
    """
    sys.stderr.write(f"steepest: {label(rank, size)} {' '.join(message.split())}\n")
    sys.stderr.flush()


@contextmanager
def shared_warnings(store: Store, rank: int, size: int) -> Iterator[None]:
    """Show a warning that several processes have once, by the one that comes first; others than rank 0 sign it.

    Args:
        store: Where they note what was shown.
        rank: Number of this process.
        size: How many there are.
    """

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        same = f"{category.__name__} {Path(filename).name}:{lineno} {message}"
        try:
            first = store.add(f"warning/{hashlib.sha256(same.encode()).hexdigest()}", 1) == 1
        except RuntimeError:
            first = True  # better twice than never
        if first:
            text = warnings.formatwarning(message, category, filename, lineno, line)
            (file or sys.stderr).write(text if rank == 0 else f"{label(rank, size)} {text}")

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before

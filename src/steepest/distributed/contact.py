"""Contact with the other processes: how its loss is told from other errors, and that nothing is tried after it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch.distributed as dist

from steepest.errors import SteepestError

__all__ = ["LostRankError", "RankError", "contact", "ending", "lost_contact"]

_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection (refused|closed)|failed to (connect|recv)"
    r"|remote process exited|ncclremoteerror|communicator was aborted",
    re.IGNORECASE,
)
_SILENT = re.compile(r"tim(ed|e) ?out", re.IGNORECASE)
_WAITED = re.compile(r"(\d+) ?ms")


class RankError(SteepestError, RuntimeError):
    """Another process failed; this one stops with it, unchanged.

    Attributes:
        interrupted: Whether its user stopped it, by Ctrl-C, and nothing went wrong.
    """

    interrupted = False


class LostRankError(RankError):
    """Another process is gone or does not answer: nothing can be agreed on any more."""


# Of every group of all processes, why contact was lost; a later group of the same process begins anew.
_lost: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_endings: list[Callable[[LostRankError], BaseException]] = []


def lost_contact(error: BaseException) -> str | None:
    """Say what an error of torch.distributed tells about the other processes.

    Args:
        error: Any error.

    Returns:
        What became of them; None if the error is about something else.

    Example:
        >>> lost_contact(RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"))
        'another process is gone'
        >>> lost_contact(ValueError("Connection reset by peer")) is None
        True
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or "gloo" in text):
        return None
    if _SILENT.search(text):
        waited = _WAITED.search(text)
        within = f" within {int(waited[1]) / 1000:g} s" if waited else " in time"
        return f"another process did not answer{within}"
    return "another process is gone" if _GONE.search(text) else None


@contextmanager
def contact() -> Iterator[None]:
    """Within it, an error that means lost contact becomes a `LostRankError`; after one, nothing more is tried.

    Raises:
        LostRankError: If contact is lost, or was lost before.
        RuntimeError: Any other error of what is done within it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    world = dist.group.WORLD
    if world in _lost:
        _raise(_lost[world])
    try:
        yield
    except RuntimeError as error:
        reason = lost_contact(error)
        if reason is None:
            raise
        _lost[world] = f"[rank {dist.get_rank()}/{dist.get_world_size()}] lost contact: {reason}"
        _raise(_lost[world], error)


@contextmanager
def ending(made: Callable[[LostRankError], BaseException]) -> Iterator[None]:
    """Let lost contact end a program: within it, something else is raised than an error that a run might survive.

    Args:
        made: Makes what is raised.
    """
    _endings.append(made)
    try:
        yield
    finally:
        _endings.pop()


def _raise(message: str, cause: Exception | None = None) -> NoReturn:
    error = LostRankError(message)
    raise (_endings[-1](error) if _endings else error) from cause

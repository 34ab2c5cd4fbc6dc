"""Where processes that select together meet: all fail where one does, and stop where one is asked to."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from steepest.distributed.agreement import tell
from steepest.distributed.ranks import RankError, Ranks

__all__ = ["Meetings"]

T = TypeVar("T")

_END = object()
# Said in a meeting: that this process was stopped by its user, and that it is still at work.
_STOPPED, _AT_WORK = "stopped", "at work"
_PULSE = 5.0  # seconds between two words of who lets the others wait; far below the time that they have patience for


class Meetings:
    """The meetings of some processes, seen from one of them.

    Args:
        ranks: The processes.

    Attributes:
        asked: Whether the user has asked this process to stop: it then does when they meet next, and all with it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.asked: Callable[[], bool] = lambda: False

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which decides where one must."""
        return self.ranks.rank == 0

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Do something that may fail here alone, and fail with whoever does.

        Yields:
            Nothing.

        Raises:
            BaseException: What this process ran into; a `RankError` where it was another one.
        """
        try:
            yield
        except Exception as error:
            tell(self.ranks, None, error)
            raise
        except BaseException:  # Ctrl-C
            self._stopped()
            raise
        self._met(None)

    def rounds(self, items: Iterator[T], take: Callable[[T], None], every: int) -> None:
        """Go through what is this process's own, and meet the others now and then.

        Args:
            items: They may be fewer or more than those of the others.
            take: Called with each.
            every: How many to take between two meetings; the same everywhere.

        Raises:
            BaseException: What this process ran into; a `RankError` where it was another one.
        """
        done = False
        while True:
            failed: Exception | None = None
            try:
                done = done or not _take(items, take, every)
            except Exception as error:
                failed = error
            except BaseException:
                self._stopped()
                raise
            if all(self._met(done, failed)):
                return

    def waiting(self, work: Callable[[Callable[[], None]], T]) -> T | None:
        """Let the first process do something that may take long, while the others wait for it and hear that it lives.

        Args:
            work: Called on the first process, with a function that it calls now and then.

        Returns:
            What it returned, on the first process.

        Raises:
            BaseException: What the first process ran into; a `RankError` on the others.
        """
        if not self.leads:
            while self._met(None)[0] == _AT_WORK:
                pass
            return None
        last, parted = time.monotonic(), False

        def pulse() -> None:
            nonlocal last, parted
            if time.monotonic() - last < _PULSE:
                return
            try:
                self._met(_AT_WORK)
            except BaseException:
                parted = True  # all know already
                raise
            last = time.monotonic()

        try:
            result = work(pulse)
        except Exception as error:
            if not parted:
                tell(self.ranks, None, error)
            raise
        except BaseException:
            if not parted:
                self._stopped()
            raise
        self._met(None)
        return result

    def _met(self, thing: Any, failed: Exception | None = None) -> list[Any]:
        """What every process says, or the end of all where one fails or was asked to stop."""
        stop = failed is None and self.asked()
        told = tell(self.ranks, _STOPPED if stop else thing, failed)
        if stop:
            raise KeyboardInterrupt
        if _STOPPED in told:
            error = RankError(
                f"Rank {told.index(_STOPPED)} of {self.ranks.size} failed, so that none goes on. It said: it was "
                "interrupted (KeyboardInterrupt)."
            )
            error.interrupted = True
            raise error
        return told

    def _stopped(self) -> None:
        with suppress(Exception, SystemExit):  # whatever becomes of the others, this one was interrupted
            tell(self.ranks, _STOPPED, None)


def _take(items: Iterator[T], take: Callable[[T], None], every: int) -> bool:
    """Take some; whether there may be more."""
    for _ in range(every):
        item = next(items, _END)
        if item is _END:
            return False
        take(item)  # type: ignore[arg-type]
    return True

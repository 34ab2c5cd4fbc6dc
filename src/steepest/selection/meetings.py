"""Where processes that select together meet: all fail where one does, and stop where one is asked to."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from steepest.distributed.agreement import tell
from steepest.distributed.ranks import RankError, Ranks

__all__ = ["NEVER", "Meetings", "Pause"]

T = TypeVar("T")

_END = object()
# Said in a meeting: that this process was stopped by its user, and that it is still at work.
_STOPPED, _AT_WORK = "stopped", "at work"
_PULSE = 5.0  # seconds between two words of who lets the others wait; far below the time that they have patience for


class Pause:
    """What processes do together between two batches, once it is time to for one of them; by default nothing."""

    def due(self) -> bool:
        """Whether it is time to, for this process."""
        return False

    def act(self) -> None:
        """Do it; all processes come here."""


NEVER = Pause()


class Meetings:
    """The meetings of some processes, seen from one of them.

    Args:
        ranks: The processes.

    Attributes:
        asked: Whether the user has asked this process to stop: it then does when they meet next, and all with it.
        stopped: Whether all know that the user has stopped one of them, and do the same from then on.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.asked: Callable[[], bool] = lambda: False
        self.stopped = False

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

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within it nobody stops who is asked to: they meet again afterwards.

        Yields:
            Nothing.
        """
        asked, self.asked = self.asked, lambda: False
        try:
            yield
        finally:
            self.asked = asked

    def rounds(self, items: Iterator[T], take: Callable[[T], None], every: int, pause: Pause = NEVER) -> None:
        """Go through what is this process's own, and meet the others now and then.

        Args:
            items: They may be fewer or more than those of the others.
            take: Called with each.
            every: How many to take between two meetings; the same everywhere.
            pause: What to do when they meet and it is time to.

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
            told = self._met((done, failed is None and pause.due()), failed)
            if any(due for _, due in told):
                pause.act()
            if all(ended for ended, _ in told):
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
        self.stopped = stop or _STOPPED in told
        if stop:
            raise KeyboardInterrupt
        if self.stopped:
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
            self.stopped = True


def _take(items: Iterator[T], take: Callable[[T], None], every: int) -> bool:
    """Take some; whether there may be more."""
    for _ in range(every):
        item = next(items, _END)
        if item is _END:
            return False
        take(item)  # type: ignore[arg-type]
    return True

"""Ctrl-C and a scheduler's SIGTERM: the step that is being taken is finished first."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from steepest.training.processes import launched

__all__ = ["stop_requested"]

# A terminal sends Ctrl-C to torchrun and to its processes, and torchrun passes it on: within this time it is the same.
_SAME_SECONDS = 2.0


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT or SIGTERM instead of being ended by it; one that comes 2 seconds later ends at once.

    Yields:
        A function that says whether a signal has come.
    """
    received: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        if received and time.monotonic() - received[0] > _SAME_SECONDS:
            raise KeyboardInterrupt
        received.append(time.monotonic())

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        # What torchrun passes on must not interrupt a process that ends because of it.
        ended = bool(received) and launched() > 1
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ended else handler)

"""What several processes that torchrun started agree on while they select."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from steepest.errors import SelectionError
from steepest.selection.together import Together

__all__ = ["ignore_signals", "is_there", "leads", "signals_held_back"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_SECONDS = 2.0


def leads(together: Together | None) -> bool:
    """Whether this process writes the files and prints: the first of several does."""
    return together is None or together.leads


def is_there(path: Path, together: Together | None) -> bool:
    """Whether a file is there, as all processes see it: what they do next depends on it.

    Args:
        path: The file.
        together: The processes, or None.

    Returns:
        The answer.

    Raises:
        SelectionError: If the processes do not look into the same folder.
    """
    if together is None:
        return path.exists()
    told = together.told(path.exists())
    if len(set(told)) > 1:
        raise SelectionError(
            f"{path} is there for some processes and not for others: with -o, name a file in a folder that all of "
            "them share"
        )
    return told[0]


@contextmanager
def signals_held_back(together: Together | None) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Take SIGTERM for Ctrl-C; several processes hold both back until they meet, and then all stop.

    Args:
        together: The processes, or None.

    Yields:
        A context for what holds them back by itself, where they would raise KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield nullcontext
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    noted: list[float] = []

    def note(_number: int, _frame: FrameType | None) -> None:
        # One that comes soon after is the same, passed on by torchrun.
        if noted and time.monotonic() - noted[0] > _SAME_SECONDS:
            raise KeyboardInterrupt
        noted.append(time.monotonic())

    def answer(by: Callable[[int, FrameType | None], None]) -> None:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, by)

    @contextmanager
    def let_through() -> Iterator[None]:
        answer(signal.default_int_handler)
        try:
            yield
        finally:
            answer(note)

    try:
        if together is None:
            answer(signal.default_int_handler)
            yield nullcontext
        else:
            answer(note)
            together.asked = lambda: bool(noted)
            yield let_through
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def ignore_signals() -> None:
    """Let a process that is ending do so, whoever tells it to once more."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

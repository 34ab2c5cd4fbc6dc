"""Each run in a process of its own: no run leaves anything to the next, and a crash is one run's crash.

On POSIX a fork server with torch already imported makes the processes, so that one costs milliseconds
instead of the seconds that importing torch takes.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

from steepest.training.environment import environment_row
from steepest.training.execute import Outcome, execute, make_record
from steepest.training.records import EpochPoint, RunRecord
from steepest.training.spec import RunSpec

__all__ = ["execute_isolated"]

# torch._dynamo: torch's optimizers import it when the first one is made, which takes two seconds.
_PRELOAD = ["torch._dynamo", "sklearn.datasets", "steepest.optim", "steepest.training.isolate"]


@cache
def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    # The memory profiler warns on standard error of blocks that are older than itself, in the midst of the display.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    resource_tracker.ensure_running()  # started later, it would let interrupts through again
    return context


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C reach this process only at the end.

    It goes to the whole group of processes, and this one decides what becomes of the others: a fork server that is
    started meanwhile never sees it, nor do its children, and no child waits in vain for what it is to do.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    # The mask is this thread's alone, though children inherit it: another thread may take the signal, and Python then
    # runs the handler here all the same.
    handler = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _child(connection: Connection, spec: RunSpec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for processes that no server made
    try:
        connection.send(execute(spec, connection.send, own_process=True))
    except BrokenPipeError:
        return  # the parent is gone, nobody waits for this run
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def execute_isolated(
    spec: RunSpec,
    on_epoch: Callable[[EpochPoint], None] = lambda _point: None,
    *,
    timeout: float | None = None,
) -> RunRecord:
    """Make a run in a new process.

    Args:
        spec: The run.
        on_epoch: Called, in this process, with every new point of the history.
        timeout: Most seconds of wall-clock time for the run, everything included.

    Returns:
        The record; a process that died or ran out of time has one too.
    """
    receiver, sender = _context().Pipe(duplex=False)
    process = _context().Process(target=_child, args=(sender, spec), daemon=True)  # type: ignore[attr-defined]
    outcome = Outcome()
    deadline = None if timeout is None else time.monotonic() + timeout
    with _interrupts_held_back():
        process.start()
        sender.close()
    try:
        while receiver.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
            message = receiver.recv()
            if isinstance(message, RunRecord):
                return message
            if isinstance(message, str):
                outcome.status, outcome.error = "failed", message
                break
            outcome.history.append(message)
            outcome.steps, outcome.seconds = message.steps, message.seconds
            on_epoch(message)
        else:
            outcome.status, outcome.error = "timed_out", f"not finished after {timeout:g} s of wall-clock time"
    except EOFError:
        process.join()
        outcome.status = "failed"
        outcome.error = f"the process of the run ended with exit code {process.exitcode}"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    return make_record(spec, outcome, environment_row(spec.device, spec.threads))

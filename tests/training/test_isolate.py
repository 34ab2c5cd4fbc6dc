"""Runs in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from steepest.training.errors import DataError
from steepest.training.execute import execute
from steepest.training.isolate import _interrupts_held_back, execute_isolated
from steepest.training.records import EpochPoint
from steepest.training.source import Source
from steepest.training.spec import RunSpec

SPEC = RunSpec("diabetes", "adam", {"lr": 0.01}, epochs=2, batch_size=32)


def test_a_run_gives_the_same_numbers_in_its_own_process() -> None:
    points: list[EpochPoint] = []
    record = execute_isolated(SPEC, points.append)
    assert record.status == "finished", record.error
    assert record.final == execute(SPEC).final
    assert tuple(points) == record.history


def test_memory_is_measured_in_its_own_process_and_grows_with_the_optimizer_state() -> None:
    adam, sgd = execute_isolated(SPEC), execute_isolated(replace(SPEC, optimizer="sgd"))
    assert adam.num_parameters is not None
    assert adam.peak_memory is not None
    assert sgd.peak_memory is not None
    # At least gradients and two moments in float32 for Adam, gradients alone for SGD without momentum.
    assert adam.peak_memory > 3 * 4 * adam.num_parameters
    assert adam.peak_memory > sgd.peak_memory > 4 * adam.num_parameters
    assert "beyond model and data" in adam.memory_kind
    assert execute(SPEC).peak_memory is None


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_process_that_dies_leaves_a_failed_record() -> None:
    def kill(point: EpochPoint) -> None:
        if point.epoch == 1:
            for child in multiprocessing.active_children():
                os.kill(int(child.pid or 0), signal.SIGKILL)

    record = execute_isolated(replace(SPEC, epochs=100_000), kill)
    assert record.status == "failed"
    assert "the process of the run ended with exit code" in str(record.error)
    assert record.steps >= 8
    assert len(record.history) >= 2


def test_a_run_that_takes_too_long_is_timed_out() -> None:
    record = execute_isolated(replace(SPEC, epochs=100_000), timeout=1.0)
    assert record.status == "timed_out"
    assert "not finished after 1 s" in str(record.error)
    assert not multiprocessing.active_children()


def test_a_run_whose_files_are_gone_is_told_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    spec = replace(SPEC, task="gone", source=Source("gone.csv", target="y"))
    with pytest.raises(DataError, match=r"gone\.csv does not exist"):
        execute_isolated(spec)
    assert "Traceback" not in capfd.readouterr().err


def test_the_record_of_a_dead_process_has_the_threads_of_its_run() -> None:
    record = execute_isolated(replace(SPEC, epochs=100_000, threads=2), timeout=0.5)
    assert record.environment["threads"] == 2


def test_an_interrupt_that_another_thread_takes_waits_until_the_child_has_all_it_needs() -> None:
    over, reached = threading.Event(), []

    def interrupted() -> None:
        with _interrupts_held_back():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            reached.append(True)

    other = threading.Thread(target=over.wait)
    other.start()  # its mask lets interrupts through
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        over.set()
        other.join()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

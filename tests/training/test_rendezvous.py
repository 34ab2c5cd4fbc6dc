"""Processes that are started again meet each other and not those before them; what they say is said once."""

from __future__ import annotations

import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from steepest.distributed.contact import LostRankError
from steepest.training import processes, rendezvous, stopping
from steepest.training.processes import if_lost
from steepest.training.rank_logs import shared_warnings, tell_user
from steepest.training.stopping import stop_requested


def meet(store: Any, size: int, seconds: float = 20) -> list[str]:
    with ThreadPoolExecutor(size) as pool:
        ways = [rendezvous._gather, *[rendezvous._join] * (size - 1)]
        found = [pool.submit(way, store, rank, size, seconds) for rank, way in reversed([*enumerate(ways)])]
        return [each.result() for each in found]


def test_processes_that_are_started_again_do_not_meet_those_before() -> None:
    store = dist.HashStore()
    starts = []
    for _ in range(4):
        first, *others = meet(store, 4)
        assert set(others) == {first}
        starts.append(first)
        # Some of the next start are killed before the others come: what they left is not taken for a living one.
        store.set("name/1", "killed")
        store.set("start/killed", "old")
    assert len(set(starts)) == 4


def test_processes_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    with pytest.raises(LostRankError, match=r"\[rank 0/3\] rank 1 did not start within 0\.1 s"):
        rendezvous._gather(store, 0, 3, 0.1)
    with pytest.raises(LostRankError, match=r"\[rank 2/3\] rank 0 did not start within 0\.1 s"):
        rendezvous._join(store, 2, 3, 0.1)


def test_processes_leave_together_or_after_a_while() -> None:
    store = dist.HashStore()
    start = time.monotonic()
    rendezvous.leave(store, 1, 2, "no such file", 0.2)
    assert time.monotonic() - start > 0.2
    assert rendezvous.said_by(store, 0) is None
    assert rendezvous.said_by(store, 1) == "no such file"
    start = time.monotonic()
    rendezvous.leave(store, 0, 2, "", 20)
    assert time.monotonic() - start < 5
    assert not rendezvous.said_by(store, 0)


@pytest.mark.filterwarnings("always")
def test_a_warning_of_several_processes_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    store, before = dist.HashStore(), warnings.showwarning
    for rank in (1, 0, 2):
        with shared_warnings(store, rank, 3):
            for text in ("of all", "of all"):
                warnings.showwarning(UserWarning(text), UserWarning, "some.py", 3)
            warnings.showwarning(UserWarning(f"of {rank}"), UserWarning, "some.py", 4)
    assert warnings.showwarning is before
    shown = [line for line in capsys.readouterr().err.splitlines() if "UserWarning" in line]
    assert shown == [
        "[rank 1/3] some.py:3: UserWarning: of all",
        "[rank 1/3] some.py:4: UserWarning: of 1",
        "some.py:4: UserWarning: of 0",
        "[rank 2/3] some.py:4: UserWarning: of 2",
    ]


def test_an_error_of_one_process_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    processes._tell_unless_told(store, 1, 2, "no such\nfile")
    rendezvous.leave(store, 0, 2, "it said: no such file", 0)
    processes._tell_unless_told(store, 1, 2, "no such file")
    processes._tell_unless_told(store, 1, 2, "another one")
    tell_user(0, 2, "a third")
    assert capsys.readouterr().err.splitlines() == [
        "steepest: [rank 1/2] no such file", "steepest: [rank 1/2] another one", "steepest: [rank 0/2] a third"
    ]  # fmt: skip


def test_lost_contact_ends_the_process_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", stop)
    with pytest.raises(LostRankError) as lost, if_lost(lambda: "go on like this"):
        raise LostRankError("[rank 0/2] lost contact")
    with pytest.raises(SystemExit, match="1"):
        processes._end(lost.value)
    with pytest.raises(SystemExit, match="1"):
        processes._end(LostRankError("[rank 0/2] lost contact"))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "steepest: [rank 0/2] lost contact; go on like this"
    assert second.startswith("steepest: [rank 0/2] lost contact; what was saved before is kept")


def test_a_signal_that_is_passed_on_is_the_same_one_and_a_later_one_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requested() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        monkeypatch.setattr(stopping, "_SAME_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_of_several_that_was_told_to_stop_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(stopping, "launched", lambda: 2)
    try:
        with stop_requested():
            pass
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
        with stop_requested():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""A process that is gone, silent or told to stop ends all of a run, soon and with one line, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from steepest.distributed.checkpoint.folders import complete_folders
from torchrun import TRAIN, losses_in, torchrun, wait_for_checkpoint, wait_for_workers, workers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")]

KILLS = 20


def told(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("steepest: ")]


def ends(run: subprocess.Popen[str], within: float) -> tuple[float, str]:
    start = time.monotonic()
    try:
        _, errors = run.communicate(timeout=within)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert "/steepest/" not in errors  # torchrun has tracebacks of its own, we have none
    return time.monotonic() - start, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What a run that was stopped must end with."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run = torchrun(*TRAIN, "--out", str(folder))
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert out.count("record ") == 1  # one of the two processes prints
    return losses_in(folder)


def resumed(folder: Path) -> list[float]:
    run = torchrun("-m", "steepest", "train", "--resume", "--out", str(folder))
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return losses_in(folder)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_rank_ends_the_other_at_once_with_one_line(gone: int, tmp_path: Path, whole: list[float]) -> None:
    run = torchrun(*TRAIN, "--out", str(tmp_path))
    wait_for_checkpoint(tmp_path, run)
    os.kill(workers(run.pid)[gone], signal.SIGKILL)
    start = time.monotonic()
    while workers(run.pid):
        assert time.monotonic() - start < 10
        time.sleep(0.02)
    _, errors = ends(run, 30)
    assert run.returncode == 1
    (line,) = told(errors)
    assert line.startswith(f"steepest: [rank {1 - gone}/2] lost contact: another process is gone; ")
    assert "--resume" in line
    assert not list((tmp_path / "records").glob("*.jsonl"))  # a lost process is no failed run
    if gone:
        assert resumed(tmp_path) == whole


def test_a_rank_that_hangs_ends_the_other_after_the_timeout(tmp_path: Path) -> None:
    run = torchrun(*TRAIN, "--out", str(tmp_path), STEEPEST_TIMEOUT="4")
    wait_for_checkpoint(tmp_path, run)
    hung, other = workers(run.pid)
    os.kill(hung, signal.SIGSTOP)
    start = time.monotonic()
    while other in workers(run.pid):
        assert time.monotonic() - start < 15
        time.sleep(0.02)
    os.kill(hung, signal.SIGKILL)  # torchrun would wait for half a minute
    _, errors = ends(run, 30)
    (line,) = told(errors)
    assert line.startswith("steepest: [rank 1/2] lost contact: another process did not answer within 4 s; ")


@pytest.mark.parametrize("who", ["torchrun", "one", "both", "terminal"])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(who: str, tmp_path: Path, whole: list[float]) -> None:
    run = torchrun(*TRAIN, "--out", str(tmp_path))
    wait_for_checkpoint(tmp_path, run)
    ranks = workers(run.pid)
    if who == "terminal":  # Ctrl-C goes to torchrun and to its processes, and torchrun passes it on
        os.killpg(run.pid, signal.SIGINT)
        for pid in ranks:  # which have a session of their own
            os.kill(pid, signal.SIGINT)
    else:
        for pid in {"torchrun": [run.pid], "one": ranks[1:], "both": ranks}[who]:
            os.kill(pid, signal.SIGTERM)
    _, errors = ends(run, 60)
    assert run.returncode != 0
    assert told(errors) == []
    assert "steepest train --resume" in errors
    assert complete_folders(tmp_path / "checkpoints")
    assert resumed(tmp_path) == whole


def test_a_signal_at_the_start_ends_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for moment in (0.1, 1.5, 4.0):
        run = torchrun(*TRAIN, "--resume", "--out", str(tmp_path))
        wait_for_workers(run)
        time.sleep(moment)
        run.send_signal(signal.SIGTERM)
        seconds, errors = ends(run, 60)
        assert run.returncode != 0
        assert seconds < 20, errors


@pytest.mark.timeout(1200)
def test_ranks_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    moments = random.Random(0)
    train = (*TRAIN[:7], "400", *TRAIN[8:])
    run = torchrun(*train, "--out", str(tmp_path / "whole"))
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    folder = tmp_path / "killed"
    run = torchrun("--max-restarts", str(KILLS), *train, "--resume", "--out", str(folder))  # one for each and no other
    for number in range(KILLS):
        ranks = wait_for_workers(run)
        if number % 2:
            wait_for_checkpoint(folder, run, newer_than=complete_folders(folder / "checkpoints"))
        time.sleep(moments.uniform(0, 2 if number % 2 else 8))  # while they train and write; start, load and train
        assert workers(run.pid) == ranks  # nothing but a kill ends one
        start = time.monotonic()
        os.kill(moments.choice(ranks), signal.SIGKILL)
        while set(ranks) & set(workers(run.pid)):
            assert time.monotonic() - start < 20
            time.sleep(0.02)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-3000:]
    assert losses_in(folder) == losses_in(tmp_path / "whole")

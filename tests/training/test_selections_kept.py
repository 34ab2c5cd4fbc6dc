"""A selection within a run is gone on with after an interruption, by as many processes or by another number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_ranks
from selecting import kept_in
from steepest.cli import run
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.selection.agreement import SageRun
from steepest.selection.passes import Passes
from steepest.training.checkpoint import Keeping
from steepest.training.execute import execute
from steepest.training.records import RunRecord
from steepest.training.spec import RunSpec
from torchrun import losses_in, torchrun, workers

# 16 steps in an epoch; five batches in each of two passes, 3 and 2 for two processes.
SPEC = RunSpec("digits", "adamw", {"lr": 0.003}, epochs=3, batch_size=64, select="sage:0.1")


def numbers(record: RunRecord) -> tuple[object, ...]:
    history = [(p.epoch, p.steps, p.train_loss, p.val_loss) for p in record.history]
    chosen = [replace(item, seconds=0.0) for item in record.selections]
    return record.status, record.error, record.final, record.fingerprint, record.steps, history, chosen


def keeping(folder: Path, stop: Callable[[], bool] = lambda: False, **changes: Any) -> Keeping:
    return Keeping(folder / "checkpoints", folder / "model.pt", **{"every": 1e9, "stop": stop} | changes)


class Noted:
    """Notes which batches of which pass are worked on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.before = Passes._take

    def __enter__(self) -> list[tuple[int, int]]:
        before, seen = self.before, self.seen

        def take(passes: Passes, role: Any, number: int, batch: Any) -> None:
            seen.append((passes.place[0], number))
            before(passes, role, number, batch)

        Passes._take = take  # type: ignore[method-assign]
        return seen

    def __exit__(self, *_error: object) -> None:
        Passes._take = self.before  # type: ignore[method-assign]


def kept(folder: Path) -> list[str]:
    return [path.name for path in complete_folders(folder / "checkpoints" / "selection")]


def interrupted(folder: Path, batches: int, asked: bool = True, spec: RunSpec = SPEC) -> str:
    """Stops a run while it selects, after some batches of this process."""
    with Noted() as seen:
        try:
            execute(spec, keeping=keeping(folder, lambda: asked and len(seen) >= batches))
        except KeyboardInterrupt:
            return "stopped"
    return "finished"


@pytest.mark.parametrize("batches", [1, 3, 5, 8])
def test_a_selection_under_way_is_gone_on_with(batches: int, tmp_path: Path) -> None:
    assert interrupted(tmp_path, batches) == "stopped"
    assert kept(tmp_path)
    assert [path.name for path in complete_folders(tmp_path / "checkpoints")] == ["step-00000016"]
    (share,) = kept_in(tmp_path / "checkpoints" / "selection")["shares"]
    with Noted() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr("steepest.selection.standing.max", lambda _seconds: 100.0, raising=False)
        patch.setattr("steepest.selection.restoring.max", lambda seconds: 100.0 + max(seconds), raising=False)
        resumed = execute(SPEC, keeping=keeping(tmp_path, every=0.0))
    assert 100.0 + share["seconds"] < resumed.selections[0].seconds < 200.0  # both parts are on the clock
    assert resumed.seconds > resumed.selections[0].seconds
    every = [(pass_, number) for pass_ in range(2) for number in range(5)]
    assert seen == every[batches:]
    assert numbers(resumed) == numbers(execute(SPEC))
    assert not (tmp_path / "checkpoints" / "selection").exists()


def test_what_was_selected_is_not_lost_before_the_run_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steepest.training.checkpoints.selections._WORTH", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steepest.training.selecting.noted", lambda *_arguments: 1 // 0)
        assert execute(SPEC, keeping=keeping(tmp_path)).error == "ZeroDivisionError: integer division or modulo by zero"
    assert kept(tmp_path)
    with Noted() as seen:
        resumed = execute(SPEC, keeping=keeping(tmp_path))
    assert not seen  # only the choice is made again
    assert numbers(resumed) == numbers(execute(SPEC))


def test_one_selection_is_never_gone_on_with_as_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.training.checkpoints.selections._WORTH", 0.0)
    said: list[str] = []
    each = replace(SPEC, select="sage:0.1:every=1:warmup=0")
    record = execute(each, keeping=keeping(tmp_path, say=said.append))
    assert numbers(record) == numbers(execute(each))
    assert said == []


def test_a_damaged_selection_is_made_again_and_a_line_says_so(tmp_path: Path) -> None:
    assert interrupted(tmp_path, 7) == "stopped"
    for step in complete_folders(tmp_path / "checkpoints" / "selection"):
        (step / "manifest.json").write_text("{}")
    said: list[str] = []
    resumed = execute(SPEC, keeping=keeping(tmp_path, say=said.append))
    assert numbers(resumed) == numbers(execute(SPEC))
    (line,) = said
    assert "the selection is begun anew" in line
    assert "manifest.json is damaged" in line


def test_a_selection_with_another_model_is_made_again(tmp_path: Path) -> None:
    assert interrupted(tmp_path, 7) == "stopped"
    shutil.rmtree(complete_folders(tmp_path / "checkpoints")[-1])
    own = execute(replace(SPEC, seed=1), keeping=keeping(tmp_path))
    assert numbers(own) == numbers(execute(replace(SPEC, seed=1)))


def shared(rank: int, world: int, place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for batches in (1, 3):
        folder = Path(place, str(batches))
        found[f"stopped {batches}"] = interrupted(folder, batches, asked=rank == world - 1)
        found[f"kept {batches}"] = kept(folder)
        torch.distributed.barrier()
        if rank == 0:
            shutil.copytree(folder, folder.with_name(f"{batches} of two"))
        torch.distributed.barrier()
        with Noted() as seen:
            resumed = execute(SPEC, keeping=keeping(folder.with_name(f"{batches} of two")))
        found[f"seen {batches}"], found[f"resumed {batches}"] = seen, numbers(resumed)
    found["whole"] = numbers(execute(SPEC))
    one = Path(place, "of one")
    with Noted() as seen:
        found["of one"] = numbers(execute(SPEC, keeping=keeping(one)))
    found["seen of one"] = seen

    def broken(self: SageRun, number: int, rows: Any) -> None:
        raise OSError("the disk is gone")

    update = SageRun.update
    if rank:
        SageRun.update = broken  # type: ignore[method-assign]
    found["broken"] = execute(SPEC, keeping=keeping(Path(place, "broken"))).error
    SageRun.update = update  # type: ignore[method-assign]
    return found


def close(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == other[0] == "finished"
    assert one[4] == other[4]
    for (*_, loss, val), (*_, loss_, val_) in zip(one[5][:2], other[5][:2], strict=True):  # up to the selection
        assert loss == loss_ or loss == pytest.approx(loss_, rel=1e-4)
        assert val == pytest.approx(val_, rel=1e-4)
    assert one[6][0].numbers["certificate"] == pytest.approx(other[6][0].numbers["certificate"], rel=0.1)


def test_a_selection_that_some_processes_began_is_gone_on_with_by_any_number(tmp_path: Path) -> None:
    place = tmp_path / "runs"
    assert interrupted(place / "of one", 7) == "stopped"
    ranks = run_ranks(2, tmp_path / "ranks", shared, str(place))
    whole = numbers(execute(SPEC))
    for batches in (1, 3):
        for found in ranks:
            assert found[f"stopped {batches}"] == "stopped"
            assert len(found[f"kept {batches}"]) == 1
            assert found[f"resumed {batches}"] == found["whole"]  # to the bit
        told = sorted(pair for found in ranks for pair in found[f"seen {batches}"])
        assert len(told) == len(set(told)) == 10 - (2 if batches == 1 else 7)
        said: list[str] = []
        with Noted() as seen:
            one = execute(SPEC, keeping=keeping(place / str(batches), say=said.append))
        assert sorted(seen) == told
        assert said == []
        close(numbers(one), whole)
    assert sorted(pair for found in ranks for pair in found["seen of one"]) == [(1, 2), (1, 3), (1, 4)]
    close(ranks[0]["of one"], whole)
    assert ranks[0]["of one"] == ranks[1]["of one"]
    assert "the disk is gone" in ranks[1]["broken"]
    assert "Rank 1 of 2 failed" in ranks[0]["broken"]


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_selects_goes_on_within_the_selection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["train", "digits", "-o", "adamw", "--epochs", "2", "--batch-size", "64", "--select", "sage:0.1:scope=all"]
    command = [*task, "--checkpoint-every", "0", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "steepest", *command, str(folder)], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not kept(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert run([*command, str(folder), "--resume"]) == 0
    assert run([*command, str(tmp_path / "whole")]) == 0
    losses = [line.split("  ")[:4] for line in capsys.readouterr().err.splitlines() if line.startswith("epoch   2/2")]
    assert losses[0] == losses[1]
    assert not (folder / "checkpoints").exists()


@pytest.mark.slow
def test_processes_that_lose_one_while_they_select_go_on_within_the_selection(tmp_path: Path) -> None:
    task = ["-m", "steepest", "train", "digits", "-o", "adamw", "--epochs", "2", "--batch-size", "64", "--resume",
            "--select", "sage:0.1:scope=all", "--checkpoint-every", "0", "--out"]  # fmt: skip
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    process = torchrun("--max-restarts", "1", *task, str(folder))
    deadline = time.monotonic() + 120
    while not kept(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "going on from" in errors
    other = torchrun(*task, str(whole))
    _, errors = other.communicate(timeout=200)
    assert other.returncode == 0, errors
    assert losses_in(folder) == losses_in(whole)
    assert not (folder / "checkpoints").exists()

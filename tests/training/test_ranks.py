"""A run that several processes share is the run of one process; stopped, killed or with a damaged file it goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_ranks
from steepest.errors import InvalidOptionError
from steepest.training.checkpoint import Keeping
from steepest.training.compare import resolve_options
from steepest.training.execute import execute
from steepest.training.processes import check_shares, refuse_several
from steepest.training.registry import optimizers
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec

OPTIMIZERS = ("sgd", "adam", "lbfgs", "lpsgdm", "sven", "fop")


def spec_of(name: str) -> RunSpec:
    entry = optimizers()[name]
    options = resolve_options(resolve(Source("diabetes")), entry, {"lr": 0.02})
    return RunSpec("diabetes", name, options, epochs=2, batch_size=24)


def selected(folder: Path) -> dict[str, Any]:
    spec = RunSpec("digits_wrong20", "adam", {"lr": 0.002}, epochs=3, batch_size=24, select="sage:0.3:every=2")
    folder.mkdir(parents=True, exist_ok=True)
    keeping = Keeping(folder / "checkpoint.pt", folder / "model.pt", every=0.01)
    record = execute(spec, keeping=keeping)
    return {
        "status": record.status,
        "error": record.error,
        "kept": [one.kept for one in record.selections],
        "digests": [one.digest for one in record.selections],
        "losses": [point.val_loss for point in record.history],
    }


def summary(folder: Path, name: str, stop_after: int | None = None) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    steps = iter(range(10**9))
    stop = (lambda: next(steps) >= stop_after) if stop_after is not None else (lambda: False)
    keeping = Keeping(folder / "checkpoint.pt", folder / "model.pt", every=1e9, stop=stop)
    record = execute(spec_of(name), keeping=keeping)
    return {
        "status": record.status,
        "error": record.error,
        "losses": [point.val_loss for point in record.history],
        "train": [point.train_loss for point in record.history],
        "processes": record.environment.get("processes"),
        "model": (folder / "model.pt").exists(),
    }


def shared(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        found[name] = summary(Path(folder) / name, name)
    interrupted = 0
    # One rank alone is asked to stop: all of them do, before the same step.
    try:
        summary(Path(folder) / "again", "adam", stop_after=7 if rank == world - 1 else None)
    except KeyboardInterrupt:
        interrupted = 1
    found["interrupted"] = interrupted
    found["selected"] = selected(Path(folder) / "selected")
    found["again"] = summary(Path(folder) / "again", "adam")
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_share_every_batch_make_the_run_of_one(world: int, tmp_path: Path) -> None:
    alone = {name: summary(tmp_path / "alone" / name, name) for name in OPTIMIZERS}
    chosen = selected(tmp_path / "alone" / "selected")
    first, *others = run_ranks(world, tmp_path / "ranks", shared, str(tmp_path / "shared"))
    for found in (first, *others):
        for name in OPTIMIZERS:
            mine = found[name]
            assert mine["status"] == "finished", mine["error"]
            assert mine["processes"] == world
            assert mine["losses"] == first[name]["losses"], name
            # A line search turns rounding into other steps: L-BFGS is only the same on all ranks.
            same = slice(0, 1) if name == "lbfgs" else slice(None)
            assert mine["losses"][same] == pytest.approx(alone[name]["losses"][same], rel=2e-4), name
            assert mine["train"][1:][same] == pytest.approx(alone[name]["train"][1:][same], rel=0.2), name
        assert found["interrupted"] == 1
        assert found["selected"]["status"] == "finished", found["selected"]["error"]
        assert found["selected"] == first["selected"]
        assert found["selected"]["kept"] == chosen["kept"]
        assert found["again"]["losses"] == found["adam"]["losses"]
    assert alone["sgd"]["processes"] is None
    saved = torch.load(tmp_path / "shared" / "again" / "checkpoint.pt", weights_only=True)
    assert len(saved["generators"]) == world


def test_a_checkpoint_of_two_processes_is_continued_by_one(tmp_path: Path) -> None:
    alone = summary(tmp_path / "alone", "adam")
    run_ranks(2, tmp_path / "ranks", stopped, str(tmp_path / "shared"))
    found = summary(tmp_path / "shared", "adam")
    assert found["processes"] is None
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-4)


def stopped(rank: int, world: int, folder: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        summary(Path(folder), "adam", stop_after=5)


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three:
        size = 3

    with pytest.raises(InvalidOptionError, match=r"batch of 32 samples cannot be shared evenly by 3 processes.*of 3"):
        check_shares(32, Three())  # type: ignore[arg-type]
    check_shares(33, Three())  # type: ignore[arg-type]
    refuse_several("select")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InvalidOptionError, match=r"steepest select does its work from one process: start it without torchrun"
    ):
        refuse_several("select")


def torchrun(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STEEPEST_TIMEOUT": "30", **settings}
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def losses_in(folder: Path) -> list[float]:
    (path,) = (folder / "records").glob("*.jsonl")
    record = json.loads(path.read_text())
    assert record["status"] == "finished", record["error"]
    assert record["environment"]["processes"] == 2
    return [point["val_loss"] for point in record["history"]]


TRAIN = ("-m", "steepest", "train", "digits", "-o", "adam", "--epochs", "40", "--set", "lr=0.002",
         "--checkpoint-every", "0.3")  # fmt: skip
KILLS = 4  # torchrun takes up to half a minute to end the others and start again


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_comparison_on_two_processes_is_that_of_one(tmp_path: Path) -> None:
    arguments = ("compare", "diabetes", "--optimizers", "sgd,sven,kfac", "--seeds", "1", "--epochs", "2",
                 "--batch-size", "24", "--tune", "2")  # fmt: skip
    both = torchrun("-m", "steepest", *arguments, "--out", str(tmp_path / "two"))
    out, errors = both.communicate(timeout=300)
    assert both.returncode == 0, errors
    assert out.count("report ") == 1
    one = subprocess.run(
        [sys.executable, "-m", "steepest", *arguments, "--out", str(tmp_path / "one")], capture_output=True, check=True
    )
    assert one.returncode == 0
    found = {}
    for name in ("one", "two"):
        records = [json.loads(path.read_text()) for path in sorted((tmp_path / name / "records").glob("*.jsonl"))]
        found[name] = {r["optimizer"]: (r["options"]["lr"], r["final"]["val_loss"]) for r in records}
        assert len(records) == 3
        assert len(list((tmp_path / name / "tuning").glob("*.jsonl"))) == 18
    for optimizer, (lr, loss) in found["one"].items():
        assert found["two"][optimizer] == (pytest.approx(lr), pytest.approx(loss, rel=1e-3))


@pytest.mark.slow
def test_a_scheduler_s_signal_and_a_killed_rank_lose_nothing(tmp_path: Path) -> None:
    whole = torchrun(*TRAIN, "--out", str(tmp_path / "whole"))
    out, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    assert out.count("record ") == 1  # one of the two processes prints
    expected = losses_in(tmp_path / "whole")

    folder = tmp_path / "preempted"
    run = torchrun(*TRAIN, "--out", str(folder))
    wait_for(folder / "checkpoint.pt", run)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=120)
    assert (folder / "checkpoint.pt").exists()
    again = torchrun("-m", "steepest", "train", "--resume", "--out", str(folder))
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert losses_in(folder) == expected

    folder = tmp_path / "killed"
    run = torchrun("--max-restarts", "3", *TRAIN, "--resume", "--out", str(folder))
    wait_for(folder / "checkpoint.pt", run)
    os.kill(workers(run.pid)[-1], signal.SIGKILL)
    _, errors = run.communicate(timeout=300)  # torchrun starts all of them again, and they go on
    assert run.returncode == 0, errors
    assert losses_in(folder) == expected


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ranks_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    moments = random.Random(0)
    train = (*TRAIN[:7], "400", *TRAIN[8:])
    whole = torchrun(*train, "--out", str(tmp_path / "whole"))
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors
    folder, kills = tmp_path / "killed", 0
    run = torchrun("--max-restarts", "40", *train, "--resume", "--out", str(folder))
    while run.poll() is None:
        time.sleep(moments.uniform(0.5, 5.0))  # also while processes start, load and write
        ranks = workers(run.pid)
        if ranks and kills < KILLS:
            os.kill(moments.choice(ranks), signal.SIGKILL)
            kills += 1
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors[-3000:]
    assert kills == KILLS
    assert losses_in(folder) == losses_in(tmp_path / "whole")

"""A run that several processes share is the run of one process; stopped, killed or with a damaged file it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from made_checkpoints import manifest_of, newest
from ranks import run_ranks
from steepest.distributed import Ranks
from steepest.errors import InvalidOptionError
from steepest.training.checkpoint import Keeping
from steepest.training.compare import resolve_options
from steepest.training.execute import execute
from steepest.training.processes import check_shares
from steepest.training.registry import optimizers
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec
from torchrun import torchrun

OPTIMIZERS = ("sgd", "adam", "lbfgs", "lpsgdm", "sven", "fop")


def spec_of(name: str) -> RunSpec:
    entry = optimizers()[name]
    options = resolve_options(resolve(Source("diabetes")), entry, {"lr": 0.02})
    return RunSpec("diabetes", name, options, epochs=2, batch_size=24)


def selected(folder: Path) -> dict[str, Any]:
    spec = RunSpec("digits_wrong20", "adam", {"lr": 0.002}, epochs=3, batch_size=24, select="sage:0.3:every=2")
    folder.mkdir(parents=True, exist_ok=True)
    keeping = Keeping(folder / "checkpoints", folder / "model.pt", every=0.01)
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
    keeping = Keeping(folder / "checkpoints", folder / "model.pt", every=1e9, stop=stop)
    record = execute(spec_of(name), keeping=keeping)
    return {
        "status": record.status,
        "error": record.error,
        "losses": [point.val_loss for point in record.history],
        "train": [point.train_loss for point in record.history],
        "processes": record.environment.get("processes"),
        "model": (folder / "model.pt").exists(),
    }


def sums_of_steps(folder: Path) -> dict[str, Any]:
    """How many bytes were summed, and how often, beside what torch averages."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: Counter[int] = Counter()
    sum_ = Ranks.sum_

    def count(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
        seen[sum(tensor.numel() * tensor.element_size() for tensor in tensors)] += 1
        sum_(ranks, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "sum_", count)
        record = execute(spec_of("adam"), keeping=Keeping(folder / "checkpoints", folder / "model.pt", every=1e9))
    return {"steps": record.steps, "seen": dict(seen)}


def shared(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"sums": sums_of_steps(Path(folder) / "sums")}
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
        # One small sum a step, and one more after each evaluation, where a signal may have come meanwhile.
        assert found["sums"]["seen"] == {32: found["sums"]["steps"], 8: 2}
        assert found["interrupted"] == 1
        assert found["selected"]["status"] == "finished", found["selected"]["error"]
        assert found["selected"] == first["selected"]
        assert found["selected"]["kept"] == chosen["kept"]
        assert found["again"]["losses"] == found["adam"]["losses"]
    assert alone["sgd"]["processes"] is None
    saved = manifest_of(newest(tmp_path / "shared" / "again"))
    assert (saved["processes"], saved["generators"]["cpu"]) == (world, world)


def test_a_checkpoint_of_two_processes_is_continued_by_one(tmp_path: Path) -> None:
    alone = summary(tmp_path / "alone", "adam")
    run_ranks(2, tmp_path / "ranks", stopped, str(tmp_path / "shared"))
    found = summary(tmp_path / "shared", "adam")
    assert found["processes"] is None
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-4)


def stopped(rank: int, world: int, folder: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        summary(Path(folder), "adam", stop_after=5)


def test_what_cannot_be_shared_is_refused() -> None:
    class Three:
        size = 3

    with pytest.raises(InvalidOptionError, match=r"batch of 32 samples cannot be shared evenly by 3 processes.*of 3"):
        check_shares(32, Three())  # type: ignore[arg-type]
    check_shares(33, Three())  # type: ignore[arg-type]


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

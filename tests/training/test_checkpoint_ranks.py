"""Checkpoints of several processes: to the bit at their number, to rounding at another; one's failure is all's."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from made_checkpoints import manifest_of, newest, tensors_of
from ranks import run_ranks
from steepest.distributed.checkpoint import tensors as tensor_files
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.training.checkpoint import Keeping
from steepest.training.compare import resolve_options
from steepest.training.errors import CheckpointError, DamagedCheckpointError, OutputError
from steepest.training.execute import execute
from steepest.training.registry import optimizers
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec

RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "adam": ("adam", {}),
    "lbfgs": ("lbfgs", {}),
    "lpsgdm": ("lpsgdm", {}),
    "sven": ("sven", {}),
    "fop": ("fop", {}),
    "kfac": ("kfac", {"distribution": "sharded"}),
    "kfac monte carlo": ("kfac", {"distribution": "hybrid", "fisher": {"type": "MonteCarlo"}}),
}
# A line search turns rounding into other steps, and other processes draw other numbers.
ROUNDING = [name for name in RUNS if name not in {"lbfgs", "kfac monte carlo"}]
SAMPLES = 24


def spec_of(name: str) -> RunSpec:
    optimizer, given = RUNS[name]
    options = resolve_options(resolve(Source("diabetes")), optimizers()[optimizer], {"lr": 0.02, **given})
    return RunSpec("diabetes", optimizer, options, epochs=2, batch_size=SAMPLES)


def made(name: str, folder: Path, stop_after: int | None = None, **more: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    left = iter(range(10**9 if stop_after is None else stop_after))
    keeping = Keeping(
        folder / "checkpoints", folder / "model.pt", every=1e9, stop=lambda: next(left, None) is None, **more
    )
    try:
        record = execute(spec_of(name), keeping=keeping)
    except KeyboardInterrupt:
        return {}
    assert record.status == "finished", record.error
    weights = torch.load(folder / "model.pt", weights_only=True)["state_dict"] if (folder / "model.pt").exists() else {}
    return {
        "losses": [(point.train_loss, point.val_loss) for point in record.history],
        "final": record.final,
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
    }


def shared(rank: int, world: int, folder: str, others: str) -> dict[str, Any]:
    base, found = Path(folder), dict[str, Any]()
    for name in RUNS:
        found[name] = {}
        if name in ROUNDING:
            made(name, base / "left" / name, 9)  # for another number of processes
            if others:
                found[name]["other"] = made(name, Path(others) / name)
        if world == 2 or name in {"adam", "kfac"}:
            whole = made(name, base / "whole" / name)
            made(name, base / "cut" / name, 5)
            again = made(name, base / "cut" / name)
            if rank > 0:  # it writes no model
                whole["weights"] = again["weights"] = {}
            found[name] |= {"same": again == whole, "whole": whole}
    if world == 2:
        found["failed"] = failures(rank, base)
    return found


def failures(rank: int, base: Path) -> dict[str, Any]:
    """Rank 1 cannot write; then its file is damaged."""
    folder, found, said = base / "failing", dict[str, Any](), list[str]()
    made("adam", folder, 4)
    before = complete_folders(folder / "checkpoints")
    write = tensor_files._Hashing.write

    def full(self: Any, content: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for failing in (0, 1):
        if rank == failing:
            tensor_files._Hashing.write = full  # type: ignore[method-assign]
        with pytest.raises(OutputError) as caught:
            made("adam", folder, 3)
        tensor_files._Hashing.write = write  # type: ignore[method-assign]
        found[f"full {failing}"] = str(caught.value)
    found["stayed"] = complete_folders(folder / "checkpoints") == before
    found["leftovers"] = [path.name for path in (folder / "checkpoints").glob(".*")]
    made("adam", folder, 3)  # goes on from step 4 to step 7
    steps = complete_folders(folder / "checkpoints")
    found["steps"] = [path.name for path in steps]
    if rank == 0:
        part = next(path for path in steps[1].iterdir() if path.name.startswith("__1_"))
        part.write_bytes(part.read_bytes()[:-200] + bytes(200))
    torch.distributed.barrier()
    found["after damage"] = made("adam", folder, say=said.append)
    found["said"] = said
    for step in [*steps, newest(folder)] if rank == 0 else []:
        if step.exists():
            (step / "manifest.json").write_text("{}")
    torch.distributed.barrier()
    with pytest.raises(CheckpointError) as refused:
        made("adam", folder)
    found["all damaged"] = (type(refused.value) is DamagedCheckpointError, str(refused.value))
    return found


def check_whole(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank, mine in enumerate(found):
        for name in RUNS:
            if "whole" in mine[name]:
                assert mine[name]["same"], (rank, name)
                assert mine[name]["whole"]["losses"] == found[0][name]["whole"]["losses"]
            if "other" in mine[name]:
                near(mine[name]["other"], alone[name])


def near(a: dict[str, Any], b: dict[str, Any]) -> None:
    pairs = zip(a["losses"][1:], b["losses"][1:], strict=True)
    assert all(one == pytest.approx(other, rel=5e-4) for one, other in pairs)


def test_runs_go_on_to_the_bit_and_at_any_number_of_processes(tmp_path: Path) -> None:
    alone = {name: made(name, tmp_path / "alone" / name) for name in ROUNDING}
    for name in ROUNDING:
        made(name, tmp_path / "one" / name, 9)
    two = run_ranks(2, tmp_path / "ranks2", shared, str(tmp_path / "two"), "")
    check_whole(two, alone)
    check_failures(two, alone)
    for name in ROUNDING:
        step = newest(tmp_path / "two" / "left" / name)
        content = manifest_of(step)
        assert (content["processes"], content["generators"]["cpu"]) == (2, 2)
        assert {path.name for path in step.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"}
        tensors_of(step)
        near(made(name, tmp_path / "two" / "left" / name), alone[name])  # 2 -> 1
    three = run_ranks(3, tmp_path / "ranks3", shared, str(tmp_path / "three"), str(tmp_path / "one"))  # 1 -> 3
    check_whole(three, alone)
    for found in run_ranks(2, tmp_path / "ranks2b", go_on, str(tmp_path / "three" / "left")):  # 3 -> 2
        for name, record in found.items():
            near(record, alone[name])


def go_on(rank: int, world: int, folder: str) -> dict[str, Any]:
    return {name: made(name, Path(folder) / name) for name in ROUNDING}


def check_failures(two: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank, found in enumerate(each["failed"] for each in two):
        for failing in (0, 1):
            assert "step-00000007 cannot be written (No space left on device)" in found[f"full {failing}"]
            assert found[f"full {failing}"].startswith("Rank ") == (rank != failing)
        assert found["stayed"]
        assert found["leftovers"] == []
        assert found["steps"] == ["step-00000004", "step-00000007"]
        (line,) = found["said"]
        assert "__1_0.distcp is damaged: its SHA-256 is not the one in manifest.json: going on from the one" in line
        assert line.endswith("step-00000004")
        near(found["after damage"], alone["adam"])
        is_damage, text = found["all damaged"]
        assert is_damage
        assert "manifest.json is damaged" in text
        assert text.endswith("begin anew with --fresh")


NORMED = """
from torch import nn
def net(in_features, out_features):
    return nn.Sequential(nn.Linear(in_features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, out_features))
"""


def test_two_processes_keep_the_statistics_of_the_first(tmp_path: Path) -> None:
    found = run_ranks(2, tmp_path / "ranks", statistics, str(tmp_path / "run"))
    for same, first, saved in found:
        assert same
        assert saved == found[0][1]
        assert first is not None


def statistics(rank: int, world: int, folder: str) -> tuple[bool, Any, Any]:
    """BatchNorm: each process has its own running means in the midst of an epoch."""
    code = Path(folder, "..", "normed.py").resolve()
    if rank == 0:
        code.write_text(NORMED)
    torch.distributed.barrier()
    spec = RunSpec(
        "digits", "adam", {"lr": 0.01}, epochs=2, batch_size=SAMPLES, source=Source("digits", model=f"{code}:net")
    )
    records = []
    for name, stops in (("whole", [None]), ("cut", [7, 50, None])):
        for stop in stops:
            left = iter(range(10**9 if stop is None else stop))
            keeping = Keeping(
                Path(folder, name, "checkpoints"), Path(folder, name, "model.pt"), every=1e9,
                stop=lambda left=left: next(left, None) is None,
            )  # fmt: skip
            Path(folder, name).mkdir(parents=True, exist_ok=True)
            try:
                records.append(execute(spec, keeping=keeping))
            except KeyboardInterrupt:
                records.append(None)
    whole, last = records[0], records[-1]
    assert whole is not None
    assert last is not None
    assert whole.status == "finished", whole.error
    same = [p.val_loss for p in whole.history] == [p.val_loss for p in last.history] and whole.final == last.final
    torch.distributed.barrier()
    saved = tensors_of(newest(Path(folder, "cut")))
    means = {name: tensor.tolist() for name, tensor in saved.items() if name.endswith("running_mean")}
    return same, means, means

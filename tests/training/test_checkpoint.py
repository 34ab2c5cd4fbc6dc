"""Checkpoints: a run that is continued ends with the numbers of one that was never stopped."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steepest.training import checkpoint, spec
from steepest.training.checkpoint import Keeping, saved_settings
from steepest.training.compare import resolve_options
from steepest.training.errors import CheckpointError, OutputError
from steepest.training.execute import execute
from steepest.training.records import RunRecord
from steepest.training.registry import optimizers
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec

DIABETES = resolve(Source("diabetes"))
# 8 steps in each of 3 epochs.
SPEC = RunSpec("diabetes", "sgd", {"lr": 0.01, "momentum": 0.9}, epochs=3, batch_size=32)


def stop_after(steps: int) -> Callable[[], bool]:
    left = iter(range(steps))
    return lambda: next(left, None) is None


def keeping(folder: Path, steps: int = 10**9, every: float = 1e9) -> Keeping:
    return Keeping(folder / "checkpoint.pt", folder / "model.pt", every=every, stop=stop_after(steps))


def numbers(record: RunRecord) -> tuple[object, ...]:
    """Everything that must not depend on interruptions: all but the clock."""
    history = [(p.epoch, p.steps, p.train_loss, p.val_loss, p.diagnostics, p.series) for p in record.history]
    return record.status, record.final, record.fingerprint, record.steps, history


def interrupted(run: RunSpec, folder: Path, steps: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(run, keeping=keeping(folder, steps))


@pytest.mark.parametrize("steps", [0, 1, 5, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("name", ["sgd", "adam", "lbfgs", "sven", "kfac", "fop", "lpsgd", "lpsgdm", "lion"])
def test_a_continued_run_is_bit_identical(name: str, steps: int, tmp_path: Path) -> None:
    run = replace(SPEC, optimizer=name, options=resolve_options(DIABETES, optimizers()[name], {"lr": 0.02}))
    (tmp_path / "whole").mkdir()
    whole = execute(run, keeping=keeping(tmp_path / "whole"))
    assert whole.status == "finished", whole.error
    interrupted(run, tmp_path, steps)
    resumed = execute(run, keeping=keeping(tmp_path))
    assert numbers(resumed) == numbers(whole)
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (tmp_path, tmp_path / "whole")]
    for key, tensor in models[0]["state_dict"].items():
        assert torch.equal(tensor, models[1]["state_dict"][key])


def test_random_solvers_go_on_with_their_own_draws(tmp_path: Path) -> None:
    given = {"lr": 0.1, "rows": "residuals", "solver": {"type": "RandomizedSVD", "rank": 4}}
    run = replace(SPEC, optimizer="sven", options=resolve_options(DIABETES, optimizers()["sven"], given))
    interrupted(run, tmp_path, 11)
    assert numbers(execute(run, keeping=keeping(tmp_path))) == numbers(execute(run))


def test_a_run_can_be_stopped_again_and_again(tmp_path: Path) -> None:
    for _ in range(3):
        interrupted(SPEC, tmp_path, 4)
    assert numbers(execute(SPEC, keeping=keeping(tmp_path))) == numbers(execute(SPEC))


def test_checkpoints_change_nothing_and_are_written_as_often_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = checkpoint.write_tensors

    def count(path: Path, content: dict[str, object]) -> None:
        written.append(path)
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_tensors", count)
    record = execute(SPEC, keeping=keeping(tmp_path, every=0.0))
    assert len(written) == 24
    assert numbers(record) == numbers(execute(SPEC))
    written.clear()
    execute(SPEC, keeping=keeping(tmp_path))
    assert written == []


def test_the_trained_model_can_be_used_with_its_scaling(tmp_path: Path) -> None:
    record = execute(SPEC, keeping=keeping(tmp_path))
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    splits = DIABETES.load(0)
    model = DIABETES.model(splits.shape)
    model.load_state_dict(saved["state_dict"])
    with torch.no_grad():
        loss = DIABETES.loss.per_sample(model(splits.test.inputs), splits.test.targets).double().mean().item()
    assert record.final is not None
    assert loss == record.final.test_loss
    assert saved["scaling"].keys() == {"input_mean", "input_scale", "target_mean", "target_scale"}
    assert (saved["input_shape"], saved["outputs"]) == ([10], 1)


CHANGES = {
    "seed": ({"seed": 1}, "seed was 0 and is 1"),
    "budget": ({"epochs": 4}, "epochs was 3 and is 4"),
    "options": ({"options": {"lr": 0.02, "momentum": 0.9}}, "options was {'lr': 0.01"),
    "optimizer": ({"optimizer": "adam", "options": {}}, "optimizer was 'sgd' and is 'adam'"),
    "model": ({"source": Source("diabetes", model="mlp:8")}, "'model': 'mlp:8'"),
    "task": ({"task": "toy_1d"}, "task was 'diabetes' and is 'toy_1d'"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_checkpoint_of_another_run_is_refused_and_kept(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    interrupted(SPEC, tmp_path, 3)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        execute(replace(SPEC, **changes), keeping=keeping(tmp_path))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(SPEC, tmp_path, 3)
    monkeypatch.setattr(checkpoint, "package_version", lambda name: f"{name} of tomorrow")
    with pytest.raises(CheckpointError, match="this is steepest steepest of tomorrow"):
        execute(SPEC, keeping=keeping(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "_FORMAT", 4)
    with pytest.raises(CheckpointError, match="has checkpoint format 3, this steepest reads 4"):
        execute(SPEC, keeping=keeping(tmp_path))
    assert spec.package_version("torch") == torch.__version__


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bits", "other", "folder"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    interrupted(SPEC, tmp_path, 3)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "other":
        torch.save([1, 2], path)
    elif damage == "bits":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt .*--fresh"):
        execute(SPEC, keeping=keeping(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "empty", "bits"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(damage: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = execute(SPEC, keeping=keeping(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        execute(SPEC, keeping=keeping(tmp_path, 11, every=0.0))  # one before every step
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {"cut": content[:middle], "empty": b"", "bits": content[:middle] + bytes(64) + content[middle + 64 :]}
    path.write_bytes(damaged[damage])
    assert '"' not in saved_settings(path)
    said: list[str] = []
    resumed = execute(SPEC, keeping=replace(keeping(tmp_path), say=said.append))
    assert numbers(resumed) == numbers(whole)
    (line,) = said
    assert "checkpoint.pt" in line
    assert line.endswith(f"going on from the one before it, {tmp_path / 'checkpoint.previous.pt'}")
    checkpoint.forget(path)
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_model_of_another_shape_under_the_same_key_is_refused(tmp_path: Path) -> None:
    interrupted(SPEC, tmp_path, 3)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    content["model"]["0.weight"] = torch.zeros(3, 3)
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"does not fit the model of this run.*0\.weight"):
        execute(SPEC, keeping=keeping(tmp_path))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(SPEC, tmp_path, 3)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("steepest._files.os.fsync", full)
    with pytest.raises(OutputError, match=r"checkpoint\.pt cannot be written \(No space left on device\)"):
        execute(SPEC, keeping=keeping(tmp_path, every=0.0))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    monkeypatch.undo()
    assert numbers(execute(SPEC, keeping=keeping(tmp_path))) == numbers(execute(SPEC))


def test_a_checkpoint_knows_what_the_user_asked_for(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(SPEC, keeping=replace(keeping(tmp_path, 3), settings='{"task": "diabetes"}'))
    assert saved_settings(tmp_path / "checkpoint.pt") == '{"task": "diabetes"}'


def test_a_budget_of_seconds_is_continued_where_it_was(tmp_path: Path) -> None:
    run = replace(SPEC, epochs=None, seconds=0.3, schedule="constant")
    interrupted(run, tmp_path, 5)
    spent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["seconds"]
    record = execute(run, keeping=keeping(tmp_path))
    assert 0 < spent < 0.3 <= record.seconds
    assert record.steps > 5

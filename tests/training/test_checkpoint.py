"""Checkpoints: a run that is continued ends with the numbers of one that was never stopped."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from made_checkpoints import change_manifest, forge, manifest_of, newest
from steepest.distributed.checkpoint import together
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.training import spec
from steepest.training.checkpoint import Keeping, saved_settings
from steepest.training.checkpoints import identity
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
    return Keeping(folder / "checkpoints", folder / "model.pt", every=every, stop=stop_after(steps))


def numbers(record: RunRecord) -> tuple[object, ...]:
    """Everything that must not depend on interruptions: all but the clock."""
    history = [(p.epoch, p.steps, p.train_loss, p.val_loss, p.diagnostics, p.series) for p in record.history]
    return record.status, record.final, record.fingerprint, record.steps, history


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}


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
    complete = together.complete

    def count(temporary: Path, target: Path) -> None:
        written.append(target)
        complete(temporary, target)

    monkeypatch.setattr(together, "complete", count)
    record = execute(SPEC, keeping=keeping(tmp_path, every=0.0))
    assert [path.name for path in written] == [f"step-{steps:08d}" for steps in range(24)]
    assert complete_folders(tmp_path / "checkpoints") == written[-2:]
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
    before = content_of(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        execute(replace(SPEC, **changes), keeping=keeping(tmp_path))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert content_of(tmp_path) == before


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(SPEC, tmp_path, 3)
    monkeypatch.setattr(identity, "package_version", lambda name: f"{name} of tomorrow")
    with pytest.raises(CheckpointError, match="this is steepest steepest of tomorrow"):
        execute(SPEC, keeping=keeping(tmp_path))
    monkeypatch.undo()
    change_manifest(newest(tmp_path), lambda content: content.update(format=5))
    with pytest.raises(CheckpointError, match=r"step-00000003 has checkpoint format 5, this steepest reads 4.*--fresh"):
        execute(SPEC, keeping=keeping(tmp_path))
    assert spec.package_version("torch") == torch.__version__


def test_a_model_of_another_shape_under_the_same_key_is_refused(tmp_path: Path) -> None:
    interrupted(SPEC, tmp_path, 3)
    tensors = forge(newest(tmp_path), lambda tensors: tensors.update({"model.0.weight": torch.zeros(3, 3)}))
    assert "optimizer.state.0.weight.momentum_buffer" in tensors
    with pytest.raises(
        CheckpointError, match=r"step-00000003 does not fit the model of this run: 0\.weight was \[3, 3\]"
    ):
        execute(SPEC, keeping=keeping(tmp_path))


def test_parameters_of_another_optimizer_under_the_same_key_are_named(tmp_path: Path) -> None:
    interrupted(SPEC, tmp_path, 3)

    def rename(content: dict[str, Any]) -> None:
        content["state"]["optimizer"]["param_groups"][0]["params"][0] = "0.gain"

    change_manifest(newest(tmp_path), rename)
    with pytest.raises(CheckpointError, match=r"does not fit .*not both have 0\.gain, 0\.weight; begin anew"):
        execute(SPEC, keeping=keeping(tmp_path))


def test_everything_goes_by_names(tmp_path: Path) -> None:
    interrupted(replace(SPEC, optimizer="adam", options={"lr": 0.01}), tmp_path, 3)
    content = manifest_of(newest(tmp_path))
    state = content["state"]
    assert state["model"]["2.bias"]["key"] == "model.2.bias"
    assert state["optimizer"]["state"]["0.weight"]["exp_avg"]["key"] == "optimizer.state.0.weight.exp_avg"
    assert state["optimizer"]["param_groups"][0]["params"][:2] == ["0.weight", "0.bias"]
    assert (content["processes"], content["generators"]["cpu"], state["progress"]["steps"]) == (1, 1, 3)
    assert not any(word in json.dumps(content) for word in (str(tmp_path), "step-"))
    assert str(tmp_path).encode() not in (newest(tmp_path) / ".metadata").read_bytes()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(SPEC, tmp_path, 3)
    before = content_of(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"step-0+3\.1 cannot be written \(No space left on device\).*before it are"):
        execute(SPEC, keeping=keeping(tmp_path, every=0.0))
    assert content_of(tmp_path) == before
    monkeypatch.undo()
    assert numbers(execute(SPEC, keeping=keeping(tmp_path))) == numbers(execute(SPEC))


def test_a_checkpoint_knows_what_the_user_asked_for(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(SPEC, keeping=replace(keeping(tmp_path, 3), settings='{"task": "diabetes"}'))
    assert saved_settings(tmp_path / "checkpoints") == '{"task": "diabetes"}'


def test_a_budget_of_seconds_is_continued_where_it_was(tmp_path: Path) -> None:
    run = replace(SPEC, epochs=None, seconds=0.3, schedule="constant")
    interrupted(run, tmp_path, 5)
    spent = manifest_of(newest(tmp_path))["state"]["progress"]["seconds"]
    record = execute(run, keeping=keeping(tmp_path))
    assert 0 < spent < 0.3 <= record.seconds
    assert record.steps > 5

"""Runs that select what they train on: equal steps, keys, the clock, going on after an interruption."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from made_checkpoints import manifest_of, newest
from steepest.errors import InvalidOptionError
from steepest.selection import select as room
from steepest.selection.features import FeatureRun
from steepest.training.checkpoint import Keeping
from steepest.training.compare import Request, plan_runs, resolve_options
from steepest.training.convert import plain
from steepest.training.errors import CheckpointError
from steepest.training.execute import execute
from steepest.training.losses import Loss
from steepest.training.records import RunRecord
from steepest.training.registry import optimizers
from steepest.training.select_text import parse_selection
from steepest.training.selecting import select_now
from steepest.training.selections import METHODS
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec, package_version
from steepest.training.steps import StepFunction
from steepest.training.subsets import Subset
from steepest.training.tune import TUNING_SEEDS, Choice, apply_choices, tuning_runs
from steepest.training.tuned import TUNED, tuned_rates

DIGITS = resolve(Source("digits"))
# 16 steps in each of 3 epochs; a tenth is 108 of 1,079 samples.
SPEC = RunSpec("digits", "adamw", {"lr": 0.003}, epochs=3, batch_size=64, select="sage:0.1")


def numbers(record: RunRecord) -> tuple[object, ...]:
    """Everything that must not depend on interruptions: all but the clock."""
    history = [(p.epoch, p.steps, p.train_loss, p.val_loss, p.diagnostics, p.series) for p in record.history]
    chosen = [replace(item, seconds=0.0) for item in record.selections]
    return record.status, record.final, record.fingerprint, record.steps, history, chosen


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_gives_a_run_with_as_many_steps_as_on_everything(name: str) -> None:
    record = execute(replace(SPEC, select=f"{name}:0.1", epochs=2))
    assert record.status == "finished", record.error
    assert [point.steps for point in record.history] == [0, 16, 32]
    (chosen,) = record.selections
    assert (chosen.epoch, chosen.kept, chosen.wrong) == (2, 108, None)
    assert 0 < chosen.seconds < record.seconds
    assert RunRecord.from_line(record.to_line(), "here") == record


@pytest.mark.parametrize("name", ["sgd", "lbfgs", "sven", "kfac", "fop", "lpsgdm"])
def test_to_keep_everything_is_to_train_on_everything(name: str) -> None:
    # Also: the model, its mode, its hooks and the random numbers are as if nobody had looked.
    run = replace(SPEC, optimizer=name, options=resolve_options(DIGITS, optimizers()[name], {"lr": 0.02}))
    whole, kept = execute(replace(run, select=None)), execute(replace(run, select="sage:1:every=1"))
    assert whole.status == "finished", whole.error
    assert [item.epoch for item in kept.selections] == [2, 3]
    assert numbers(kept)[:5] == numbers(whole)[:5]


def test_only_the_subset_is_trained_on_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    entry = optimizers()["adamw"]

    def choose(options: Mapping[str, object]) -> StepFunction:
        step = entry.step(options)

        def watched(
            optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
        ) -> Tensor | None:
            assert model.training
            assert all(parameter.requires_grad for parameter in model.parameters())
            seen.append(inputs.clone())
            return step(optimizer, model, loss, inputs, targets)

        return watched

    monkeypatch.setitem(optimizers(), "adamw", replace(entry, step=choose))
    record = execute(replace(SPEC, select="random:0.1"))
    first, second, third = (torch.cat(seen[3 + 16 * part : 19 + 16 * part]) for part in range(3))
    assert len(first.unique(dim=0)) > 1000
    places, counts = second.unique(dim=0, return_counts=True)
    assert len(places) == record.selections[0].kept == 108
    assert set(counts.tolist()) == {9, 10}  # 1,024 draws
    assert torch.equal(places, third.unique(dim=0))
    assert not torch.equal(second, third)


def test_every_epoch_and_every_seed_draw_anew_and_every_optimizer_the_same() -> None:
    def digests(**changes: Any) -> list[str]:
        run = replace(SPEC, select="random:0.1:every=1:warmup=0", **changes)
        return [item.digest for item in execute(run).selections]

    first = digests()
    assert len(set(first)) == 3
    assert not set(first) & set(digests(seed=1))
    assert digests(optimizer="sgd", options={"lr": 0.1}) == first


def test_selecting_is_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    select = room.select_subset

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.3)
        return select(*arguments, **named)

    monkeypatch.setattr(room, "select_subset", slow)
    record = execute(SPEC)
    assert record.selections[0].seconds > 0.3
    assert record.seconds > 0.3
    assert [point.seconds > 0.3 for point in record.history] == [False, False, True, True]
    # A selection that takes what is left of the budget ends the run: there is no time for another step.
    ended = execute(replace(SPEC, epochs=None, seconds=0.29, select="random:0.1:warmup=0"))
    assert (ended.status, ended.steps) == ("finished", 0)
    assert ended.seconds > 0.3


def test_wrong_labels_among_the_kept_are_counted() -> None:
    (chosen,) = execute(replace(SPEC, task="digits_wrong20", select="random:0.5", epochs=2)).selections
    assert chosen.wrong is not None
    assert chosen.wrong[1] == 216
    assert 80 < chosen.wrong[0] < 136  # half of them, more or less


# What cannot be


def test_a_selection_that_raises_is_a_failed_run_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any, **_named: Any) -> Any:
        raise InvalidOptionError("no such luck")

    monkeypatch.setattr(room, "select_subset", broken)
    record = execute(SPEC)
    assert (record.status, record.error) == ("failed", "InvalidOptionError: no such luck")
    assert (record.steps, record.selections) == (16, ())


def test_a_subset_smaller_than_a_batch_is_refused_by_the_plan_and_by_the_run() -> None:
    with pytest.raises(InvalidOptionError, match="keeps 11 of the 1079 training samples of digits, fewer than the ba"):
        plan_runs(Request([Source("digits")], ["adamw"], [0], selections=["random:0.01"]))
    record = execute(replace(SPEC, select="random:0.01"))
    assert record.status == "failed"
    assert "the subset has 11 samples and a batch 64" in str(record.error)


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="after 2 epochs of all data, and a run on digits has 2"):
        plan_runs(Request([Source("digits")], ["adamw"], [0], epochs=2, selections=["sage:0.5:warmup=2"]))


# Keys


def test_a_run_on_everything_has_the_key_that_it_always_had() -> None:
    spec = RunSpec("digits", "adamw", {"lr": 0.1}, seed=3, epochs=2, source=Source("digits"))
    content = asdict(replace(spec, options={}, source=None)) | {"options": plain(spec.options)}
    del content["options_source"], content["untuned"], content["select"]
    content["source"] = plain(Source("digits").identity())
    content |= {"steepest": package_version("steepest"), "torch": package_version("torch")}
    assert spec.key() == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    selected = [replace(spec, select=text).key() for text in ("sage:0.1", "sage:0.2", "random:0.1")]
    assert len({spec.key(), *selected}) == 4


# Plans and tuning


def test_arms_are_optimizers_times_selections() -> None:
    specs = plan_runs(
        Request([Source("digits")], ["sgd", "adamw"], [0, 1], selections=[None, "sage:0.10", "random:.1"])
    )
    assert [(spec.seed, spec.optimizer, spec.select) for spec in specs] == [
        (seed, name, select)
        for seed in (0, 1)
        for name in ("sgd", "adamw")
        for select in (None, "sage:0.1", "random:0.1")
    ]


def test_learning_rates_are_tuned_on_everything_once_for_all_selections() -> None:
    specs = plan_runs(Request([Source("digits")], ["sgd", "adamw"], [0], selections=[None, "sage:0.1"]))
    trials = tuning_runs(specs, 2)
    assert len(trials) == 2 * 2 * len(TUNING_SEEDS)
    assert {spec.select for spec in trials} == {None}
    tuned = apply_choices(specs, [Choice("digits", "adamw", 64, 0.07, 0.1, 6, 6)])
    rates = {(spec.optimizer, spec.select): spec.options["lr"] for spec in tuned}
    assert rates["adamw", None] == rates["adamw", "sage:0.1"] == 0.07
    assert rates["sgd", None] == rates["sgd", "sage:0.1"] != 0.07
    # One sentence for all, and nothing of the stored rates, which no longer hold.
    (words,) = {spec.options_source for spec in tuned if spec.optimizer == "adamw"}
    assert words == (
        "learning rate: best of 2 rates x 3 other seeds by validation loss on all of the data, in this comparison; "
        "all else by default"
    )


@pytest.mark.parametrize(
    ("source", "rest"),
    [
        ("defaults, not tuned for this task", "; all else by default"),
        (
            "defaults, not tuned for this task; set by the user: momentum",
            "; all else by default; set by the user: momentum",
        ),
        (tuned_rates(5), "; all else as the optimizers have it by default"),
        (
            TUNED,
            "; Sven's rows and solver were chosen before that, in trials that the others did not get",
        ),
        ("as in the paper", "; all else: as in the paper"),
    ],
)
def test_what_is_told_of_tuned_rates_keeps_only_what_still_holds(source: str, rest: str) -> None:
    (tuned,) = apply_choices(
        [replace(SPEC, select=None, options_source=source)], [Choice("digits", "adamw", 64, 0.07, 0.1, 6, 6)]
    )
    words = "learning rate: best of 2 rates x 3 other seeds by validation loss, in this comparison"
    assert tuned.options_source == words + rest


# Going on


def stop_after(calls: int) -> Callable[[], bool]:
    left = iter(range(calls))
    return lambda: next(left, None) is None


def keeping(folder: Path, calls: int = 10**9) -> Keeping:
    return Keeping(folder / "checkpoints", folder / "model.pt", every=1e9, stop=stop_after(calls))


# 16 steps, then the selection, which looks after every batch of its passes.
@pytest.mark.parametrize("calls", [3, 16, 17, 19, 23, 29, 40])
@pytest.mark.parametrize("select", ["sage:0.1", "sage:0.1:every=1", "random:0.1:every=1", "gradmatch:0.1"])
def test_a_continued_run_is_bit_identical(select: str, calls: int, tmp_path: Path) -> None:
    run = replace(SPEC, select=select)
    with pytest.raises(KeyboardInterrupt):
        execute(run, keeping=keeping(tmp_path, calls))
    resumed = execute(run, keeping=keeping(tmp_path))
    assert numbers(resumed) == numbers(execute(run))


def test_an_interrupted_selection_is_made_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(SPEC, keeping=keeping(tmp_path, 19))
    state = manifest_of(newest(tmp_path))["state"]
    assert [state["progress"][name] for name in ("epoch", "batch", "steps", "selections")] == [2, 0, 16, []]
    assert state["subset"] is None


def test_a_run_can_be_stopped_in_the_midst_of_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    told = FeatureRun.telling

    def listening(self: FeatureRun, before: int, total: int) -> Callable[[int], None]:
        tell = told(self, before, total)

        def step(done: int) -> None:
            chosen.append(before + done)
            tell(done)

        return step

    monkeypatch.setattr(FeatureRun, "telling", listening)
    run = replace(SPEC, select="kcenter:0.1")
    with pytest.raises(KeyboardInterrupt):
        execute(run, keeping=replace(keeping(tmp_path), stop=lambda: bool(chosen)))
    assert chosen == [1]
    resumed = execute(run, keeping=keeping(tmp_path))
    assert numbers(resumed) == numbers(execute(run))


def test_a_finished_selection_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(SPEC, select="random:0.1")
    with pytest.raises(KeyboardInterrupt):
        execute(run, keeping=keeping(tmp_path, 30))
    state = manifest_of(newest(tmp_path))["state"]
    assert 16 < state["progress"]["steps"] <= 30
    assert state["subset"]["indices"]["shape"] == [108]
    whole = execute(run)
    monkeypatch.setattr(room, "select_subset", None)
    assert numbers(execute(run, keeping=keeping(tmp_path))) == numbers(whole)


def test_a_checkpoint_of_another_selection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(SPEC, keeping=keeping(tmp_path, 20))
    with pytest.raises(CheckpointError, match=r"select was 'sage:0\.1' and is 'sage:0\.2'"):
        execute(replace(SPEC, select="sage:0.2"), keeping=keeping(tmp_path))


# By itself


def test_selecting_leaves_model_and_generators_alone() -> None:
    splits, plan = DIGITS.load(0), parse_selection("sage:0.1")
    assert plan is not None
    model = nn.Sequential(DIGITS.model(splits.shape), nn.Dropout())
    task = replace(DIGITS, model=lambda shape: nn.Sequential(DIGITS.model(shape), nn.Dropout()))
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: list[int] = []
    state = torch.get_rng_state()
    subset, chosen = select_now(plan, 0, 2, task, model, splits, lambda: calls.append(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [parameter.grad is None for parameter in model.parameters()] == [False] + [True] * 5
    assert len(calls) >= 10  # two passes of five batches
    assert (len(subset), chosen.kept) == (108, 108)
    assert torch.equal(subset.weights, torch.ones(108))


def test_a_run_on_a_given_subset_never_sees_the_rest() -> None:
    subset = Subset(torch.arange(100), torch.ones(100))
    given = execute(replace(SPEC, select=None), subset=subset)
    assert given.status == "finished", given.error
    assert given.steps == 48
    (chosen,) = given.selections
    assert (chosen.epoch, chosen.kept, chosen.seconds) == (1, 100, 0.0)
    assert given.final != execute(replace(SPEC, select=None)).final


def test_regressions_are_selected_from_without_labels() -> None:
    run = RunSpec("diabetes", "adamw", {"lr": 0.01}, epochs=2, batch_size=32, select="sage:0.5")
    record = execute(run)
    assert record.status == "finished", record.error
    assert record.selections[0].kept == 133


@pytest.mark.parametrize(
    ("task", "select", "message"),
    [
        ("digits", "sage:0.2:scope=('no_such',)", "has no module 'no_such'"),
        ("diabetes", "sage:0.2:class_policy=balanced", "no whole-number labels"),
        ("diabetes", "el2n:0.2:class_policy=balanced", "no whole-number labels"),
        ("digits", "kcenter:0.2:max_memory=100_000", "269.8 KiB for 1079 samples"),
        ("digits", "gradmatch:0.9:max_memory=1_000_000:class_policy=global", "971 samples of one group"),
    ],
)
def test_a_selection_that_cannot_be_made_is_told_before_any_run(task: str, select: str, message: str) -> None:
    request = Request([Source(task)], ["adamw"], [0], epochs=2, selections=(None, select))
    with pytest.raises(InvalidOptionError, match=f"cannot be made on {task}: .*{message}"):
        plan_runs(request)

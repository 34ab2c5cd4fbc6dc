"""The loop: equal data for all, a clock that leaves out evaluation, budgets, schedules."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from steepest.optim import Damped, LeaveOneOut, LevenbergMarquardt
from steepest.training import loop
from steepest.training.data import epoch_order
from steepest.training.execute import execute
from steepest.training.losses import Loss
from steepest.training.optimizer import OptimizerEntry
from steepest.training.records import RunRecord
from steepest.training.registry import optimizers
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec
from steepest.training.steps import StepFunction

SPEC = RunSpec("diabetes", "sgd", {"lr": 0.01}, epochs=2, batch_size=32)
NAMES = ["sven", "sgd", "adam", "lbfgs"]
Watch = Callable[[str, Callable[[torch.optim.Optimizer, nn.Module, Tensor], None]], None]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Call a function before every step of an optimizer."""

    def install(name: str, look: Callable[[torch.optim.Optimizer, nn.Module, Tensor], None]) -> None:
        entry = optimizers()[name]

        def choose(options: Mapping[str, object]) -> StepFunction:
            step = entry.step(options)

            def watched(
                optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
            ) -> Tensor | None:
                look(optimizer, model, inputs)
                return step(optimizer, model, loss, inputs, targets)

            return watched

        monkeypatch.setitem(optimizers(), name, replace(entry, step=choose))

    return install


def test_all_optimizers_see_the_same_data_from_the_same_start(watch: Watch) -> None:
    seen: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    start: dict[str, list[Tensor]] = {}
    for name in NAMES:

        def look(_optimizer: object, model: nn.Module, inputs: Tensor, name: str = name) -> None:
            seen[name].append(inputs.clone())
            if len(seen[name]) == 4:  # the first three are the warm-up on a copy
                start[name] = [p.detach().clone() for p in model.parameters()]

        watch(name, look)
        execute(replace(SPEC, optimizer=name))
    order = epoch_order(266, seed=0, epoch=1)
    inputs = resolve(Source("diabetes")).load(0).train.inputs
    assert torch.equal(seen["sgd"][3], inputs[order[:32]])
    for name in NAMES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen["sven"], seen[name], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(start["sven"], start[name], strict=True))


def test_the_fingerprint_is_equal_for_all_optimizers_and_differs_between_seeds() -> None:
    prints = {name: execute(replace(SPEC, optimizer=name, epochs=1)).fingerprint for name in NAMES}
    assert len(set(prints.values())) == 1
    assert execute(replace(SPEC, seed=1, epochs=1)).fingerprint not in prints.values()


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_and_repeats_itself(name: str) -> None:
    spec = replace(SPEC, optimizer=name, epochs=3, options={**optimizers()[name].options, "lr": 0.02})
    first, second = execute(spec), execute(spec)
    assert first.status == "finished", first.error
    assert first.final == second.final
    assert [point.val_loss for point in first.history] == [point.val_loss for point in second.history]
    assert [point.steps for point in first.history] == [0, 8, 16, 24]
    losses = [point.val_loss for point in first.history]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0]
    assert first.final is not None
    assert first.final.val_loss == losses[-1]
    assert first.num_parameters == 10 * 16 + 16 + 16 * 16 + 16 + 16 + 1


def test_a_run_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    execute(SPEC)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rows", ["losses", "residuals"])
def test_sven_gets_the_rows_that_its_options_ask_for(rows: str) -> None:
    record = execute(replace(SPEC, optimizer="sven", options={"lr": 0.1, "rows": rows}))
    assert record.status == "finished", record.error
    assert {"rank", "update_norm"} <= record.history[-1].diagnostics.keys()
    assert record.history[0].diagnostics == {}


def test_residuals_of_a_classification_are_rows_of_its_gauss_newton_matrix() -> None:
    options = {"rows": "residuals", "lr": 0.1, "solver": Damped(0.01)}
    record = execute(RunSpec("digits", "sven", options, epochs=2, batch_size=64))
    assert record.status == "finished", record.error
    assert record.history[-1].diagnostics["rank"] > 64  # ten rows to a sample
    assert min(record.history[-1].val_metrics.values()) > 0.8  # type: ignore[type-var,operator]


def test_the_clock_leaves_evaluation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = loop.evaluate

    def slow(*arguments: object) -> object:
        time.sleep(0.2)
        return evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "evaluate", slow)
    record = execute(SPEC)
    assert record.seconds < 0.2


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("linear", [1.0, 0.75, 0.5, 0.25]), ("trapezoidal", [1.0, 1.0, 1.0, 0.625]), ("constant", [1.0] * 4)],
)
def test_the_schedule_follows_the_budget(watch: Watch, schedule: str, rates: list[float]) -> None:
    seen: list[float] = []
    watch("sgd", lambda optimizer, _model, _inputs: seen.append(optimizer.param_groups[0]["lr"]))
    execute(replace(SPEC, options={"lr": 0.02}, schedule=schedule, batch_size=128))  # type: ignore[arg-type]
    assert seen[3:] == pytest.approx([0.02 * rate for rate in rates])


@pytest.mark.parametrize(
    ("schedule", "solver", "falls"),
    [
        ("auto", LevenbergMarquardt(), False),
        ("auto", LeaveOneOut(), False),
        ("auto", None, False),
        ("auto", Damped(), True),
        ("linear", LevenbergMarquardt(), True),
        ("constant", Damped(), False),
    ],
)
def test_the_automatic_schedule_leaves_the_rate_of_solvers_that_find_the_length(
    watch: Watch, schedule: str, solver: object, falls: bool
) -> None:
    seen: list[float] = []
    watch("sven", lambda optimizer, _model, _inputs: seen.append(optimizer.param_groups[0]["lr"]))
    options = {"lr": 0.5, "rows": "residuals"} | ({} if solver is None else {"solver": solver})
    spec = RunSpec("constrained_fit", "sven", options, epochs=4, batch_size=64, schedule=schedule)  # type: ignore[arg-type]
    assert execute(spec).error is None
    assert seen[3:] == pytest.approx([0.5, 0.375, 0.25, 0.125] if falls else [0.5] * 4)


def test_the_automatic_schedule_falls_for_others(watch: Watch) -> None:
    seen: list[float] = []
    watch("adam", lambda optimizer, _model, _inputs: seen.append(optimizer.param_groups[0]["lr"]))
    execute(RunSpec("constrained_fit", "adam", {"lr": 0.5}, epochs=2, batch_size=64, schedule="auto"))
    assert seen[3:] == pytest.approx([0.5, 0.25])


def test_a_budget_of_seconds_ends_the_run(watch: Watch) -> None:
    watch("sgd", lambda _optimizer, _model, _inputs: time.sleep(0.005))
    record = execute(replace(SPEC, epochs=None, seconds=0.1))
    assert record.status == "finished"
    assert 0.1 <= record.seconds < 0.4
    assert all(a.seconds < b.seconds for a, b in pairwise(record.history))


def test_the_first_of_two_budgets_ends_the_run() -> None:
    record = execute(replace(SPEC, epochs=1, seconds=100.0))
    assert record.steps == 8


def _finite_prefix(record: RunRecord) -> bool:
    return all(point.val_loss is not None for point in record.history)


def test_a_run_that_blows_up_is_kept_as_diverged() -> None:
    record = execute(replace(SPEC, options={"lr": 1e8}, epochs=3))
    assert record.status == "diverged"
    assert "the loss of step" in str(record.error)
    assert record.final is None
    assert record.steps > 0
    assert _finite_prefix(record)
    assert RunRecord.from_line(record.to_line(), "here") == record


def test_a_finite_blow_up_is_diverged_too() -> None:
    # A constant output of lr-sized bias: finite, and far above ten times the untrained loss.
    record = execute(replace(SPEC, options={"lr": 30.0}, epochs=1, batch_size=256, schedule="constant"))
    assert record.final is not None
    assert record.status == "diverged"
    assert "above 10x the untrained one" in str(record.error)


def test_an_error_in_a_run_is_kept_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Callable[..., torch.optim.Optimizer]:
        raise OSError("no such library")

    entry: OptimizerEntry = replace(optimizers()["sgd"], constructor=broken)
    monkeypatch.setitem(optimizers(), "sgd", entry)
    record = execute(SPEC)
    assert (record.status, record.error) == ("failed", "OSError: no such library")
    assert record.history == ()


def test_a_skipped_step_has_no_loss_and_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(*_: object) -> None:
        return None

    monkeypatch.setitem(optimizers(), "sgd", replace(optimizers()["sgd"], step=lambda _options: skip))
    record = execute(SPEC)
    assert record.status == "finished"
    assert [point.train_loss for point in record.history] == [None] * 3

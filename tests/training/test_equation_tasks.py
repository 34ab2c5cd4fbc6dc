"""Equations as tasks: the stored solutions solve them, the loss weighs as it says, and float64 goes all the way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from steepest.cli import run
from steepest.errors import InvalidOptionError
from steepest.nn import Jet, WithDerivatives
from steepest.optim import Damped, LevenbergMarquardt
from steepest.training.checkpoint import Keeping
from steepest.training.cole_hopf import burgers
from steepest.training.compare import Request, plan_runs, resolve_options
from steepest.training.conditions import Condition, Conditions, value
from steepest.training.data import Split
from steepest.training.evaluate import evaluate
from steepest.training.execute import execute
from steepest.training.points import edge, grid, sobol
from steepest.training.records import RecordStore
from steepest.training.registry import optimizers, tasks
from steepest.training.source import Source
from steepest.training.spec import RunSpec
from steepest.training.task import Task
from steepest.training.tasks.equations_data import _load_fit

EQUATIONS = ["poisson_2d", "helmholtz_2d", "heat_1d", "burgers_1d", "inverse_poisson", "constrained_fit"]


def get_task(name: str) -> Task:
    found = tasks()[name]
    assert isinstance(found, Task)
    return found


def heat(points: Tensor) -> Tensor:
    x, t = points[:, :1], points[:, 1:]
    slow = torch.sin(math.pi * x) * torch.exp(-0.1 * math.pi**2 * t)
    return slow + 0.5 * torch.sin(3 * math.pi * x) * torch.exp(-0.9 * math.pi**2 * t)


EXACT = {
    "poisson_2d": lambda p: torch.sin(math.pi * p[:, :1]) * torch.sin(math.pi * p[:, 1:]),
    "helmholtz_2d": lambda p: torch.sin(math.pi * p[:, :1]) * torch.sin(4 * math.pi * p[:, 1:]),
    "heat_1d": heat,
    "burgers_1d": lambda p: burgers(p, 0.02).unsqueeze(1),
    "inverse_poisson": lambda p: torch.sin(math.pi * p[:, :1]) * torch.sin(math.pi * p[:, 1:]),
    "constrained_fit": lambda p: torch.sin(3 * math.pi * p) * torch.exp(-2 * p),
}


def exact_columns(name: str, points: Tensor, second: tuple[tuple[int, int], ...]) -> Tensor:
    """What a perfect model of the task would put out, with derivatives by autograd."""
    x = points.clone().requires_grad_()
    u = EXACT[name](x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    columns = [u, first]
    columns += [torch.autograd.grad(first[:, i].sum(), x, retain_graph=True)[0][:, j : j + 1] for i, j in second]
    coefficient = [torch.full((len(x), 1), 2.5, dtype=torch.float64)] if name == "inverse_poisson" else []
    return torch.cat([*columns, *coefficient], 1).detach()


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_exact_solution_meets_the_conditions_up_to_the_noise(name: str) -> None:
    task = get_task(name)
    for split in (part for seed in (0, 3) for part in vars(task.load(seed)).values() if isinstance(part, Split)):
        second = {2: ((0, 0),) if name in {"heat_1d", "burgers_1d"} else ((0, 0), (1, 1)), 1: ()}[split.inputs.shape[1]]
        outputs = exact_columns(name, split.inputs, second)
        residuals = task.loss.residuals(outputs, split.targets)
        noisy = split.targets[:, 0] == {"inverse_poisson": 2, "constrained_fit": 0}.get(name, 99)
        # The quadrature leaves a rounding that two derivatives enlarge.
        assert residuals[~noisy].abs().max() < (1e-5 if name == "burgers_1d" else 1e-9)
        if noisy.any():
            measured = (outputs[:, 0] - split.targets[:, 1])[noisy]
            assert measured.square().mean().sqrt() == pytest.approx(
                0.01 if name == "inverse_poisson" else 0.05, rel=0.3
            )
        assert task.metrics[0].compute(outputs, split.targets) < 1e-12
        # Nothing is met by nothing.
        assert task.loss.per_sample(torch.zeros_like(outputs), split.targets).mean() > 0.1
        assert task.metrics[0].compute(torch.zeros_like(outputs), split.targets) == 1.0


def test_the_reference_of_burgers_equation_begins_and_ends_as_it_must() -> None:
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    nu = 0.01 / math.pi
    at = {t: burgers(torch.stack([x, torch.full_like(x, t)], 1), nu) for t in (0.0, 1e-6, 0.5, 1.0)}
    torch.testing.assert_close(at[0.0], -torch.sin(math.pi * x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at[1e-6], at[0.0], rtol=0, atol=1e-4)
    for values in at.values():
        torch.testing.assert_close(values, -values.flip(0), rtol=0, atol=1e-9)  # odd, so zero in the middle
        assert values[[0, -1]].abs().max() < 1e-9
    # The smallest slope at the shock, at t = 0.5105, as published for this problem: -152.00516.
    near = torch.tensor([[1e-6, 1.6037 / math.pi], [-1e-6, 1.6037 / math.pi]], dtype=torch.float64)
    above, below = burgers(near, nu)
    assert float((above - below) / 2e-6) == pytest.approx(-152.00516, rel=1e-4)


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_task_is_one_batch_of_float64(name: str) -> None:
    task = get_task(name)
    splits = task.load(0)
    assert task.batch_size == len(splits.train)
    model = task.model(splits.shape)
    tensors = [
        *model.state_dict().values(),
        *(t for s in (splits.train, splits.val, splits.test) for t in (s.inputs, s.targets)),
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
    assert model(splits.train.inputs).dtype == torch.float64
    scores = evaluate(task, model, splits.val)
    assert 0 < scores.metrics[task.metrics[0].name] < 100  # type: ignore[operator]
    # The points of the seed, twice; another seed has others; validation and test share no point with training.
    assert torch.equal(task.load(0).train.inputs, splits.train.inputs)
    assert not torch.equal(task.load(1).train.inputs, splits.train.inputs)
    inner = [
        {tuple(row) for row in s.inputs[s.targets[:, 0] == 0].tolist()} for s in (splits.train, splits.val, splits.test)
    ]
    assert inner[0].isdisjoint(inner[1])
    assert inner[0].isdisjoint(inner[2])


def test_the_mean_loss_is_the_weighted_sum_of_mean_squares_whatever_the_numbers_of_points() -> None:
    loss = Conditions(
        (Condition("slope", lambda u, data, _: u.d(0)[:, 0] - data, 1.0, 6), Condition("value", value, 7.0, 2)),
        num_inputs=1,
    )
    outputs = torch.randn(8, 2, dtype=torch.float64)
    targets = torch.tensor([[0.0, 1.0, 0.0]] * 6 + [[1.0, 3.0, 0.0]] * 2, dtype=torch.float64)
    expected = (outputs[:6, 1] - 1).square().mean() + 7 * (outputs[6:, 0] - 3).square().mean()
    torch.testing.assert_close(loss.per_sample(outputs, targets).mean(), expected)
    order = torch.randperm(8)
    shuffled = loss.residuals(outputs[order], targets[order])
    torch.testing.assert_close(shuffled, loss.residuals(outputs, targets)[order])


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_loss_of_another_split_weighs_its_conditions_as_the_loss_says(name: str) -> None:
    """A grid for the error has other numbers of points than the training: they must not change the weights."""
    task = get_task(name)
    loss, splits = task.loss, task.load(0)
    assert isinstance(loss, Conditions)
    model = task.model(splits.shape)
    for split in (splits.train, splits.val, splits.test):
        outputs = model(split.inputs)
        weighted = loss.residuals(outputs, split.targets)
        expected = 0.0
        for number, condition in enumerate(loss.conditions):
            here = split.targets[:, 0] == number
            plain = weighted[here] / (condition.weight * loss.num_points / condition.points) ** 0.5
            expected += condition.weight * plain.square().mean().item()
        assert evaluate(task, model, split).loss == pytest.approx(expected, rel=1e-12)
    at_training = evaluate(task, model, splits.train).loss
    assert at_training == pytest.approx(
        loss.per_sample(model(splits.train.inputs), splits.train.targets).mean().item(), rel=1e-12
    )


def test_a_split_without_a_condition_has_the_loss_of_the_others() -> None:
    loss = Conditions((Condition("a", value, 2.0, 3), Condition("b", value, 5.0, 9)), num_inputs=1)
    outputs = torch.randn(4, 2)
    found = loss.mean(outputs, torch.zeros(4, 3))
    torch.testing.assert_close(found, 2 * outputs[:, 0].double().square().mean(), check_dtype=False)


def test_sven_on_an_equation_tries_its_steps_out_at_a_rate_that_stays() -> None:
    for name in EQUATIONS:
        specs = plan_runs(Request([Source(name)], ["sven", "adam"], [0]))
        # Of the fit to noisy values the bottom is no aim.
        assert isinstance(specs[0].options["solver"], Damped if name == "constrained_fit" else LevenbergMarquardt)
        assert {spec.schedule for spec in specs} == {"auto"}
        assert not any(spec.untuned for spec in specs)
    (spec,) = plan_runs(Request([Source("poisson_2d")], ["sven"], [0], schedule="linear"))
    assert spec.schedule == "linear"
    (spec,) = plan_runs(Request([Source("toy_1d")], ["sven"], [0]))
    assert spec.schedule == "linear"


def test_a_run_untouched_goes_far_below_what_a_fixed_damping_reached(tmp_path: Path) -> None:
    assert run(["train", "poisson_2d", "--epochs", "40", "--out", str(tmp_path)]) == 0
    (record,) = RecordStore(tmp_path / "records").read_all()
    assert record.history[-1].val_metrics["relative_error"] < 1e-5  # type: ignore[operator]


def test_a_model_without_derivatives_is_refused() -> None:
    task = get_task("poisson_2d")
    splits = task.load(0)
    model = nn.Linear(2, 3, dtype=torch.float64)
    with pytest.raises(InvalidOptionError, match=r"need 5 columns.*WithDerivatives, or leave out --model"):
        task.loss.residuals(model(splits.train.inputs), splits.train.targets)


def test_the_unknown_coefficient_is_a_column_of_the_output() -> None:
    task = get_task("inverse_poisson")
    splits = task.load(0)
    model = task.model(splits.shape)
    outputs = model(splits.val.inputs)
    assert torch.equal(outputs[:, -1], torch.ones(len(outputs), dtype=torch.float64))
    assert task.metrics[1].compute(outputs, splits.val.targets) == pytest.approx(0.6)
    wrapped = model.get_submodule("model")
    assert isinstance(wrapped, WithDerivatives)
    assert isinstance(wrapped.jet_of(outputs[:, :-1]), Jet)


def test_noise_is_drawn_anew_for_every_part_and_seed() -> None:
    first, again, other = _load_fit(0), _load_fit(0), _load_fit(1)
    assert torch.equal(first.train.targets, again.train.targets)
    assert not torch.equal(first.train.targets, other.train.targets)


def test_points_fill_their_box_and_its_edge() -> None:
    box = ((-1.0, 1.0), (0.0, 3.0))
    drawn = sobol(512, box, 0)
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.0, 1.5], dtype=torch.float64), rtol=0, atol=0.02)
    assert ((drawn >= torch.tensor([-1, 0])) & (drawn <= torch.tensor([1, 3]))).all()
    assert grid(4, box).shape == (16, 2)
    assert grid(4, ((0.0, 1.0),)).flatten().tolist() == [0.125, 0.375, 0.625, 0.875]
    around = edge(5, box)
    on = (around[:, 0].abs() == 1) | (around[:, 1] == 0) | (around[:, 1] == 3)
    assert len(around) == 20
    assert on.all()


@pytest.mark.parametrize("optimizer", ["sven", "adam"])
def test_a_run_keeps_float64_in_records_and_weights(optimizer: str, tmp_path: Path) -> None:
    arguments = ["train", "constrained_fit", "-o", optimizer, "--epochs", "15", "--out", str(tmp_path)]
    assert run(arguments) == 0
    (record,) = RecordStore(tmp_path / "records").read_all()
    assert record.status == "finished"
    history = [point.val_metrics["relative_error"] for point in record.history]
    assert len(history) == 16
    assert history[-1] is not None
    assert history[0] is not None
    assert history[-1] < history[0]
    # A float32 number would survive this round trip.
    assert float(torch.tensor(history[-1], dtype=torch.float32)) != history[-1]
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {tensor.dtype for tensor in saved["state_dict"].values()} == {torch.float64}


@pytest.mark.parametrize("name", ["sven", "adam"])
def test_a_continued_run_in_float64_is_bit_identical(name: str, tmp_path: Path) -> None:
    task = get_task("constrained_fit")
    options = resolve_options(task, optimizers()[name], {})
    spec = RunSpec("constrained_fit", name, options, epochs=6, batch_size=task.batch_size)
    states = []
    for folder, stops in ((tmp_path / "whole", []), (tmp_path / "parts", [2, 3])):
        folder.mkdir()
        for steps in stops:
            left = iter(range(steps))
            stop = Keeping(
                folder / "checkpoints", folder / "model.pt", every=1e9, stop=lambda left=left: next(left, None) is None
            )
            with pytest.raises(KeyboardInterrupt):
                execute(spec, keeping=stop)
        record = execute(
            spec, keeping=Keeping(folder / "checkpoints", folder / "model.pt", every=1e9, stop=lambda: False)
        )
        assert record.status == "finished", record.error
        history = [(point.train_loss, point.val_loss) for point in record.history]
        states.append((history, torch.load(folder / "model.pt", weights_only=True)["state_dict"]))
    (whole, first), (parts, second) = states
    assert whole == parts
    assert all(torch.equal(first[key], second[key]) for key in first)

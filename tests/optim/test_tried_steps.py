"""Steps that are tried before they are taken: shortened, given up, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from optim.sven_runs import (
    DOUBLE,
    counted,
    data,
    flat,
    jacobian_of,
    mlp,
    residuals,
    same,
    seen,
    snapshot,
    state_of,
    unchanged,
)
from steepest.optim.gram import Solution
from steepest.optim.leave_one_out import verified

pytestmark = pytest.mark.usefixtures("no_model_is_small")


def untried(
    floor: float = 1e-14, used: float = 1e-3, step: float = 0.8, radius: float = float("inf"), norm: float = 1.0
) -> Solution:
    memory = torch.tensor([0.5, 0.5, radius, floor, used], dtype=DOUBLE)
    jacobian = jacobian_of(torch.ones(1, 1, dtype=DOUBLE))
    return Solution(jacobian, 1, None, 0.0, norm, 1.0, weights=torch.ones(1), step=step, memory=memory)


@pytest.mark.parametrize("halvings", range(6))
def test_a_step_is_halved_up_to_four_times_and_then_given_up(halvings: int) -> None:
    lengths: list[float] = []

    def attempt(_: Solution, length: float) -> float:
        lengths.append(length)
        return 1.0 if len(lengths) <= halvings else 0.999

    solution, accepted = verified(untried(), 1.0, attempt)
    assert lengths == [0.8 / 2**k for k in range(min(halvings, 4) + 1)]
    assert accepted == (halvings <= 4)
    assert solution.step == (lengths[-1] if accepted else 0)
    assert solution.memory is not None
    assert float(solution.memory[-2]) == pytest.approx(1e-3 * 10 ** min(halvings, 4) if halvings else 5e-15)
    assert solution.memory[:2].tolist() == [0.5, 0.5]


def test_the_floor_never_falls_by_a_halving_and_falls_by_two_without_one() -> None:
    held, _ = verified(untried(floor=10.0), 1.0, lambda _, length: 2.0 if length > 0.5 else 0.5)
    assert held.memory is not None
    assert float(held.memory[-2]) == 10.0
    free, _ = verified(untried(floor=10.0), 1.0, lambda *_: 0.5)
    assert free.memory is not None
    assert float(free.memory[-2]) == 5.0


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_after_a_step_that_is_given_up_the_next_are_shorter_and_then_longer_again(scale: float) -> None:
    tried: list[float] = []

    def attempt(_: Solution, length: float) -> float:
        tried.append(length)
        return 2.0

    lost, accepted = verified(untried(radius=80.0, norm=5.0), 1.0, attempt, scale)
    assert not accepted
    assert lost.memory is not None
    assert tried[0] == 0.8 * scale
    assert float(lost.memory[-3]) == pytest.approx(5.0 * tried[-1] / 2)
    halved, _ = verified(untried(radius=80.0), 1.0, lambda _, length: 2.0 if length > 0.5 else 0.5)
    free, _ = verified(untried(radius=80.0), 1.0, lambda *_: 0.5)
    for taken in (halved, free):
        assert taken.memory is not None
        assert float(taken.memory[-3]) == 160.0


def test_where_a_short_step_is_given_up_too_it_is_not_the_length() -> None:
    """What it gains is lost in rounding: shorter and shorter ones would never end."""
    lost, accepted = verified(untried(radius=1e-3, step=1 / 32), 1.0, lambda *_: 1.001)
    assert not accepted
    assert lost.memory is not None
    assert float(lost.memory[-3]) == float("inf")


def test_a_step_that_the_guard_would_leave_little_of_is_left_to_another_damping() -> None:
    def attempt(*_: Any) -> float:
        raise AssertionError

    left, accepted = verified(untried(norm=100.0), 1.0, attempt, scale=0.01)
    assert not accepted
    assert left.memory is not None
    assert float(left.memory[-3]) == pytest.approx(2 * 0.8)
    cut, accepted = verified(untried(norm=100.0), 1.0, lambda *_: 0.5, scale=0.1)
    assert accepted
    assert cut.memory is not None
    assert float(cut.memory[-3]) == pytest.approx(2 * 8.0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_a_run_that_was_told_to_trust_no_step_goes_on_all_the_same(weight_decay: float) -> None:
    """However it came to that, and where weight decay raises the loss by more than a short step lowers it."""
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", relative_decay=0.0, weight_decay=weight_decay)
    losses = [float(opt.step(lambda: residuals(model, x, y + 2))) for _ in range(3)]
    memory = opt.state[opt.param_groups[0]["params"][0]]["solver"]
    memory[-3] = 1e-30
    losses += [float(opt.step(lambda: residuals(model, x, y + 2))) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[3]


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_targets_far_away_are_reached_all_the_same(scale: float) -> None:
    """No step of usual length helps there at first: neither a large damping nor four halvings would be enough."""
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", relative_decay=0.0)
    losses = [float(opt.step(lambda: residuals(model, x, scale * (y + 2)))) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("step", "norm", "before"),
    [(0.0, 1.0, 1.0), (0.8, 0.0, 1.0), (0.8, 1.0, 0.0)],
    ids=["of no length", "of no direction", "of a fitted batch"],
)
def test_a_step_that_can_gain_nothing_is_not_tried_and_limits_no_other(step: float, norm: float, before: float) -> None:
    def attempt(*_: Any) -> float:
        raise AssertionError

    solution, accepted = verified(untried(step=step, floor=1.0, radius=3.0, norm=norm), before, attempt)
    assert not accepted
    assert solution.step == 0
    assert solution.memory is not None
    assert solution.memory[-3:-1].tolist() == [6.0, 0.5]


def residual_problem(**options: Any) -> tuple[nn.Module, st.Sven, Any]:
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", **options)
    return model, opt, lambda: residuals(model, x, y + 2)


def test_a_step_that_does_not_help_leaves_the_parameters_as_they_were() -> None:
    model, opt, closure = residual_problem(solver=st.LeaveOneOut(slack=0.0, largest=1e3))
    opt.step(closure)
    before, used = snapshot(model), float(state_of(opt)["state"][0]["solver"][-1])
    opt.step(counted(closure, lambda n, rows: rows if n == 0 else 100 + rows))
    assert unchanged(model, before)
    assert not seen(opt).accepted
    assert seen(opt).length == 0
    memory = opt.state_dict()["state"][0]
    assert memory["step"] == 2
    assert float(memory["solver"][-2]) == pytest.approx(1e4 * float(memory["solver"][-1]))
    opt.step(closure)
    later = float(opt.state_dict()["state"][0]["solver"][-1])
    assert later >= min(1e3, 0.99e4 * float(memory["solver"][-1])) > used  # the next one takes a larger damping
    assert seen(opt).accepted


def test_a_step_is_shortened_until_the_batch_gains() -> None:
    model, opt, closure = residual_problem(relative_decay=0.0, max_norm_ratio=None)
    untested = {"solver": st.LeaveOneOut(verify=False), "metric": st.KroneckerMetric(), "max_norm_ratio": None}
    twin, other, again = residual_problem(**untested)
    opt.step(counted(closure, lambda n, rows: rows if n in {0, 3} else 100 + rows))
    start = flat(twin)
    other.step(again)
    assert seen(opt).accepted
    assert seen(opt).length == seen(other).length / 4
    torch.testing.assert_close(flat(model) - start, (flat(twin) - start) / 4, rtol=1e-10, atol=1e-12)


def test_without_verification_the_closure_is_called_once() -> None:
    calls = []
    for verify in (True, False):
        _, opt, closure = residual_problem(solver=st.LeaveOneOut(verify=verify), max_norm_ratio=3.0)
        number: list[int] = []
        opt.step(counted(closure, lambda n, rows, number=number: number.append(n) or rows))
        calls.append(len(number))
    assert calls == [2, 1]


@pytest.mark.parametrize("worse", [float("nan"), float("inf"), 1e200])
def test_a_trial_that_is_not_finite_is_a_trial_that_failed(worse: float) -> None:
    model, opt, closure = residual_problem()
    before = snapshot(model)
    opt.step(counted(closure, lambda n, rows: rows if n == 0 else rows * worse))
    assert unchanged(model, before)
    assert not seen(opt).accepted


@pytest.mark.parametrize(
    "solver", [st.LeaveOneOut(), st.LevenbergMarquardt(), st.KalmanFilter()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("skip", ["raise", "skip"])
def test_an_error_in_the_second_call_leaves_everything_as_it_was(skip: Any, solver: Any) -> None:
    metric = None if isinstance(solver, st.KalmanFilter) else st.KroneckerMetric()
    model, opt, closure = residual_problem(solver=solver, metric=metric, momentum=0.5, on_nonfinite=skip)
    for _ in range(2):
        opt.step(closure)
    before, state, random = snapshot(model), state_of(opt), torch.get_rng_state()

    def broken(number: int, rows: Tensor) -> Tensor:
        if number > 0:
            raise KeyError("user")
        return rows

    with pytest.raises(KeyError, match="user"):
        opt.step(counted(closure, broken))
    assert unchanged(model, before)
    assert same(opt.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)
    opt.step(closure)
    assert not unchanged(model, before)


def test_negative_losses_are_judged_by_their_squares() -> None:
    """With kappa 2 a row is the loss itself, of any sign: one that falls far below zero is no gain."""
    model, (x, _) = mlp(), data(12)
    opt = st.Sven(model, solver=st.LeaveOneOut(), kappa=2.0)
    before = snapshot(model)
    opt.step(counted(lambda: model(x).squeeze(1), lambda n, rows: rows if n == 0 else -100 - rows))
    assert unchanged(model, before)
    assert not seen(opt).accepted


class Masked(nn.Module):
    """Dropout between two layers, which keeps its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 40).double(), nn.Linear(40, 1).double()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).cos()
        kept = nn.functional.dropout(hidden, 0.5, training=True)
        self.masks.append(kept.detach() != 0)
        return self.last(kept).squeeze(1)


@pytest.mark.parametrize(
    "solver", [st.LeaveOneOut(), st.LevenbergMarquardt(), st.KalmanFilter()], ids=lambda s: type(s).__name__
)
def test_dropout_repeats_its_masks_and_the_generator_goes_on_as_after_one_call(solver: Any) -> None:
    torch.manual_seed(0)
    model, (x, _) = Masked(), data(16)
    y = x.sum(1) + 1
    opt = st.Sven(model, rows="residuals", solver=solver)
    for _ in range(3):
        state = torch.get_rng_state()
        model(x)
        once = torch.get_rng_state()
        torch.set_rng_state(state)
        model.masks.clear()
        opt.step(lambda: model(x) - y)
        assert len(model.masks) >= 2
        assert all(torch.equal(mask, model.masks[0]) for mask in model.masks)
        assert torch.equal(torch.get_rng_state(), once)
    first = model.masks[0]
    opt.step(lambda: model(x) - y)
    assert not torch.equal(first, model.masks[-1])  # and the next step draws others


# ---- what is kept between steps


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_memory_and_metric_survive_to_the_bit(how: str, dtype: torch.dtype) -> None:
    def build() -> tuple[nn.Module, st.Sven]:
        model = mlp().to(dtype)
        return model, st.Sven(model, momentum=0.6)

    x, y = (part.to(dtype) for part in data(12))
    model, opt = build()
    for _ in range(5):
        opt.step(lambda: residuals(model, x, y).square())
    if how == "state_dict":
        other, resumed = build()
        saved = state_of(opt)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(saved)
        assert same(saved, state_of(opt))
    else:
        other, resumed = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    assert same(opt.state_dict(), resumed.state_dict())
    for _ in range(5):
        mine, theirs = (o.step(lambda m=m: residuals(m, x, y).square()) for m, o in ((model, opt), (other, resumed)))
        assert torch.equal(mine, theirs)
    assert unchanged(model, snapshot(other))
    assert same(opt.state_dict(), resumed.state_dict())


def test_a_loaded_state_is_shared_with_nobody() -> None:
    _, opt, closure = residual_problem()
    opt.step(closure)
    _, resumed, again = residual_problem()
    saved = opt.state_dict()
    resumed.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    resumed.step(again)
    assert same(opt.state_dict(), kept)

"""The decay that follows the conditions: formed by hand from a dense Jacobian, and gone where everything fits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from optim.sven_runs import (
    DOUBLE,
    data,
    dense_jacobian,
    flat,
    mlp,
    residuals,
    same,
    seen,
    snapshot,
    state_of,
    unchanged,
)
from steepest.engine import Jacobian

pytestmark = pytest.mark.usefixtures("no_model_is_small")

C = 0.2
RESIDUALS: dict[str, Any] = {"rows": "residuals"}
DAMPED: dict[str, Any] = {"solver": st.Damped(0.1), "lr": 0.3}
Output = Callable[[nn.Module, Tensor, Tensor], Any]


def told(step: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    """What some samples say of the others."""
    x, _ = data(rows, seed=step)
    return x, x.sum(1).sin() + 1


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return residuals(model, x, y).square()


def fourth(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """With kappa 1 the squares of the residuals, of losses averaged in pairs their root."""
    return residuals(model, x, y) ** 4


def paired(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return fourth(model, x, y).view(-1, 2).mean(1).sqrt()


def blocks(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"few": residuals(model, x[:2], y[:2]), "many": residuals(model, x[2:], y[2:])}


def weighted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return residuals(model, x, y) * torch.tensor([2.0] * 2 + [1.0] * (len(x) - 2), dtype=DOUBLE)


@dataclass(frozen=True)
class Case:
    """What the closure returns, which rows these are, and the options."""

    output: Output
    rows: Output
    options: dict[str, Any] = field(default_factory=dict)
    reference: bool = False
    decay: float = C


CASES = {
    "default": Case(residuals, residuals, RESIDUALS),
    "default of losses": Case(lambda *a: losses(*a), lambda *a: residuals(*a).abs()),
    "momentum": Case(residuals, residuals, {**RESIDUALS, "momentum": 0.6}),
    "damped": Case(residuals, residuals, {**RESIDUALS, **DAMPED}),
    "weight decay": Case(residuals, residuals, {**RESIDUALS, **DAMPED, "weight_decay": 0.1}),
    "losses": Case(losses, losses, DAMPED),
    "rows of two": Case(fourth, paired, {**DAMPED, "kappa": 1.0, "samples_per_row": 2}),
    "fraction and momentum": Case(residuals, residuals, {**RESIDUALS, **DAMPED, "fraction": 0.5, "momentum": 0.6}),
    "metric": Case(residuals, residuals, {**RESIDUALS, **DAMPED, "metric": st.KroneckerMetric()}),
    "weights": Case(blocks, weighted, {**RESIDUALS, **DAMPED, "weights": {"few": 4.0}}),
    "primal": Case(residuals, residuals, {**RESIDUALS, "solver": st.TruncatedEigh(form="primal"), "lr": 0.3}),
    "levenberg": Case(residuals, residuals, {**RESIDUALS, "solver": st.LevenbergMarquardt()}),
    "kalman": Case(residuals, residuals, {**RESIDUALS, "solver": st.KalmanFilter()}),
    "row by row": Case(residuals, residuals, {**RESIDUALS, "metric": None}, reference=True),
}  # fmt: skip
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def built(case: Case, decay: float | None) -> tuple[nn.Module, st.Sven]:
    model = mlp()
    capture = st.ReferenceCapture(model) if case.reference else None
    return model, st.Sven(model, capture=capture, relative_decay=decay, **case.options)


def lack(params: list[nn.Parameter], rows: Tensor) -> float:
    """``|R|^2 / |J theta|^2``."""
    return float(rows.detach().norm() / (dense_jacobian(params, rows) @ flat(params)).norm()) ** 2


def near(model: nn.Module, x: Tensor, step: int) -> Tensor:
    """Targets that the model all but meets."""
    noise = torch.randn(len(x), generator=torch.Generator().manual_seed(step), dtype=DOUBLE)
    return model(x).detach().squeeze(1) + 0.1 * noise


# ---- the formula


@each
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_the_parameters_shrink_by_the_share_that_the_conditions_lack(case: Case, far: bool) -> None:
    """Beside what the same step without it does; every step begins where the last one of this model ended."""
    model, opt = built(case, case.decay)
    twin, other = built(case, 0.0)
    taken = 0
    for step in range(4):
        x, y = data(12, seed=step)
        twin.load_state_dict(model.state_dict())
        before, y = flat(model), 100 * (y + 2) if far else near(model, x, step)
        share = lack(list(twin.parameters()), case.rows(twin, x, y))
        assert (share > 1) == far
        want = case.decay * min(1.0, share)
        opt.step(lambda x=x, y=y: case.output(model, x, y))
        other.step(lambda x=x, y=y: case.output(twin, x, y))
        assert seen(opt).decay == pytest.approx(want, rel=1e-10)
        assert seen(other).decay == 0
        assert seen(opt).accepted == seen(other).accepted
        if not seen(opt).accepted:
            assert far
            assert torch.equal(flat(model), before)
            continue
        taken += 1
        rate = opt.param_groups[0]["lr"]
        assert seen(opt).length == seen(other).length
        torch.testing.assert_close(flat(model), flat(twin) - rate * want * before, rtol=1e-9, atol=1e-11)
    assert taken >= (2 if far else 4)


def test_every_group_shrinks_by_its_own_rate_and_its_own_decay_too() -> None:
    model, (x, _) = mlp(), data(12)
    start = [list(layer.parameters()) for layer in (model[0], model[2])]  # type: ignore[index]
    groups = [{"params": start[0], "lr": 0.2, "weight_decay": 0.1}, {"params": start[1], "lr": 0.4}]
    opt = st.Sven(model, params=groups, rows="residuals", solver=st.Damped(0.1), max_norm_ratio=None, relative_decay=C)
    before, target = [p.detach().clone() for p in model.parameters()], near(model, x, 0)
    rows = residuals(model, x, target)
    jacobian, share = dense_jacobian(list(model.parameters()), rows), lack(list(model.parameters()), rows)
    gram = jacobian @ jacobian.T
    damping = 0.1 * gram.trace() / len(rows) * torch.eye(len(rows), dtype=DOUBLE)
    moves = jacobian.T @ torch.linalg.solve(gram + damping, rows.detach())
    opt.step(lambda: residuals(model, x, target))
    wanted, at = [], 0
    for p, rate, decay in zip(before, (0.2, 0.2, 0.4, 0.4), (0.1, 0.1, 0, 0), strict=True):
        move = moves[at : at + p.numel()].view_as(p)
        at += p.numel()
        wanted.append((1 - rate * (decay + C * share)) * p - rate * move)
    assert share < 1
    torch.testing.assert_close([p.detach() for p in model.parameters()], wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, DAMPED], ids=["default", "damped"])
def test_beside_adamw_the_parameters_of_sven_alone_shrink_and_count(options: dict[str, Any]) -> None:
    runs = []
    for decay in (C, 0.0):
        model, (x, _) = mlp(), data(12)
        first, last = (list(layer.parameters()) for layer in (model[0], model[2]))  # type: ignore[index]
        groups = [{"params": first, "method": "adamw", "lr": 0.02, "weight_decay": 0.3}, {"params": last}]
        opt = st.Sven(model, params=groups, rows="residuals", relative_decay=decay, **options)
        y, before = near(model, x, 0), flat(last)
        share, whole = (lack(params, residuals(model, x, y)) for params in (last, [*first, *last]))
        opt.step(lambda model=model, x=x, y=y: residuals(model, x, y))
        runs.append((flat(first), flat(last), seen(opt).decay))
    (first_, last_, found), (first_plain, last_plain, nothing) = runs
    assert torch.equal(first_, first_plain)
    assert found == pytest.approx(C * min(1.0, share), rel=1e-10)
    assert abs(whole / share - 1) > 0.01  # of all parameters it would be another share
    assert nothing == 0
    rate = opt.param_groups[1]["lr"]
    torch.testing.assert_close(last_, last_plain - rate * found * before, rtol=1e-9, atol=1e-11)


def test_with_a_fraction_all_parameters_shrink_and_count() -> None:
    """Rows of parameters that the step leaves alone too."""
    model, (x, _) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", fraction=0.5, relative_decay=C, **DAMPED)
    y, before = near(model, x, 0), snapshot(model)
    share = lack(list(model.parameters()), residuals(model, x, y))
    opt.step(lambda: residuals(model, x, y))
    assert seen(opt).decay == pytest.approx(C * share, rel=1e-10)
    shrunk = torch.isclose(model[0].weight, (1 - 0.3 * C * share) * before[0], rtol=1e-12, atol=0).all(1)  # type: ignore[index]
    assert int(shrunk.sum()) == 4


# ---- who has it


@pytest.mark.parametrize(
    "solver",
    [st.Damped(), st.TruncatedEigh(), st.LeaveOneOut(), st.LevenbergMarquardt(), st.KalmanFilter(), st.TruncatedSVD()],
    ids=str,
)
def test_who_chooses_a_solver_has_none_unless_it_is_chosen_too(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is computed for it."""
    found, calls = [], []
    usual = Jacobian.jvp
    monkeypatch.setattr(Jacobian, "jvp", lambda self, vector: calls.append(None) or usual(self, vector))
    for given in ({}, {"relative_decay": 0.0}, {"relative_decay": None}, {"relative_decay": 1e-3}):
        model = mlp()
        opt = st.Sven(model, rows="residuals", solver=solver, lr=0.1, **given)
        calls.clear()
        for step in range(3):
            opt.step(lambda model=model, step=step: residuals(model, *told(step, 6)))
        found.append((flat(model), len(calls), seen(opt).decay))
    none, zero, left, chosen = found
    assert torch.equal(none[0], zero[0])
    assert torch.equal(none[0], left[0])
    assert not torch.equal(none[0], chosen[0])
    assert chosen[1] - none[1] == 3 or isinstance(solver, st.LevenbergMarquardt)  # whose tries differ
    assert none[2] == zero[2] == left[2] == 0 < chosen[2] <= 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_without_a_solver_it_is_two_thousandths(momentum: float) -> None:
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", momentum=momentum)
    opt.step(lambda: residuals(model, x, 100 * y))
    assert seen(opt).decay == 2e-3


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan"), float("inf"), "auto", True])
def test_impossible_shares_are_refused(decay: Any) -> None:
    with pytest.raises(st.InvalidOptionError, match=r"relative_decay=.*give a finite number in \[0, 1\)"):
        st.Sven(mlp(), relative_decay=decay)


# ---- what it comes to


@pytest.mark.parametrize("decay", [1e-3, 0.05])
def test_conditions_that_can_all_be_met_are_met_in_the_end(decay: float) -> None:
    """The decay goes as they do, where one of that size that stays would not let them."""
    ends = []
    for options in ({"relative_decay": decay}, {"relative_decay": 0.0, "weight_decay": decay}):
        model, (x, y) = mlp(), data(10)
        opt = st.Sven(model, rows="residuals", **options)
        for _ in range(60):
            opt.step(lambda model=model, x=x, y=y: residuals(model, x, y))
        ends.append(float(residuals(model, x, y).detach().square().mean()))
        if "weight_decay" not in options:
            assert seen(opt).decay < 1e-5 * decay
    assert ends[0] < 1e-10 < 1e-8 < ends[1]


def test_conditions_that_contradict_each_other_leave_a_smaller_model() -> None:
    sizes = []
    for decay in (0.0, 0.05):
        model, (x, y) = mlp(), data(6)
        opt = st.Sven(model, rows="residuals", relative_decay=decay, **DAMPED)
        for _ in range(100):
            opt.step(lambda model=model, x=x, y=y: residuals(model, torch.cat([x, x]), torch.cat([y, y + 2])))
        sizes.append(float(flat(model).norm()))
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("options", [{}, DAMPED], ids=["default", "damped"])
def test_parameters_that_are_all_zero_are_no_trouble(reference: bool, options: dict[str, Any]) -> None:
    model, (x, y) = mlp(), data(6)
    nn.utils.vector_to_parameters(torch.zeros_like(flat(model)), model.parameters())
    given = {"capture": st.ReferenceCapture(model), "metric": None} if reference else {}
    opt = st.Sven(model, rows="residuals", relative_decay=C, **options, **given)
    opt.step(lambda: residuals(model, x, y + 1))
    assert seen(opt).decay == C
    assert flat(model).isfinite().all()
    assert flat(model).norm() > 0  # the last bias at least


@pytest.mark.parametrize("zero", [False, True])
def test_conditions_that_are_met_take_nothing_away(zero: bool) -> None:
    model, (x, _) = mlp(), data(6)
    if zero:
        nn.utils.vector_to_parameters(torch.zeros_like(flat(model)), model.parameters())
    before = snapshot(model)
    y = model(x).detach().squeeze(1)
    for options in ({}, DAMPED):
        opt = st.Sven(model, rows="residuals", relative_decay=C, **options)
        opt.step(lambda: residuals(model, x, y))
        assert seen(opt).decay == 0
        assert unchanged(model, before)


def test_a_step_that_is_taken_back_takes_back_the_decay() -> None:
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", relative_decay=C)
    before, calls = snapshot(model), [0]

    def closure() -> Tensor:
        calls[0] += 1
        return residuals(model, x, y) + (0 if calls[0] == 1 else 100)

    opt.step(closure)
    assert calls[0] > 2
    assert not seen(opt).accepted
    assert unchanged(model, before)


# ---- what is saved


@pytest.mark.parametrize("options", [{}, {"momentum": 0.6}, DAMPED], ids=["default", "momentum", "damped"])
def test_it_keeps_nothing_and_a_resumed_run_goes_on_to_the_bit(options: dict[str, Any]) -> None:
    def train(model: nn.Module, opt: st.Sven, steps: range) -> None:
        for step in steps:
            opt.step(lambda step=step: residuals(model, *told(step)))

    def fresh(decay: float) -> tuple[nn.Module, st.Sven]:
        model = mlp()
        return model, st.Sven(model, rows="residuals", relative_decay=decay, **options)

    model, opt = fresh(C)
    train(model, opt, range(3))
    saved, weights = state_of(opt), copy.deepcopy(model.state_dict())
    plain, without = fresh(0.0)
    train(plain, without, range(3))
    assert [list(s) for s in saved["state"].values()] == [list(s) for s in state_of(without)["state"].values()]
    assert saved["param_groups"] == state_of(without)["param_groups"]
    train(model, opt, range(3, 6))
    other, resumed = fresh(C)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    train(other, resumed, range(3, 6))
    assert torch.equal(flat(model), flat(other))
    assert same(state_of(opt), state_of(resumed))
    assert not torch.equal(flat(model), flat(plain))

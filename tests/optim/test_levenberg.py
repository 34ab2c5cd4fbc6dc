"""Levenberg-Marquardt against a loop written by hand, and what it promises."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from optim.sven_runs import (
    DOUBLE,
    counted,
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

LM = st.LevenbergMarquardt


def curve(seed: int = 0, width: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()
    x = torch.linspace(-1, 1, 40, dtype=DOUBLE).unsqueeze(1)
    return model, x, torch.sin(3 * x).squeeze(1)


class ByHand:
    """The textbook's loop on dense matrices; ``identity`` scales by the mean eigenvalue, else by the diagonal."""

    def __init__(self, solver: LM, model: nn.Module, rows: Callable[[], Tensor], *, identity: bool, lr: float) -> None:
        self.solver, self.model, self.rows, self.identity, self.lr = solver, model, rows, identity, lr
        self.damping, self.scale = solver.damping, torch.zeros(len(flat(model)), dtype=DOUBLE)
        self.trials = 0

    def at(self, theta: Tensor) -> Tensor:
        kept = flat(self.model)
        nn.utils.vector_to_parameters(theta, self.model.parameters())
        found = self.rows().detach()
        nn.utils.vector_to_parameters(kept, self.model.parameters())
        return found

    def step(self) -> bool:
        graph = self.rows()
        jacobian, rhs, theta = dense_jacobian(list(self.model.parameters()), graph), graph.detach(), flat(self.model)
        normal = jacobian.T @ jacobian
        self.scale = torch.maximum(self.scale, normal.diagonal())
        scale = self.scale if not self.identity else normal.diagonal().sum() / len(rhs) * torch.ones_like(theta)
        for trial in range(1, self.solver.max_trials + 1):
            self.trials = max(self.trials, trial)
            matrix = normal + self.damping * torch.diag(scale)
            d = torch.linalg.solve(matrix, jacobian.T @ rhs)
            if self.solver.acceleration:
                h = 0.1  # r(theta - h d) = r - h J d + h^2 / 2 r''
                second = (self.at(theta - h * d) - rhs + h * jacobian @ d) * 2 / h**2
                a = torch.linalg.solve(matrix, jacobian.T @ second)
                d = d + a / 2 if 2 * a.norm() < 0.75 * d.norm() else d
            accepted = bool(self.at(theta - self.lr * d).square().sum() < rhs.square().sum())
            self.damping *= self.solver.decrease if accepted else self.solver.increase
            if accepted:
                nn.utils.vector_to_parameters(theta - self.lr * d, self.model.parameters())
                break
        return accepted


@pytest.mark.parametrize("acceleration", [False, True])
@pytest.mark.parametrize("lr", [1.0, 0.4])
@pytest.mark.parametrize("form", ["tall", "wide", "dual"])
def test_it_is_the_loop_of_the_textbook(form: str, lr: float, acceleration: bool) -> None:
    """More rows than parameters and fewer, the system of the parameters and that of the rows."""
    solver = LM(damping=1e-3, increase=3.0, acceleration=acceleration, max_primal=0 if form == "dual" else 4096)
    models = []
    for _ in range(2):
        model, x, y = curve(width=8 if form == "tall" else 30)
        model[2].weight.data *= 6  # far away, so that some trials fail
        models.append(model)
    ours, hand = models
    opt = st.Sven(ours, rows="residuals", lr=lr, solver=solver)
    loop = ByHand(solver, hand, lambda: hand(x).squeeze(1) - y, identity=form == "dual", lr=lr)
    for _ in range(8):
        opt.step(lambda: ours(x).squeeze(1) - y)
        assert loop.step() == seen(opt).accepted
        torch.testing.assert_close(flat(ours), flat(hand), rtol=1e-6, atol=1e-8)
        memory = opt.state_dict()["state"][0]["solver"]
        assert float(memory[0]) == pytest.approx(loop.damping, rel=1e-9)
    if lr == 1 and not acceleration:
        assert loop.trials > 1  # else the rejections were not tried


@pytest.mark.parametrize("max_primal", [0, 4096])
def test_a_function_that_the_model_can_be_is_met_to_rounding(max_primal: int) -> None:
    """With more parameters than rows in either form."""
    for rows in (24, 120):
        model, (x, _) = mlp(), data(rows)
        with torch.no_grad():
            model[0].weight *= 3  # so that no unit is nearly linear, and every parameter is felt
        target = model(x).detach().squeeze(1).clone()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=DOUBLE))
        opt = st.Sven(model, rows="residuals", solver=LM(max_primal=max_primal))
        history = [float(opt.step(lambda m=model, x=x, y=target: residuals(m, x, y))) for _ in range(150)]
        assert history[0] > 1e-4
        assert all(b <= a for a, b in itertools.pairwise(history))
        assert history[-1] * rows < 1e-20


def test_the_sum_of_squares_never_grows_in_a_long_narrow_valley() -> None:
    model, x, y = curve(width=16)
    opt = st.Sven(model, rows="residuals", solver=LM())
    history = [float(opt.step(lambda: model(x).squeeze(1) - y)) for _ in range(200)]
    assert all(b <= a for a, b in itertools.pairwise(history))
    assert history[-1] < 1e-9
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_model_that_is_fitted_already_may_be_stepped_forever() -> None:
    """No trial helps at rounding: the damping grows, and neither it nor the parameters leave the numbers."""
    model, x, _ = curve()
    target = model(x).detach().squeeze(1).clone()
    opt = st.Sven(model, rows="residuals", solver=LM())
    before = snapshot(model)
    for _ in range(120):
        opt.step(lambda: model(x).squeeze(1) - target)
        assert not seen(opt).accepted
    assert unchanged(model, before)
    assert math.isfinite(float(opt.state_dict()["state"][0]["solver"][0]))
    first = float(opt.step(lambda: model(x).squeeze(1) - target - 1))
    for _ in range(40):
        last = float(opt.step(lambda: model(x).squeeze(1) - target - 1))
    assert last < 1e-3 * first  # and it finds its way back


def test_a_long_run_of_accepted_steps_leaves_a_damping() -> None:
    model, x, y = curve()
    opt = st.Sven(model, rows="residuals", lr=1e-4, solver=LM(decrease=1e-3, acceleration=False))
    for _ in range(130):
        opt.step(lambda: model(x).squeeze(1) - y)
        assert seen(opt).accepted
    assert float(opt.state_dict()["state"][0]["solver"][0]) > 0


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_step_that_no_trial_makes_better_leaves_the_parameters_to_the_bit(momentum: float) -> None:
    model, x, y = curve()
    opt = st.Sven(model, rows="residuals", solver=LM(max_trials=5, acceleration=False), momentum=momentum)

    def closure() -> Tensor:
        return model(x).squeeze(1) - y

    opt.step(closure)
    before, damping = snapshot(model), float(opt.state_dict()["state"][0]["solver"][0])
    calls: list[int] = []
    opt.step(counted(closure, lambda n, rows: calls.append(n) or (rows if n == 0 else rows + 100)))
    assert unchanged(model, before)
    assert not seen(opt).accepted
    assert len(calls) == 6
    assert float(opt.state_dict()["state"][0]["solver"][0]) == pytest.approx(damping * 2**5)
    opt.step(closure)
    assert seen(opt).accepted


def test_with_momentum_the_sum_of_squares_never_grows_either() -> None:
    model, x, y = curve()
    opt = st.Sven(model, rows="residuals", solver=LM(), momentum=0.7)
    history = [float(opt.step(lambda: model(x).squeeze(1) - y)) for _ in range(30)]
    assert all(b <= a for a, b in itertools.pairwise(history))
    assert history[-1] < 1e-2 * history[0]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_acceleration_knows_the_rate_the_decay_and_the_momentum(momentum: float) -> None:
    """It measures curvature along the direction itself: a schedule that lowers lr does not change what it finds."""
    steps = {}
    for lr, decay, acceleration in ((1.0, 0.0, True), (1e-3, 0.0, True), (1e-3, 0.1, True), (1.0, 0.0, False)):
        model, x, y = curve()
        solver = LM(damping=1.0, acceleration=acceleration)
        opt = st.Sven(model, rows="residuals", lr=lr, weight_decay=decay, solver=solver, momentum=momentum)
        opt.param_groups[0]["lr"] = 1.0
        opt.param_groups[0]["weight_decay"] = 0.0
        opt.step(lambda m=model, x=x, y=y: m(x).squeeze(1) - y)
        opt.param_groups[0].update(lr=lr, weight_decay=decay)
        start = flat(model)
        opt.step(lambda m=model, x=x, y=y: m(x).squeeze(1) - y)
        assert seen(opt).accepted
        steps[lr, decay, acceleration] = (flat(model) - (1 - lr * decay) * start) / lr
    want = steps[1.0, 0.0, True]
    for short in (0.0, 0.1):
        torch.testing.assert_close(steps[1e-3, short, True], want, rtol=1e-6, atol=1e-9)
    assert (steps[1.0, 0.0, False] - want).norm() > 1e-4 * want.norm()  # else there was nothing to accelerate


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_acceleration_is_the_second_derivative_along_the_step(momentum: float) -> None:
    """Of rows that are quadratic in the parameters finite differences are exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)).double()
    x, y = data(30)
    solver = LM(damping=100.0)
    opt = st.Sven(model, rows="residuals", solver=solver, momentum=momentum)
    previous, damping, scale = torch.zeros(16, dtype=DOUBLE), 100.0, torch.zeros(16, dtype=DOUBLE)
    believed = []
    for _ in range(4):
        rows = residuals(model, x, y)
        jacobian = dense_jacobian(list(model.parameters()), rows)
        scale = torch.maximum(scale, (jacobian.T @ jacobian).diagonal())
        matrix = jacobian.T @ jacobian + damping * torch.diag(scale)
        plain = torch.linalg.solve(matrix, jacobian.T @ (rows.detach() - momentum * jacobian @ previous))
        whole = plain + momentum * previous
        first, last = whole[:12].view(4, 3), whole[12:].view(1, 4)
        second = 2 * (x @ first.T @ last.T).squeeze(1)  # of (W2 - h B) (W1 - h A) x, twice in h
        change = torch.linalg.solve(matrix, jacobian.T @ second) / 2
        small = bool(4 * change.norm() < 0.75 * plain.norm())
        believed.append(small)
        before = flat(model)
        opt.step(lambda: residuals(model, x, y))
        previous = whole + change * small
        torch.testing.assert_close(before - flat(model), previous, rtol=1e-8, atol=1e-10)
        assert seen(opt).accepted
        damping /= 3
    assert believed[0]


def test_acceleration_pays() -> None:
    """Of a curved valley: fewer steps to the same place."""
    reached = {}
    for acceleration in (True, False):
        model, x, y = curve(width=16)
        opt = st.Sven(model, rows="residuals", solver=LM(acceleration=acceleration))
        for _ in range(40):
            loss = opt.step(lambda m=model, x=x, y=y: m(x).squeeze(1) - y)
        reached[acceleration] = float(loss)
    assert reached[True] < reached[False]


def test_vector_rows_blocks_and_weights_are_one_sum_of_squares() -> None:
    x, y = data(12, 3)
    found = []
    for factor, weights in ((1.0, {"edge": 4.0}), (2.0, None)):
        model = mlp(3)
        opt = st.Sven(model, rows="residuals", solver=LM(), weights=weights)

        def closure(model: nn.Module = model, factor: float = factor) -> dict[str, Tensor]:
            return {"inner": model(x[:8]) - y[:8], "edge": factor * (model(x[8:])[:, 0] - y[8:, 0])}

        history = [float(opt.step(closure)) for _ in range(10)]
        assert history[-1] < 0.5 * history[0]
        found.append(flat(model))
    assert torch.equal(*found)


def test_without_numbers_in_the_jacobian_nothing_is_solved() -> None:
    """Finite rows with infinite gradients: an error or a skipped step, and no poisoned scale."""
    for skip in ("raise", "skip"):
        model, (x, y) = mlp(), data(8)
        opt = st.Sven(model, rows="residuals", solver=LM(), on_nonfinite=skip)  # type: ignore[arg-type]

        def bad(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            found = residuals(model, x, y)
            return torch.where(torch.arange(8) == 3, (found - found.detach()).sqrt(), found)

        def good(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            return residuals(model, x, y)

        opt.step(good)
        before, state = snapshot(model), state_of(opt)
        if skip == "raise":
            with pytest.raises(st.NonFiniteError):
                opt.step(bad)
            assert same(opt.state_dict(), state)
        else:
            with pytest.warns(RuntimeWarning, match="skipped"):
                assert opt.step(bad) is None
        assert unchanged(model, before)
        opt.step(good)
        assert seen(opt).accepted


@pytest.mark.parametrize("max_primal", [0, 4096])
def test_the_engine_row_by_row_gives_the_same_steps(max_primal: int) -> None:
    found = []
    for reference in (False, True):
        model, (x, y) = mlp(2), data(6, 2)
        capture = st.ReferenceCapture(model) if reference else None
        opt = st.Sven(model, rows="residuals", solver=LM(max_primal=max_primal), capture=capture)
        for _ in range(5):
            opt.step(lambda m=model, x=x, y=y: m(x) - y)
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


def test_solve_is_the_first_untried_direction() -> None:
    model, (x, y) = mlp(), data(6)
    rows = residuals(model, x, y)
    jacobian = dense_jacobian(list(model.parameters()), rows)
    capture = st.Capture(model)
    with capture:
        again = residuals(model, x, y)
    solution = LM(damping=0.2).solve(capture.jacobian(again), rows.detach())
    normal = jacobian.T @ jacobian
    scaled = 0.2 * torch.diag(torch.where(normal.diagonal() > 0, normal.diagonal(), 1))
    want = torch.linalg.solve(normal + scaled, jacobian.T @ rows.detach())
    torch.testing.assert_close(flat(list(solution.direction().values())), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_resumed_run_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    def build() -> tuple[nn.Module, st.Sven]:
        model, _, _ = curve()
        model = model.to(dtype)
        return model, st.Sven(model, rows="residuals", solver=LM())

    _, x, y = curve()
    x, y = x.to(dtype), y.to(dtype)
    model, opt = build()
    for _ in range(5):
        opt.step(lambda: model(x).squeeze(1) - y)
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state_of(opt))
    for _ in range(5):
        opt.step(lambda: model(x).squeeze(1) - y)
        resumed.step(lambda: other(x).squeeze(1) - y)
    assert torch.equal(flat(model), flat(other))
    assert same(opt.state_dict(), resumed.state_dict())


def test_nothing_is_warned_of_on_the_way() -> None:
    model, x, y = curve()
    opt = st.Sven(model, rows="residuals", solver=LM())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: model(x).squeeze(1) - y)
    assert opt.defaults["lr"] == 1.0


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"damping": 0.0}, "damping=0.0"),
    ({"increase": 1.0}, "increase=1.0"),
    ({"decrease": 0.0}, "decrease=0.0"),
    ({"max_primal": -1}, "max_primal=-1"),
    ({"max_trials": 0}, "max_trials=0"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=message):
        LM(**options)

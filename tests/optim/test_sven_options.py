"""What Sven is by default, weights of blocks, and momentum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
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


def problem(step: int = 0, rows: int = 8) -> tuple[Tensor, Tensor]:
    x, _ = data(rows, seed=step)
    return x, x.sum(1).sin() + 1


def trained(options: dict[str, Any], output: Callable[[nn.Module, int], Any], steps: int = 4) -> Tensor:
    model = mlp()
    opt = st.Sven(model, **options)
    for step in range(steps):
        opt.step(lambda step=step: output(model, step))
    return flat(model)


def losses(model: nn.Module, step: int) -> Tensor:
    return residuals(model, *problem(step)).square()


def signed(model: nn.Module, step: int) -> Tensor:
    return residuals(model, *problem(step))


# ---- defaults


@pytest.mark.parametrize("rows", ["losses", "residuals"])
def test_by_default_small_models_remember_all_batches(rows: str) -> None:
    """The Kalman filter, roots of losses, whole steps, and no decay."""
    output = losses if rows == "losses" else signed
    options = {"lr": 1.0, "kappa": 1.0, "solver": st.KalmanFilter(), "metric": None, "relative_decay": 0.0}
    assert torch.equal(trained({"rows": rows}, output), trained({"rows": rows, **options}, output))
    others = {"kappa": 2.0, "lr": 0.5, "solver": st.KalmanFilter(noise=6.0), "relative_decay": 1e-3}
    for name, other in others.items():
        if (name, rows) != ("kappa", "residuals"):
            changed = trained({"rows": rows, **options, name: other}, output)
            assert not torch.equal(trained({"rows": rows}, output), changed), name


@pytest.mark.parametrize(
    ("options", "small"),
    [
        ({}, True),
        ({"rows": "residuals", "lr": 0.5, "weight_decay": 0.1, "max_norm_ratio": None, "samples_per_row": 1}, True),
        ({"momentum": 0.5}, False),
        ({"fraction": 0.5}, False),
        ({"max_norm_ratio": 3.0}, False),
        ({"metric": None}, False),
        ({"metric": st.KroneckerMetric()}, False),
    ],
    ids=str,
)
def test_whoever_asks_for_more_gets_the_solver_that_takes_it(options: dict[str, Any], small: bool) -> None:
    assert isinstance(st.Sven(mlp(), **options).solver, st.KalmanFilter if small else st.LeaveOneOut)


def test_small_is_what_sven_trains() -> None:
    model = nn.Sequential(nn.Linear(200, 5), nn.Linear(5, 3))
    assert isinstance(st.Sven(model).solver, st.KalmanFilter)  # 1,023 parameters
    wider = nn.Sequential(nn.Linear(200, 5), nn.Linear(5, 4))
    assert isinstance(st.Sven(wider).solver, st.LeaveOneOut)
    groups = [{"params": wider[0].parameters(), "method": "adamw"}, {"params": wider[1].parameters()}]
    assert isinstance(st.Sven(wider, params=groups).solver, st.KalmanFilter)


@pytest.mark.usefixtures("no_model_is_small")
@pytest.mark.parametrize("rows", ["losses", "residuals"])
def test_by_default_the_batch_decides(rows: str) -> None:
    """Leave-one-out in the metric, roots of losses, whole solutions, and some decay."""
    output = losses if rows == "losses" else signed
    options = {
        "lr": 1.0, "kappa": 1.0, "solver": st.LeaveOneOut(), "metric": st.KroneckerMetric(), "relative_decay": 2e-3,
    }  # fmt: skip
    assert torch.equal(trained({"rows": rows}, output), trained({"rows": rows, **options}, output))
    others = {"kappa": 2.0, "metric": None, "lr": 0.5, "solver": st.LeaveOneOut(decay=0.5), "relative_decay": 0.0}
    for name, other in others.items():
        if (name, rows) != ("kappa", "residuals"):
            changed = trained({"rows": rows, **options, name: other}, output)
            assert not torch.equal(trained({"rows": rows}, output), changed), name


def test_a_solver_of_ones_own_has_the_papers_rows_and_the_euclidean_norm() -> None:
    given_ = {"solver": st.TruncatedEigh(rtol=1e-3)}
    want = trained({**given_, "lr": 0.1, "kappa": 2.0, "metric": None}, losses)
    assert torch.equal(trained(given_, losses), want)


def test_the_rate_follows_from_the_solver_and_a_given_one_stays() -> None:
    finding = dict.fromkeys((None, st.LeaveOneOut(), st.LevenbergMarquardt(), st.KalmanFilter()), 1.0)
    rates = {**finding, st.Damped(): 0.1, st.TruncatedSVD(): 0.1}
    for solver, rate in rates.items():
        assert st.Sven(mlp(), solver=solver).param_groups[0]["lr"] == rate
        assert st.Sven(mlp(), solver=solver, lr=0.3).param_groups[0]["lr"] == 0.3


def test_a_fraction_has_no_metric_of_its_own_accord_and_none_on_request() -> None:
    model = mlp()
    opt = st.Sven(model, fraction=0.5)
    opt.step(lambda: losses(model, 0))
    assert not any("metric" in state for state in opt.state.values())
    with pytest.raises(st.InvalidOptionError, match=r"with fraction=0\.5.*drop one of the two"):
        st.Sven(model, fraction=0.5, metric=st.KroneckerMetric())


def test_it_learns_from_noisy_batches_without_a_rate_to_tune() -> None:
    model = mlp()
    opt = st.Sven(model)
    generator = torch.Generator().manual_seed(0)
    test, truth = problem(999, 200)
    before = float(residuals(model, test, truth).detach().square().mean())
    for step in range(60):
        x, y = problem(step, 24)
        noisy = y + 0.2 * torch.randn(len(y), generator=generator, dtype=DOUBLE)
        opt.step(lambda x=x, y=noisy: residuals(model, x, y).square())
    assert float(residuals(model, test, truth).detach().square().mean()) < 0.05 * before


# ---- weights of blocks


def blocks(model: nn.Module, step: int) -> dict[str, Tensor]:
    x, y = problem(step)
    return {"inner": model(x[:5]).squeeze(1) - y[:5], "edge": model(x[5:]).squeeze(1) - y[5:], "third": model(x[:2])}


def squared(model: nn.Module, step: int) -> dict[str, Tensor]:
    return {name: block.square().flatten() for name, block in blocks(model, step).items()}


SOLVERS = [None, st.Damped(0.1), st.LevenbergMarquardt(), st.KalmanFilter()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("rows", ["losses", "residuals"])
def test_a_weight_multiplies_the_loss_of_its_block(rows: str, solver: Any) -> None:
    """To the bit what the closure would return with the factors in it; powers of four have exact roots."""
    weights = {"inner": 4.0, "edge": 0.25}
    output = squared if rows == "losses" else blocks

    def scaled(model: nn.Module, step: int) -> dict[str, Tensor]:
        power = 1.0 if rows == "losses" else 0.5
        return {n: block * weights.get(n, 1.0) ** power for n, block in output(model, step).items()}

    options = {"rows": rows, "solver": solver}
    want = trained(options, scaled)
    assert torch.equal(trained({**options, "weights": weights}, output), want)
    assert not torch.equal(trained(options, output), want)
    model, twin = mlp(), mlp()
    found = st.Sven(model, **options, weights=weights).step(lambda: output(model, 0))
    assert torch.equal(found, st.Sven(twin, **options).step(lambda: scaled(twin, 0)))


def test_a_weight_of_zero_is_no_block() -> None:
    found = []
    for weights, kept in (({"edge": 0.0, "third": 0.0}, ("inner", "edge", "third")), ({}, ("inner",))):
        options = {"rows": "residuals", "weights": weights, "max_norm_ratio": None, "solver": st.TruncatedEigh()}
        found.append(trained(options, lambda m, s, kept=kept: {n: blocks(m, s)[n] for n in kept}, 1))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["tensor", "other names"])
def test_a_weight_without_its_block_is_told(kind: str) -> None:
    model = mlp()
    opt = st.Sven(model, rows="residuals", weights={"wall": 2.0})
    before = snapshot(model)
    found = "no named blocks" if kind == "tensor" else "the blocks 'inner', 'edge', 'third'"
    with pytest.raises(st.ClosureError, match=f"a weight for 'wall', and the closure returned {found}"):
        opt.step(lambda: signed(model, 0) if kind == "tensor" else blocks(model, 0))
    assert unchanged(model, before)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "much"])
def test_impossible_weights_are_refused_by_name(weight: Any) -> None:
    with pytest.raises(st.InvalidOptionError, match=r"weights\['edge'\]"):
        st.Sven(mlp(), weights={"edge": weight})


# ---- momentum


def spring(mu: float, damping: float, lr: float, steps: int) -> Tensor:
    """phi_k = argmin |J phi - R|^2 + lambda |phi - mu phi_(k-1)|^2, theta <- theta - lr phi, all of it dense."""
    model = mlp()
    phi = torch.zeros_like(flat(model))
    for step in range(steps):
        rows = signed(model, step)
        jacobian = dense_jacobian(list(model.parameters()), rows)
        normal, rhs = jacobian.T @ jacobian, jacobian.T @ rows.detach()
        absolute = damping * float((jacobian @ jacobian.T).trace()) / len(rows)
        eye = torch.eye(len(phi), dtype=DOUBLE)
        phi = torch.linalg.solve(normal + absolute * eye, rhs + absolute * mu * phi)
        nn.utils.vector_to_parameters(flat(model) - lr * phi, model.parameters())
    return flat(model)


@given(mu=some.floats(0.0, 0.99), damping=some.floats(1e-3, 10.0))
def test_momentum_is_that_of_spring(mu: float, damping: float) -> None:
    options = {"rows": "residuals", "solver": st.Damped(damping), "momentum": mu, "lr": 0.3, "max_norm_ratio": None}
    torch.testing.assert_close(trained(options, signed, 4), spring(mu, damping, 0.3, 4), rtol=1e-6, atol=1e-8)


def test_momentum_in_the_metric_forgets_nothing_of_the_step_before() -> None:
    """Where the damping is huge the conditions say nothing new, and the step is mu times the one before."""
    model = mlp()
    opt = st.Sven(model, rows="residuals", lr=0.1, momentum=0.5, metric=st.KroneckerMetric(), solver=st.Damped(0.1))
    opt.step(lambda: signed(model, 0))
    first = torch.cat([opt.state[p]["direction"].flatten() for p in model.parameters()])
    opt.solver = st.Damped(1e12)
    before = flat(model)
    opt.step(lambda: signed(model, 1))
    torch.testing.assert_close(before - flat(model), 0.1 * 0.5 * first, rtol=1e-8, atol=1e-10)


def test_momentum_of_the_row_by_row_engine_is_the_same() -> None:
    found = []
    for reference in (False, True):
        model = mlp()
        capture = st.ReferenceCapture(model) if reference else None
        opt = st.Sven(model, rows="residuals", momentum=0.7, metric=None, capture=capture)
        for step in range(4):
            opt.step(lambda m=model, step=step: signed(m, step))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


def test_momentum_with_a_fraction_moves_the_rows_of_this_step_alone() -> None:
    model = mlp()
    opt = st.Sven(model, rows="residuals", momentum=0.7, fraction=0.5, solver=st.Damped(0.1))
    last = torch.zeros(8, 3, dtype=DOUBLE)
    for step in range(4):
        before = flat(model)
        opt.step(lambda step=step: signed(model, step))
        moved = (before - flat(model))[:24].view(8, 3) != 0
        assert moved.all(1).sum() == 4
        assert torch.equal(moved.all(1), moved.any(1))
        kept = opt.state[model[0].weight]["direction"]
        assert torch.equal(kept != 0, moved)
        assert not torch.equal(kept, last)
        last = kept


def test_a_momentum_that_leads_nowhere_is_given_up() -> None:
    model = mlp()
    opt = st.Sven(model, rows="residuals", momentum=0.9)
    opt.step(lambda: signed(model, 0))
    assert all("direction" in opt.state[p] for p in model.parameters())
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return signed(model, 0) + (0 if len(calls) == 1 else 100)

    opt.step(closure)
    assert not seen(opt).accepted
    assert not any("direction" in opt.state[p] for p in model.parameters())


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_impossible_momenta_are_refused(momentum: float) -> None:
    with pytest.raises(st.InvalidOptionError, match="momentum"):
        st.Sven(mlp(), momentum=momentum)


@pytest.mark.parametrize("metric", ["kronecker", 3, st.KroneckerMetric])
def test_impossible_metrics_are_refused(metric: Any) -> None:
    with pytest.raises(st.InvalidOptionError, match=r"give steepest\.KroneckerMetric"):
        st.Sven(mlp(), metric=metric)


# ---- all of them together


EVERYTHING: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.6},
    "levenberg": {"solver": st.LevenbergMarquardt(), "metric": st.KroneckerMetric(), "momentum": 0.6},
    "damped": {"solver": st.Damped(), "metric": st.KroneckerMetric(), "lr": 0.5},
}


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_steps_that_are_not_finite_are_skipped_and_change_nothing(options: dict[str, Any], bad: float) -> None:
    model = mlp()
    opt = st.Sven(model, rows="residuals", on_nonfinite="skip", weights={"inner": 2.0}, **options)
    opt.step(lambda: blocks(model, 0))
    before, state = snapshot(model), state_of(opt)
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert opt.step(lambda: {n: b * bad for n, b in blocks(model, 1).items()}) is None
    assert unchanged(model, before)
    state["state"][0]["num_skipped"] = 1
    assert same(opt.state_dict(), state)
    opt.step(lambda: blocks(model, 1))
    assert seen(opt).num_skipped == 1


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("after", [0, 3])
def test_gradients_that_are_not_finite_are_skipped_too(options: dict[str, Any], after: int) -> None:
    """Of finite rows, at the first step and after others, whether or not the metric is renewed by them."""
    model = mlp()
    opt = st.Sven(model, rows="residuals", on_nonfinite="skip", **options)
    for step in range(after):
        opt.step(lambda step=step: signed(model, step))

    def steep() -> Tensor:
        rows = signed(model, 9)
        return torch.where(torch.arange(len(rows)) == 1, (rows - rows.detach()).sqrt(), rows)

    before = snapshot(model)
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert opt.step(steep) is None
    assert unchanged(model, before)
    opt.step(lambda: signed(model, 9))
    assert not unchanged(model, before)


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
def test_an_update_that_overflows_is_refused_or_not_taken(options: dict[str, Any]) -> None:
    model = mlp()
    opt = st.Sven(model, rows="residuals", **{**options, "lr": 1e308}, max_norm_ratio=None)
    before = snapshot(model)
    try:
        opt.step(lambda: signed(model, 0) * 1e20)
    except st.NonFiniteError:
        assert opt.state_dict()["state"] == {}
    else:
        assert not seen(opt).accepted
    assert unchanged(model, before)


def test_a_memory_that_lacks_what_a_newer_version_keeps_is_taken_up() -> None:
    model = mlp()
    opt = st.Sven(model)
    opt.step(lambda: losses(model, 0))
    saved = state_of(opt)
    del saved["state"][0]["solver"]
    other = st.Sven(model)
    other.load_state_dict(saved)
    other.step(lambda: losses(model, 1))
    assert other.state_dict()["state"][0]["step"] == 2


def test_a_solver_assigned_between_steps_is_used_from_then_on() -> None:
    """As one that was there from the beginning; what another kind has learnt is forgotten."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, dtype=torch.float64)

    def trained(first: st.optim.Solver, *others: st.optim.Solver) -> Tensor:
        model = copy.deepcopy(start)
        opt = st.Sven(model, lr=0.5, rows="residuals", solver=first, metric=None)
        for solver in (None, *others):
            if solver is not None:
                opt.solver = solver
                assert opt.solver is solver
            opt.step(lambda: model(x).squeeze(1) - y)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    tight, loose = st.TruncatedEigh(rtol=1e-6), st.TruncatedEigh(rtol=0.3)
    assert not torch.allclose(trained(tight, loose), trained(tight, tight))
    torch.testing.assert_close(trained(tight, tight), trained(st.TruncatedEigh(rtol=1e-6), tight))
    trained(st.LevenbergMarquardt(), st.LeaveOneOut(), st.KalmanFilter(), st.LevenbergMarquardt(), tight)
    opt = st.Sven(copy.deepcopy(start))
    with pytest.raises(st.errors.InvalidOptionError, match="give a solver object"):
        opt.solver = 0.1  # type: ignore[assignment]

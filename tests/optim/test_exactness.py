"""Sven against mathematics: least squares, Kaczmarz, the singular value decomposition, its own other forms."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st

SOLVERS = {
    "eigh_dual": st.TruncatedEigh(rtol=0, form="dual"),
    "eigh_primal": st.TruncatedEigh(rtol=0, form="primal"),
    "svd": st.TruncatedSVD(rtol=0),
    "randomized": st.RandomizedSVD(rank=64, rtol=0),
}


def linear_problem(rows: int, features: int, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Linear(features, 1, bias=False, dtype=torch.float64)
    return model, torch.randn(rows, features, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)


def mlp_problem(rows: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return model, torch.randn(rows, 3, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dense_jacobian(model: nn.Module, rows: Tensor) -> Tensor:
    grads = [torch.autograd.grad(row, list(model.parameters()), retain_graph=True) for row in rows]
    return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])


def step_taken(model: nn.Module, opt: st.Sven, closure) -> Tensor:
    before = flat(model)
    opt.step(closure)
    return before - flat(model)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize(("rows", "features"), [(5, 12), (12, 5), (7, 7)], ids=["wide", "tall", "square"])
def test_linear_model_is_solved_in_one_step(solver: st.optim.Solver, rows: int, features: int) -> None:
    """Full rank, lr 1: the minimum-norm least-squares solution of torch.linalg.lstsq, residual 0 where it exists."""
    model, x, y = linear_problem(rows, features)
    start = flat(model)
    opt = st.Sven(model, lr=1.0, rows="residuals", solver=solver, max_norm_ratio=None)
    opt.step(lambda: model(x).squeeze(1) - y)
    correction = torch.linalg.lstsq(x, (y - x @ start).unsqueeze(1), driver="gelsd").solution.squeeze(1)
    torch.testing.assert_close(flat(model), start + correction, rtol=1e-8, atol=1e-8)
    if rows <= features:
        assert (model(x).squeeze(1) - y).abs().max() < 1e-8


def test_a_batch_of_one_is_a_kaczmarz_step() -> None:
    model, x, y = linear_problem(1, 4)
    start = flat(model)
    opt = st.Sven(model, lr=1.0, rows="residuals", solver=st.TruncatedEigh(rtol=0), max_norm_ratio=None)
    opt.step(lambda: model(x).squeeze(1) - y)
    kaczmarz = start - (x[0] @ start - y[0]) / x[0].square().sum() * x[0]
    torch.testing.assert_close(flat(model), kaczmarz)


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("form", ["dual", "primal", "svd", "randomized"])
def test_rank_k_is_the_k_term_update(form: str, rank: int | None, exponent: float) -> None:
    model, x, y = mlp_problem()
    residuals = model(x).squeeze(1) - y
    left, values, right = torch.linalg.svd(dense_jacobian(model, residuals), full_matrices=False)
    kept = len(values) if rank is None else rank
    weights = values[:kept] ** -exponent * (left.T @ residuals.detach())[:kept]
    expected = weights @ right[:kept]
    solver: st.optim.Solver
    if form == "svd":
        solver = st.TruncatedSVD(rank=rank, rtol=0, exponent=exponent)
    elif form == "randomized":
        solver = st.RandomizedSVD(rank=kept, rtol=0, exponent=exponent, power_iterations=8)
    else:
        solver = st.TruncatedEigh(rank=rank, rtol=0, exponent=exponent, form=form)
    opt = st.Sven(model, lr=1.0, rows="residuals", solver=solver, max_norm_ratio=None)
    taken = step_taken(model, opt, lambda: model(x).squeeze(1) - y)
    torch.testing.assert_close(taken, expected, rtol=1e-7, atol=1e-9)
    assert opt.diagnostics is not None
    assert opt.diagnostics.rank == kept
    torch.testing.assert_close(opt.diagnostics.spectrum[:kept], values[:kept], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("relative_to", ["mean", "max"])
@pytest.mark.parametrize("form", ["auto", "dual", "primal"])
def test_damped_is_tikhonov(form: str, relative_to: str, exponent: float) -> None:
    model, x, y = mlp_problem()
    residuals = model(x).squeeze(1) - y
    left, values, right = torch.linalg.svd(dense_jacobian(model, residuals), full_matrices=False)
    scale = values.square().mean() if relative_to == "mean" else values[0].square()
    damped = values * (values.square() + 0.03 * scale) ** (-(1 + exponent) / 2)
    expected = (damped * (left.T @ residuals.detach())) @ right
    solver = st.Damped(0.03, relative_to=relative_to, exponent=exponent, form=form)
    opt = st.Sven(model, lr=1.0, rows="residuals", solver=solver, max_norm_ratio=None)
    taken = step_taken(model, opt, lambda: model(x).squeeze(1) - y)
    torch.testing.assert_close(taken, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kappa", [2.0, 1.0, 0.5])
def test_rows_of_losses_are_their_power(kappa: float) -> None:
    model, x, y = mlp_problem()
    rows = (model(x).squeeze(1) - y).square() ** (kappa / 2)
    expected = torch.linalg.pinv(dense_jacobian(model, rows)) @ rows.detach()
    opt = st.Sven(model, lr=1.0, kappa=kappa, solver=st.TruncatedEigh(rtol=0), max_norm_ratio=None)
    taken = step_taken(model, opt, lambda: (model(x).squeeze(1) - y).square())
    torch.testing.assert_close(taken, expected, rtol=1e-7, atol=1e-9)


def test_untruncated_kappa_two_is_half_the_residual_step() -> None:
    """Rows l = r^2 have J = 2 diag(r) J_r: without truncation the step is that of the residuals at half the lr."""
    steps = []
    for rows, lr in (("losses", 1.0), ("residuals", 0.5)):
        model, x, y = mlp_problem()
        opt = st.Sven(model, lr=lr, rows=rows, solver=st.TruncatedEigh(rtol=0), max_norm_ratio=None)
        power = 2 if rows == "losses" else 1
        steps.append(step_taken(model, opt, lambda m=model, x=x, y=y, k=power: (m(x).squeeze(1) - y) ** k))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kappa", [1.0, 0.5])
def test_a_loss_of_zero_is_a_condition_that_holds(kappa: float) -> None:
    model, x, _ = mlp_problem()
    y = model(x).squeeze(1).detach().clone()
    y[1:] += 1.0
    opt = st.Sven(model, lr=0.1, kappa=kappa, solver=st.TruncatedEigh(rtol=1e-3))
    before = flat(model)
    opt.step(lambda: (model(x).squeeze(1) - y).square())
    assert torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("options", [{}, {"solver": st.TruncatedEigh(rtol=1e-3)}], ids=["default", "eigh"])
def test_permuting_the_samples_permutes_the_rows(options: dict[str, Any]) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    taken = []
    for index in (torch.arange(6), order):
        model, x, y = mlp_problem()
        opt = st.Sven(model, lr=1.0, **options)
        taken.append(step_taken(model, opt, lambda m=model, x=x[index], y=y[index]: (m(x).squeeze(1) - y).square()))
    torch.testing.assert_close(taken[0], taken[1], rtol=1e-7, atol=1e-10)


def test_named_blocks_are_stacked_conditions() -> None:
    model, x, y = mlp_problem()
    opt = st.Sven(model, lr=1.0, rows="residuals", solver=st.TruncatedEigh(rtol=0), max_norm_ratio=None)
    joined = step_taken(model, opt, lambda: model(x).squeeze(1) - y)
    model, x, y = mlp_problem()
    opt = st.Sven(model, lr=1.0, rows="residuals", solver=st.TruncatedEigh(rtol=0), max_norm_ratio=None)
    blocks = step_taken(
        model,
        opt,
        lambda: {"inner": model(x[:4]).squeeze(1) - y[:4], "boundary": model(x[4:]).squeeze(1) - y[4:]},
    )
    torch.testing.assert_close(blocks, joined, rtol=1e-8, atol=1e-10)
    assert opt.diagnostics is not None
    assert opt.diagnostics.rows == 6


def test_samples_per_row_averages_before_the_power() -> None:
    model, x, y = mlp_problem(8)
    rows = (model(x).squeeze(1) - y).square().view(4, 2).mean(1).sqrt()
    expected = torch.linalg.pinv(dense_jacobian(model, rows)) @ rows.detach()
    opt = st.Sven(model, lr=1.0, kappa=1.0, samples_per_row=2, solver=st.TruncatedEigh(rtol=0), max_norm_ratio=None)
    taken = step_taken(model, opt, lambda: (model(x).squeeze(1) - y).square())
    torch.testing.assert_close(taken, expected, rtol=1e-7, atol=1e-9)


def test_a_fraction_solves_with_the_chosen_output_rows_alone() -> None:
    model, x, y = mlp_problem()
    residuals = model(x).squeeze(1) - y
    jacobian = dense_jacobian(model, residuals)
    opt = st.Sven(model, lr=1.0, rows="residuals", solver=st.TruncatedEigh(rtol=0), fraction=0.5, max_norm_ratio=None)
    taken = step_taken(model, opt, lambda: model(x).squeeze(1) - y)
    changed = taken != 0
    weight, bias = changed[:24].view(8, 3), changed[24:32]
    assert torch.equal(weight.all(1), weight.any(1))  # whole output rows
    assert torch.equal(weight.any(1), bias)  # and the bias with them
    assert bias.sum() == 4
    expected = torch.zeros_like(taken)
    expected[changed] = torch.linalg.pinv(jacobian[:, changed]) @ residuals.detach()
    torch.testing.assert_close(taken, expected, rtol=1e-6, atol=1e-9)
    again = step_taken(model, opt, lambda: model(x).squeeze(1) - y)
    assert not torch.equal(again != 0, changed)  # other rows in the next step


def test_float32_gram_by_name_has_a_floor() -> None:
    """Two nearly equal rows: their difference is above the float64 floor and below the float32 one."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    x = torch.randn(1, 4).repeat(2, 1)
    x[1, 0] += 1e-4
    spectra = {}
    for precision in ("float64", "float32"):
        opt = st.Sven(model, lr=0.0, rows="residuals", solver=st.TruncatedEigh(rtol=0, precision=precision))
        opt.step(lambda: model(x).squeeze(1))
        assert opt.diagnostics is not None
        spectra[precision] = opt.diagnostics
    true = torch.linalg.svdvals(x.double())
    torch.testing.assert_close(spectra["float64"].spectrum, true, rtol=1e-2, atol=0)
    assert spectra["float32"].noise_floor > float(true[1] / true[0]) > spectra["float64"].noise_floor

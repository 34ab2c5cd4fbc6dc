"""FOP's projection against dense matrices and the definitions of arXiv 2508.13898."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as hs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.errors import InvalidOptionError
from steepest.linalg.decompositions import Decomposition, Placed
from steepest.linalg.kronecker import Cholesky, Eigenbasis, EigenbasisCorrected, KroneckerSolver
from steepest.optim.projection import Projection, project, project_gradients

EIGENBASIS = Eigenbasis()
SOLVERS = [EIGENBASIS, EigenbasisCorrected(), Cholesky()]
N, M, DAMPING = 3, 4, 0.1
METRICS = ["damped", "undamped"]
GRADIENTS = hs.integers(0, 999)
fewer = settings(max_examples=30)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_matrices(block: Decomposition, damping: float) -> tuple[Tensor, Tensor]:
    """M and F by the images of every unit gradient: tested against torch.kron elsewhere."""
    units = torch.eye(N * M, dtype=torch.float64).reshape(-1, N, M)
    vectors = [block.place(unit, damping).vector for unit in units]
    images = [[block.image(v, damping, damped=damped) for v in vectors] for damped in (True, False)]
    first, second = (torch.stack([torch.stack([(v * y).sum() for y in ys]) for v in vectors]) for ys in images)
    return first, second


class Case:
    """Two gradients of one block, and the dense truth about them."""

    def __init__(
        self, seed: int, solver: KroneckerSolver = EIGENBASIS, metric: str = "damped", damping: float = DAMPING
    ) -> None:
        x, g = draw(9, M, seed=seed) * torch.linspace(0.3, 2, M, dtype=torch.float64), draw(9, N, seed=seed + 1)
        self.block = solver.decompose(x.T @ x / 9, g.T @ g / 9, damping)
        self.block = self.block.observed(x.unsqueeze(1), g.unsqueeze(1), 0.5)
        self.damping, self.metric = damping, metric
        self.first, self.second = draw(N, M, seed=seed + 2), draw(N, M, seed=seed + 3)
        self.M, self.F = dense_matrices(self.block, damping)
        self.inverse = torch.linalg.inv(self.M)

    def project(self, first: Tensor | None = None, second: Tensor | None = None, **options: Any) -> Projection:
        first = self.first if first is None else first
        second = self.second if second is None else second
        return self.run((first + second) / 2, first - second, **options)[1]

    def run(self, mean: Tensor, difference: Tensor, **options: Any) -> tuple[Tensor, Projection]:
        return project_gradients(self.block, mean, difference, self.damping, metric=self.metric, **options)

    def combined(self, found: Projection) -> Tensor:
        """g_comb as a flat gradient: M times its solution."""
        return self.M @ self.block.direction(found.dual).flatten()

    def perpendicular(self, found: Projection) -> Tensor:
        """g_perp as a flat gradient."""
        return self.difference - found.s * self.mean

    @property
    def mean(self) -> Tensor:
        return ((self.first + self.second) / 2).flatten()

    @property
    def difference(self) -> Tensor:
        return (self.first - self.second).flatten()


def truth(case: Case) -> dict[str, Tensor]:
    """Every number of FOP from its definition, on flat vectors."""
    metric = case.M if case.metric == "damped" else case.F
    mean, difference = case.mean, case.difference
    s = (difference @ metric @ mean) / (mean @ metric @ mean)
    perp = difference - s * mean
    beta = (mean @ case.inverse @ perp) / (perp @ case.inverse @ perp)
    combined = mean + beta * perp
    eta = (mean @ case.inverse @ combined) / (combined @ case.inverse @ combined)
    r = (mean @ case.inverse @ perp) ** 2 / ((mean @ case.inverse @ mean) * (perp @ case.inverse @ perp))
    correction = beta.abs() * perp.norm() / mean.norm()
    numbers = {"s": s, "beta": beta, "eta": eta, "r": r, "correction": correction}
    return {**numbers, "perp": perp, "combined": combined, "direction": eta * case.inverse @ combined}


@fewer
@given(seed=GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_number_is_that_of_its_definition(solver: KroneckerSolver, metric: str, seed: int) -> None:
    case = Case(seed, solver, metric)
    expected = truth(case)
    direction, found = case.run(case.mean.reshape(N, M), case.difference.reshape(N, M))
    assert found.gate
    for name in ("s", "beta", "eta", "r", "correction"):
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(case.perpendicular(found), expected["perp"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(case.combined(found), expected["combined"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(direction.flatten(), expected["direction"], rtol=1e-6, atol=1e-7)
    assert found.eta * 2 == case.project(total="sum").eta


@fewer
@given(seed=GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_perpendicular_part_is_perpendicular_in_the_metric(metric: str, seed: int) -> None:
    case = Case(seed, metric=metric)
    matrix = case.M if metric == "damped" else case.F
    perp = case.perpendicular(case.project())
    scale = (perp @ matrix @ perp).sqrt() * (case.mean @ matrix @ case.mean).sqrt()
    assert abs(case.mean @ matrix @ perp) < 1e-9 * scale


@fewer
@given(seed=GRADIENTS)
@pytest.mark.parametrize("total", ["mean", "sum"])
def test_beta_and_eta_are_the_best_of_their_quadratics(total: str, seed: int) -> None:
    """Beta is the best scale of g_perp to fit g_avg, eta the best length of M^-1 g_comb in the quadratic model."""
    case = Case(seed)
    found = case.project(total=total)
    perp, combined = case.perpendicular(found), case.combined(found)
    target = case.mean * (2 if total == "sum" else 1)

    def misfit(beta: Tensor) -> Tensor:
        rest = case.mean - beta * perp
        return rest @ case.inverse @ rest

    def model(eta: Tensor) -> Tensor:
        step = -eta * case.inverse @ combined
        return target @ step + step @ case.M @ step / 2

    for value, quadratic in ((found.beta, misfit), (found.eta, model)):
        best = quadratic(value)
        for factor in (0.9, 0.999, 1.001, 1.1, -1.0):
            assert quadratic(factor * value) >= best - 1e-9 * best.abs()
        assert quadratic(1.1 * value + 0.1) > best


@fewer
@given(seed=GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_length_of_the_combined_gradient_is_a_function_of_r(
    solver: KroneckerSolver, metric: str, seed: int
) -> None:
    case = Case(seed, solver, metric)
    direction, found = case.run(case.mean.reshape(N, M), case.difference.reshape(N, M))
    combined, r = case.combined(found), found.r
    ratio = ((combined @ case.inverse @ combined) / (case.mean @ case.inverse @ case.mean)).sqrt()
    torch.testing.assert_close(ratio, (1 + 3 * r).sqrt(), rtol=1e-7, atol=0)
    assert 1 - 1e-9 <= ratio <= 2 + 1e-9
    torch.testing.assert_close(found.eta, (1 + r) / (1 + 3 * r))
    assert 0.5 - 1e-9 <= found.eta <= 1
    assert case.mean @ direction.flatten() > 0, "no descent direction"
    decrease = case.mean @ case.inverse @ case.mean / 2
    step = -direction.flatten()
    share = -(case.mean @ step + step @ case.M @ step / 2) / decrease
    assert 8 / 9 - 1e-9 <= share <= 1 + 1e-9, "share of KFAC's decrease of the quadratic model"


@fewer
@given(seed=GRADIENTS, scale=hs.floats(-8, 8).map(lambda e: 10**e), sign=hs.sampled_from([-1, 1]))
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_swapping_and_rescaling_the_difference_change_nothing(
    solver: KroneckerSolver, seed: int, scale: float, sign: int
) -> None:
    """A difference of 1e-8 gives the same correction: it does not vanish as the gradients meet."""
    assume(scale > 1e-7)  # below, the gate closes
    case = Case(seed, solver)
    mean, difference = case.mean.reshape(N, M), case.difference.reshape(N, M)
    (expected, plain), (found, scaled) = case.run(mean, difference), case.run(mean, sign * scale * difference)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(scaled.r, plain.r, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(scaled.beta, sign * plain.beta / scale, rtol=1e-6, atol=1e-12 / scale)
    torch.testing.assert_close(case.project(case.second, case.first).dual, case.project().dual)


@fewer
@given(seed=GRADIENTS, exponent=hs.floats(-6, 6))
def test_the_whole_step_scales_with_the_gradients(seed: int, exponent: float) -> None:
    case, scale = Case(seed), 10**exponent
    expected, found = case.project(), case.project(scale * case.first, scale * case.second)
    torch.testing.assert_close(found.dual, scale * expected.dual, rtol=1e-9, atol=0)
    for name in ("s", "beta", "eta", "r", "correction"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_large_damping_gives_the_plain_gradient_only_in_the_damped_metric(solver: KroneckerSolver) -> None:
    cosines = {}
    for metric in METRICS:
        case = Case(3, solver, metric, damping=1e9)
        direction = case.run(case.mean.reshape(N, M), case.difference.reshape(N, M))[0].flatten()
        cosines[metric] = torch.cosine_similarity(1e9 * direction, case.mean, dim=0)
    assert cosines["damped"] > 1 - 1e-6
    assert cosines["undamped"] < 1 - 1e-3


def test_a_block_that_is_a_multiple_of_the_identity_gives_the_plain_gradient() -> None:
    block = Eigenbasis().decompose(torch.eye(M).double(), torch.eye(N).double(), 0.0)
    mean, difference = draw(N, M), draw(N, M, seed=1)
    direction, found = project_gradients(block, mean, difference, 1.0, metric="undamped")
    torch.testing.assert_close(direction, mean / 2)
    assert found.r < 1e-20


def degenerate(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    g, h = draw(N, M).to(dtype), draw(N, M, seed=1).to(dtype)
    huge, tiny = (1e24, 1e-24) if dtype == torch.float32 else (1e250, 1e-250)
    nearly = g * (1 + 4 * torch.finfo(dtype).eps * h.sign())
    one = torch.zeros_like(g)
    one[0, 0] = 1
    return {
        "equal": (g, g),
        "equal up to rounding": (g, nearly),
        "parallel": (g, 3 * g),
        "parallel up to rounding": (g, 3 * nearly),
        "opposite": (g, -g),
        "opposite up to rounding": (g, -nearly),
        "zero": (0 * g, 0 * g),
        "one zero": (g, 0 * g),
        "one huge": (huge * g, h),
        "both huge": (huge * g, huge * h),
        "both tiny": (tiny * g, tiny * h),
        "huge and tiny": (huge * g, tiny * h),
        "one entry": (one, 2 * one),
        "two entries": (one, one.flip(0)),
    }


CLOSED = ["equal", "equal up to rounding", "parallel", "parallel up to rounding", "zero", "one zero", "one entry"]


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", degenerate(torch.float64))
@pytest.mark.parametrize("rank", [0, 1, 9])
def test_degenerate_inputs_stay_finite(name: str, dtype: torch.dtype, damping: float, rank: int) -> None:
    """Also with a singular block (rank 0 and 1) and no damping."""
    x, g = draw(max(rank, 1), M, seed=4) * (rank > 0), draw(max(rank, 1), N, seed=5)
    solvers = [*SOLVERS] if damping >= 1e-3 else SOLVERS[:2]  # Cholesky needs its damping
    first, second = degenerate(dtype)[name]
    for solver in solvers:
        block = solver.decompose((x.T @ x).to(dtype), (g.T @ g).to(dtype), damping)
        for metric in METRICS:
            mean, difference = first / 2 + second / 2, first - second
            direction, found = project_gradients(block, mean, difference, damping, metric=metric)
            assert direction.isfinite().all()
            for field in fields(found):
                assert getattr(found, field.name).isfinite().all(), field.name
            assert 0.5 - 1e-5 <= found.eta <= 1
            assert 0 <= found.r <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_gate_is_the_kfac_step(name: str, solver: KroneckerSolver, metric: str, dtype: torch.dtype) -> None:
    case = Case(0, solver)
    tensors = {n: tensor.to(dtype) for n, tensor in case.block.tensors().items()}
    block = solver.restore(tensors)
    first, second = degenerate(dtype)[name]
    mean = (first + second) / 2
    direction, found = project_gradients(block, mean, first - second, DAMPING, metric=metric)
    assert not found.gate
    assert found.beta == found.r == found.correction == 0
    assert found.eta == 1
    assert torch.equal(direction, block.precondition(mean, DAMPING)), "not bit by bit"
    twice, _ = project_gradients(block, mean, first - second, DAMPING, metric=metric, total="sum")
    assert torch.equal(twice, 2 * direction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_and_tiny_gradients_are_combined_as_others_are(dtype: torch.dtype) -> None:
    case = Case(0)
    block = Eigenbasis().restore({n: tensor.to(dtype) for n, tensor in case.block.tensors().items()})
    cases = degenerate(dtype)
    for name, scale in (("both huge", cases["both huge"][0][0, 0] / draw(N, M)[0, 0]), ("both tiny", None)):
        first, second = cases[name]
        plain, other = draw(N, M).to(dtype), draw(N, M, seed=1).to(dtype)
        expected = project_gradients(block, (plain + other) / 2, plain - other, DAMPING)[1]
        found = project_gradients(block, first / 2 + second / 2, first - second, DAMPING)[1]
        assert found.gate
        torch.testing.assert_close(found.r, expected.r, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.beta, expected.beta, rtol=1e-4, atol=0)
        if scale is not None:
            wanted = expected.dual * scale
            torch.testing.assert_close(found.dual / scale, wanted / scale, rtol=1e-4, atol=1e-5)


@fewer
@given(seed=GRADIENTS)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_single_precision_is_close_to_double(solver: KroneckerSolver, seed: int) -> None:
    case = Case(seed, solver)
    block = solver.restore({n: tensor.float() for n, tensor in case.block.tensors().items()})
    mean, difference = case.mean.reshape(N, M), case.difference.reshape(N, M)
    expected, _ = case.run(mean, difference)
    found, _ = project_gradients(block, mean.float(), difference.float(), DAMPING)
    assert found.dtype == torch.float32
    assert torch.linalg.norm(found - expected) < 2e-3 * torch.linalg.norm(expected)


def test_half_precision_is_brought_to_single() -> None:
    case = Case(0)
    block = EIGENBASIS.restore({n: tensor.float() for n, tensor in case.block.tensors().items()})
    mean, difference = draw(N, M).bfloat16(), draw(N, M, seed=1).bfloat16()
    found, exact = (
        project_gradients(block, *g, DAMPING) for g in ((mean, difference), (mean.float(), difference.float()))
    )
    assert found[0].dtype == found[1].s.dtype == torch.float32
    assert torch.equal(found[0], exact[0])


def test_any_inner_product_will_do() -> None:
    """Nothing but vectors, duals and an image: here a plain diagonal metric without factors."""
    diagonal, mean, difference = draw(6).square() + 0.1, draw(6, seed=1), draw(6, seed=2)
    found = project(Placed(mean, mean / diagonal), Placed(difference, difference / diagonal), diagonal * mean)
    s = (difference * diagonal * mean).sum() / (mean * diagonal * mean).sum()
    perp = difference - s * mean
    torch.testing.assert_close(found.s, s)
    beta = (mean * perp / diagonal).sum() / (perp * perp / diagonal).sum()
    torch.testing.assert_close(found.dual, (mean + beta * perp) / diagonal)


def test_huge_negative_entries_count_as_huge_ones() -> None:
    block = EIGENBASIS.decompose(torch.eye(M), torch.eye(N), 0.0)
    mean, difference = (-1e30 * draw(N, M, seed=seed).float().abs() for seed in (1, 2))
    direction, found = project_gradients(block, mean, difference, 1.0)
    assert found.gate
    assert direction.isfinite().all()


def test_a_gradient_that_is_not_finite_is_passed_on() -> None:
    """The optimizer checks the update: a NaN must not be hidden by the gate."""
    case = Case(0)
    case.first[0, 0] = torch.nan
    direction, found = case.run(case.mean.reshape(N, M), case.difference.reshape(N, M))
    assert direction.isnan().any()
    assert not found.gate


def test_what_overflows_in_the_inner_products_or_in_the_difference_closes_the_gate() -> None:
    case = Case(0)
    block = EIGENBASIS.restore({n: tensor.float() for n, tensor in case.block.tensors().items()})
    mean, difference = (block.place(draw(N, M, seed=seed).float(), DAMPING) for seed in (0, 1))
    image = block.image(mean.vector, DAMPING)

    def times(placed: Placed, scale: float) -> Placed:
        return replace(placed, dual=scale * placed.dual)

    endless = Placed(difference.vector / 0, difference.dual / 0)
    for average, spread in ((times(mean, 1e38), times(difference, 1e38)), (mean, endless)):
        found = project(average, spread, image)
        assert not found.gate
        assert torch.equal(found.dual, average.dual)
    assert project(mean, difference, image).gate


def test_gradients_that_nearly_cancel_are_combined_as_others_are() -> None:
    case = Case(0)
    block = EIGENBASIS.restore({n: tensor.float() for n, tensor in case.block.tensors().items()})
    mean, difference = 1e-10 * draw(N, M).float(), 1e6 * draw(N, M, seed=1).float()
    direction, found = project_gradients(block, mean, difference, DAMPING)
    assert found.gate
    expected = project_gradients(block, 1e10 * mean, 1e-6 * difference, DAMPING)[0]
    torch.testing.assert_close(1e10 * direction, expected)


def test_options_are_checked() -> None:
    case = Case(0)
    with pytest.raises(InvalidOptionError, match="total='both'"):
        case.project(total="both")
    case.metric = "plain"
    with pytest.raises(InvalidOptionError, match="metric='plain'"):
        case.project()


class NoSync(TorchDispatchMode):
    """Refuse whatever would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_nothing_waits_for_the_device(solver: KroneckerSolver) -> None:
    case = Case(0, solver)
    damping = torch.tensor(DAMPING, dtype=torch.float64)
    with NoSync():
        project_gradients(case.block, case.first, case.second, damping)
    block = solver.restore({n: tensor.to("meta") for n, tensor in case.block.tensors().items()})
    direction, found = project_gradients(block, case.first.to("meta"), case.second.to("meta"), damping)
    assert direction.shape == (N, M)
    assert found.gate.shape == ()

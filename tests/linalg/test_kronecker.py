"""Kronecker blocks against dense matrices built by torch.kron."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as hs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.errors import InvalidOptionError
from steepest.linalg import factors
from steepest.linalg.decompositions import CorrectedEigen
from steepest.linalg.kronecker import (
    Cholesky,
    DecompositionError,
    Eigenbasis,
    EigenbasisCorrected,
    KroneckerSolver,
    damped_pi,
    second_moment,
)

SOLVERS = [Eigenbasis(), EigenbasisCorrected(), Cholesky()]
EIGEN = [Eigenbasis(), EigenbasisCorrected()]
N, M = 3, 4


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(n: int = N, m: int = M, *, samples: int = 9, positions: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs ``[N, T, m]`` of unequal scales and output gradients ``[N, T, n]``, correlated sample by sample."""
    x = draw(samples, positions, m, seed=seed) * torch.linspace(0.3, 2, m, dtype=torch.float64)
    return x, draw(samples, positions, n, seed=seed + 1) * (0.1 + x[..., :1].abs())


def kronecker_factors(n: int = N, m: int = M, *, samples: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, g = (t.flatten(0, 1) for t in layer(n, m, samples=samples, seed=seed))
    return x.T @ x / len(x), g.T @ g / len(g)


def vec(matrix: Tensor) -> Tensor:
    """Columns first, as A (x) S wants it."""
    return matrix.T.flatten()


def unvec(vector: Tensor, n: int, m: int) -> Tensor:
    return vector.reshape(m, n).T


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def dense_block(solver: KroneckerSolver, a: Tensor, s: Tensor, damping: float) -> Tensor:
    """The damped block that the solver stands for, from its definition."""
    if isinstance(solver, Cholesky):
        pi = ((a.trace() / len(a)) / (s.trace() / len(s))) ** 0.5
        return torch.kron(a + pi * damping**0.5 * eye(len(a)), s + damping**0.5 / pi * eye(len(s)))
    return torch.kron(a, s) + damping * eye(len(a) * len(s))


@given(n=hs.integers(1, 5), m=hs.integers(1, 5), seed=hs.integers(0, 99), exponent=hs.floats(-6, 3))
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_solve_is_the_dense_solve(solver: KroneckerSolver, n: int, m: int, seed: int, exponent: float) -> None:
    (a, s), damping = kronecker_factors(n, m, seed=seed), 10**exponent
    gradient = draw(n, m, seed=seed + 7)
    block = solver.decompose(a, s, damping)
    expected = unvec(torch.linalg.solve(dense_block(solver, a, s, damping), vec(gradient)), n, m)
    torch.testing.assert_close(block.precondition(gradient, damping), expected, rtol=1e-7, atol=1e-9)


@given(seed=hs.integers(0, 99), samples=hs.integers(1, 6))
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_inner_products_are_the_dense_ones(solver: KroneckerSolver, seed: int, samples: int) -> None:
    """Also where A and S are singular: few samples."""
    (a, s), damping = kronecker_factors(samples=samples, seed=seed), 0.1
    left, right = draw(N, M, seed=seed + 3), draw(N, M, seed=seed + 4)
    block, damped = solver.decompose(a, s, damping), dense_block(solver, a, s, damping)
    placed = [block.place(gradient, damping) for gradient in (left, right)]
    expected = vec(left) @ torch.linalg.solve(damped, vec(right))
    for pa, pb in (placed, placed[::-1]):
        torch.testing.assert_close((pa.vector * pb.dual).sum(), expected)
        for is_damped, matrix in ((True, damped), (False, torch.kron(a, s))):
            image = block.image(pb.vector, damping, damped=is_damped)
            torch.testing.assert_close((pa.vector * image).sum(), vec(left) @ matrix @ vec(right))
    for gradient, one in zip((left, right), placed, strict=True):
        torch.testing.assert_close(block.direction(one.vector), gradient)
        torch.testing.assert_close(one.vector.norm(), gradient.norm())


def test_damping_of_an_eigenbasis_acts_at_use_and_that_of_cholesky_at_decomposition() -> None:
    (a, s), gradient = kronecker_factors(), draw(N, M)
    for solver in EIGEN:
        early, late = (solver.decompose(a, s, damping).precondition(gradient, 0.5) for damping in (0.1, 0.5))
        torch.testing.assert_close(early, late, rtol=0, atol=0)
    block = Cholesky().decompose(a, s, 0.1)
    torch.testing.assert_close(block.precondition(gradient, 0.5), block.precondition(gradient, 0.1), rtol=0, atol=0)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_damping_may_be_a_tensor(solver: KroneckerSolver) -> None:
    (a, s), gradient = kronecker_factors(), draw(N, M)
    a, s, gradient = a.float(), s.float(), gradient.float()
    number = solver.decompose(a, s, 0.25)
    tensor = solver.decompose(a, s, torch.tensor(0.25, dtype=torch.float64))
    assert {t.dtype for t in tensor.tensors().values()} == {torch.float32}
    expected = number.precondition(gradient, 0.25)
    torch.testing.assert_close(tensor.precondition(gradient, torch.tensor(0.25, dtype=torch.float64)), expected)


def test_pi_balances_the_damping() -> None:
    a, s = kronecker_factors()
    torch.testing.assert_close(damped_pi(a, s) ** 2, (a.trace() / M) / (s.trace() / N))
    torch.testing.assert_close(damped_pi(9 * a, s), 3 * damped_pi(a, s))


@pytest.mark.parametrize(
    ("a", "s"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e30, 1e-30), (1e-30, 1e30), (-1e-9, 1.0)], ids=str
)
def test_pi_is_finite(a: float, s: float) -> None:
    pi = damped_pi(a * torch.eye(2), s * torch.eye(3))
    assert pi.isfinite()
    assert pi > 0
    if min(a, s) >= 0:
        block = Cholesky().decompose(a * torch.eye(2), s * torch.eye(3), 1e-3)
        assert block.precondition(torch.ones(3, 2), 1e-3).isfinite().all()


def per_sample_coordinates(x: Tensor, g: Tensor, u_a: Tensor, u_s: Tensor) -> Tensor:
    """One sample and one position at a time."""
    rows = []
    for xs, gs in zip(x, g, strict=True):
        gradient = sum((gt.outer(xt) for xt, gt in zip(xs, gs, strict=True)), torch.zeros(N, M, dtype=torch.float64))
        rows.append(u_s.T @ gradient @ u_a)
    return torch.stack(rows)


@pytest.mark.parametrize("positions", [1, 2, 5])
@pytest.mark.parametrize("max_memory", [1, 200, 1 << 20])
def test_second_moment_is_that_of_the_explicit_gradients(positions: int, max_memory: int) -> None:
    x, g = layer(samples=7, positions=positions)
    u_a, u_s = torch.linalg.qr(draw(M, M)).Q, torch.linalg.qr(draw(N, N)).Q
    expected = per_sample_coordinates(x, g, u_a, u_s).square().mean(0)
    torch.testing.assert_close(second_moment(u_s, u_a, x, g, max_memory=max_memory), expected)


def empirical_fisher(x: Tensor, g: Tensor) -> Tensor:
    gradients = per_sample_coordinates(x, g, eye(M), eye(N))
    rows = torch.stack([vec(gradient) for gradient in gradients])
    return rows.T @ rows / len(rows)


def dense_corrected(block: CorrectedEigen, damping: float) -> Tensor:
    basis = torch.kron(block.input_basis, block.grad_basis)
    return basis @ torch.diag(vec(block.moment) + damping) @ basis.T


def test_corrected_basis_starts_as_kfac_and_is_nearer_to_the_fisher_after() -> None:
    """For the exact second moment EKFAC's Frobenius error is at most KFAC's (arXiv 1806.03884, section 3)."""
    x, g = layer(samples=30)
    a, s = kronecker_factors(samples=30)
    start = EigenbasisCorrected().decompose(a, s, 0.1)
    torch.testing.assert_close(dense_corrected(start, 0.0), torch.kron(a, s))
    after, fisher = start.observed(x, g, 0.0), empirical_fisher(x, g)
    errors = [torch.linalg.norm(fisher - dense_corrected(block, 0.0)) for block in (start, after)]
    assert errors[1] < 0.9 * errors[0]
    torch.testing.assert_close(after.moment.sum(), fisher.trace())
    torch.testing.assert_close(start.observed(x, g, 0.75).moment, 0.75 * start.moment + 0.25 * after.moment)


def test_corrected_solve_and_inner_products_are_the_dense_ones() -> None:
    x, g = layer()
    block = EigenbasisCorrected().decompose(*kronecker_factors(), 0.1).observed(x, g, 0.3)
    left, right, damping = draw(N, M, seed=5), draw(N, M, seed=6), 0.05
    dense = dense_corrected(block, damping)
    expected = unvec(torch.linalg.solve(dense, vec(left)), N, M)
    torch.testing.assert_close(block.precondition(left, damping), expected)
    pa, pb = block.place(left, damping), block.place(right, damping)
    torch.testing.assert_close((pa.vector * block.image(pb.vector, damping)).sum(), vec(left) @ dense @ vec(right))


def test_a_new_basis_takes_the_moment_along() -> None:
    x, g = layer()
    old = EigenbasisCorrected().decompose(*kronecker_factors(), 0.1).observed(x, g, 0.5)
    a, s = kronecker_factors(seed=20)
    new = EigenbasisCorrected().decompose(a, s, 0.1, previous=old)
    fresh = EigenbasisCorrected().decompose(a, s, 0.1)
    torch.testing.assert_close(new.input_basis, fresh.input_basis, rtol=0, atol=0)
    basis = torch.kron(new.input_basis, new.grad_basis)
    expected = (basis.T @ dense_corrected(old, 0.0) @ basis).diagonal()  # the old block's diagonal, seen from the new
    torch.testing.assert_close(vec(new.moment), expected)
    torch.testing.assert_close(old.turned(old.grad_basis, old.input_basis).moment, old.moment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", EIGEN, ids=repr)
@pytest.mark.parametrize("samples", [1, 2])
def test_singular_and_undamped_is_the_pseudo_inverse(solver: KroneckerSolver, dtype: torch.dtype, samples: int) -> None:
    a, s = (factor.to(dtype) for factor in kronecker_factors(samples=samples))
    gradient = draw(N, M, dtype=dtype)
    expected = unvec(torch.linalg.pinv(torch.kron(a, s).double(), rtol=1e-5) @ vec(gradient.double()), N, M)
    for damping in (0.0, torch.tensor(0.0)):
        found = solver.decompose(a, s, 0.0).precondition(gradient, damping)
        tolerance = 1e-2 if dtype == torch.float32 else 1e-8
        torch.testing.assert_close(
            found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
        )


@pytest.mark.parametrize("damping", [0.0, 1e-60, 1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("solver", EIGEN, ids=repr)
def test_weights_are_finite(solver: KroneckerSolver, damping: float) -> None:
    for scale in (0.0, 1e-30, 1e-18, 1.0, 1e18):
        a, s = (scale * factor.float() for factor in kronecker_factors(samples=1))
        block = solver.decompose(a, s, damping)
        weights = block.inverse_weights(damping)
        assert weights.isfinite().all()
        assert (weights >= 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_decompositions_do_not_feel_the_scale(scale: float) -> None:
    a = kronecker_factors()[0].float()
    values, _ = factors.eigenbasis(a, "factor")
    scaled, vectors = factors.eigenbasis(scale * a, "factor")
    torch.testing.assert_close(scaled / scale, values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vectors @ torch.diag(scaled / scale) @ vectors.T, a, rtol=1e-4, atol=1e-5)
    inverse = factors.inverse(scale * a, "factor")
    torch.testing.assert_close(inverse @ (scale * a), torch.eye(M), rtol=1e-4, atol=1e-4)
    assert torch.equal(inverse, inverse.T)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_single_precision_is_close_to_double(solver: KroneckerSolver) -> None:
    (a, s), gradient = kronecker_factors(20, 30, samples=100), draw(20, 30)
    exact = solver.decompose(a, s, 1e-2).precondition(gradient, 1e-2)
    found = solver.decompose(a.float(), s.float(), 1e-2).precondition(gradient.float(), 1e-2)
    assert found.dtype == torch.float32
    assert torch.linalg.norm(found - exact) < 1e-4 * torch.linalg.norm(exact)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_half_precision_is_brought_to_single(solver: KroneckerSolver) -> None:
    a, s = kronecker_factors()
    block = solver.decompose(a.bfloat16(), s.float(), 0.1)
    direction = block.precondition(draw(N, M, dtype=torch.bfloat16), 0.1)
    assert {t.dtype for t in block.tensors().values()} == {direction.dtype} == {torch.float32}
    mixed = solver.decompose(a.float(), s, 0.1)
    assert {t.dtype for t in mixed.tensors().values()} == {torch.float64}


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_tensors_bring_it_back_bit_by_bit(solver: KroneckerSolver) -> None:
    (a, s), gradient = kronecker_factors(), draw(N, M)
    block = solver.decompose(a, s, 0.1).observed(*layer(), 0.5)
    file = io.BytesIO()
    torch.save(block.tensors(), file)
    file.seek(0)
    again = solver.restore(torch.load(file, weights_only=True))
    assert type(again) is type(block)
    for name, tensor in block.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    assert torch.equal(again.precondition(gradient, 0.1), block.precondition(gradient, 0.1))


def test_tensors_of_another_solver_are_refused(teaches: Callable[[Exception], None]) -> None:
    tensors = Eigenbasis().decompose(*kronecker_factors(), 0.1).tensors()
    with pytest.raises(InvalidOptionError, match="KroneckerInverse needs") as caught:
        Cholesky().restore(tensors)
    teaches(caught.value)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_running_factors_may_change_in_place_afterwards(solver: KroneckerSolver) -> None:
    (a, s), gradient = kronecker_factors(), draw(N, M)
    a.requires_grad_()
    block = solver.decompose(a, s, 0.1)
    before = block.precondition(gradient, 0.1)
    s.mul_(3)
    with torch.no_grad():
        a.mul_(3)
    assert torch.equal(block.precondition(gradient, 0.1), before)
    assert not any(tensor.requires_grad for tensor in block.tensors().values())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_several_gradients_at_once(solver: KroneckerSolver) -> None:
    block, gradients = solver.decompose(*kronecker_factors(), 0.1), draw(2, N, M)
    expected = torch.stack([block.precondition(gradient, 0.1) for gradient in gradients])
    torch.testing.assert_close(block.precondition(gradients, 0.1), expected)
    images = block.image(block.place(gradients, 0.1).vector, 0.1)
    torch.testing.assert_close(images[1], block.image(block.place(gradients[1], 0.1).vector, 0.1))


class NoSync(TorchDispatchMode):
    """Refuse whatever would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a value was read"
        assert "nonzero" not in str(func)
        assert "_to_copy" not in str(func), "a tensor was copied"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("damping", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_nothing_after_the_decomposition_waits_for_the_device(solver: KroneckerSolver, damping: float | Tensor) -> None:
    block, gradient = solver.decompose(*kronecker_factors(), 0.1), draw(N, M)
    inputs = layer(positions=2)
    with NoSync():
        vector = block.place(gradient, damping).vector
        block.image(vector, damping)
        block.image(vector, damping, damped=False)
        block.precondition(gradient, damping)
        block.observed(*inputs, 0.5)
    with pytest.raises(AssertionError, match="a value was read"), NoSync():
        gradient.sum().item()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_nothing_depends_on_the_device(solver: KroneckerSolver) -> None:
    """On the meta device reading a value raises, and so does mixing it with a tensor of the CPU."""
    tensors = {n: t.to("meta") for n, t in solver.decompose(*kronecker_factors(), 0.1).tensors().items()}
    block, gradient = solver.restore(tensors), torch.empty(N, M, device="meta", dtype=torch.float64)
    for damping in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        assert block.precondition(gradient, damping).shape == (N, M)
        assert block.image(block.place(gradient, damping).vector, damping).is_meta
    assert block.observed(*(t.to("meta") for t in layer(positions=2)), 0.5).precondition(gradient, 0.1).is_meta


def test_products_keep_full_precision_under_autocast() -> None:
    a, b = draw(8, 8, dtype=torch.float32), draw(8, 8, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        found = factors.product(a, b)
    assert torch.equal(found, factors.product(a, b))


def test_products_keep_full_precision_where_the_caller_allows_less() -> None:
    a, b = draw(64, 64, dtype=torch.float32), draw(64, 64, seed=1, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = factors.product(a, b, a)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, (a.double() @ b.double() @ a.double()).float())


METHODS = [("eigh", Eigenbasis()), ("cholesky", Cholesky())]


def broken(name: str, fails: Callable[[Tensor, int], BaseException | float | None]) -> tuple[Any, list[torch.dtype]]:
    """A torch.linalg function that raises, or returns its results multiplied by a number, as ``fails`` says."""
    original, seen = getattr(torch.linalg, name), []

    def call(matrix: Tensor) -> Any:
        seen.append(matrix.dtype)
        outcome = fails(matrix, len(seen))
        if isinstance(outcome, BaseException):
            raise outcome
        result = original(matrix)
        if outcome is None:
            return result
        return outcome * result if isinstance(result, Tensor) else tuple(outcome * part for part in result)

    return call, seen


@pytest.mark.parametrize(
    "failure", [torch.linalg.LinAlgError("no convergence"), RuntimeError("driver error"), float("nan")], ids=repr
)
@pytest.mark.parametrize(("name", "solver"), METHODS)
def test_a_failure_in_single_precision_is_tried_again_in_double(
    name: str, solver: KroneckerSolver, failure: BaseException | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, s = (factor.float() for factor in kronecker_factors())
    gradient = draw(N, M, dtype=torch.float32)
    expected = solver.decompose(a, s, 0.1).precondition(gradient, 0.1)
    call, seen = broken(name, lambda matrix, _: failure if matrix.dtype == torch.float32 else None)
    monkeypatch.setattr(torch.linalg, name, call)
    found = solver.decompose(a, s, 0.1).precondition(gradient, 0.1)
    assert seen == 2 * [torch.float32, torch.float64]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "solver"), METHODS)
def test_a_failure_in_double_precision_says_what_to_do(
    name: str, solver: KroneckerSolver, monkeypatch: pytest.MonkeyPatch, teaches: Callable[[Exception], None]
) -> None:
    call, seen = broken(
        name, lambda _, count: torch.linalg.LinAlgError("no convergence\nlong story") if count > 1 else None
    )
    monkeypatch.setattr(torch.linalg, name, call)
    with pytest.raises(
        DecompositionError, match=r"gradient factor S \(3, 3\).*: no convergence Use a larger"
    ) as caught:
        solver.decompose(*(factor.float() for factor in kronecker_factors()), 0.1)
    teaches(caught.value)
    assert seen == [torch.float32, torch.float32, torch.float64]


def test_double_precision_is_not_tried_twice_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    call, seen = broken("eigh", lambda *_: torch.linalg.LinAlgError("no convergence"))
    monkeypatch.setattr(torch.linalg, "eigh", call)
    with pytest.raises(DecompositionError):
        Eigenbasis().decompose(*kronecker_factors(), 0.1)
    assert seen == [torch.float64]


def test_out_of_memory_is_not_taken_for_a_bad_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    call, seen = broken("eigh", lambda *_: torch.OutOfMemoryError("out of memory"))
    monkeypatch.setattr(torch.linalg, "eigh", call)
    with pytest.raises(torch.OutOfMemoryError):
        Eigenbasis().decompose(*(factor.float() for factor in kronecker_factors()), 0.1)
    assert len(seen) == 1


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_factor_that_is_not_finite_is_refused(
    solver: KroneckerSolver, value: float, teaches: Callable[[Exception], None]
) -> None:
    a, s = kronecker_factors()
    a[0, 1] = value
    with pytest.raises(DecompositionError, match=r"input factor A \(4, 4\) holds NaN or infinity in 1 of 16") as caught:
        solver.decompose(a, s, 0.1)
    teaches(caught.value)


def test_undamped_cholesky_of_a_singular_factor_is_refused() -> None:
    with pytest.raises(DecompositionError, match="larger damping"):
        Cholesky().decompose(*kronecker_factors(samples=1), 0.0)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_factor_must_be_square(solver: KroneckerSolver) -> None:
    with pytest.raises(InvalidOptionError, match=r"gradient factor S has shape \(3, 2\): give a square matrix"):
        solver.decompose(torch.eye(4), torch.ones(3, 2), 0.1)


def test_rounding_below_zero_and_beside_the_diagonal_is_repaired() -> None:
    a = kronecker_factors(samples=1)[0].float()
    values, vectors = torch.linalg.eigh(a)
    values[0] = -1e-6 * values[-1]
    indefinite = vectors @ torch.diag(values) @ vectors.T
    skewed = indefinite + 1e-6 * torch.triu(torch.ones(M, M), 1)
    assert torch.linalg.eigvalsh(indefinite)[0] < 0
    block = Eigenbasis().decompose(skewed, torch.eye(N), 0.0)
    assert (block.curvature() >= 0).all()
    mirrored = Eigenbasis().decompose(skewed.T, torch.eye(N), 0.0)
    assert torch.equal(block.input_values, mirrored.input_values)


def test_solvers_are_plain_options() -> None:
    assert [repr(solver) for solver in SOLVERS] == ["Eigenbasis()", "EigenbasisCorrected()", "Cholesky()"]
    assert Cholesky() == Cholesky()
    assert all(isinstance(solver, KroneckerSolver) for solver in SOLVERS)

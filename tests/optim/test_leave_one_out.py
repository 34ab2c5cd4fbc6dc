"""Leave-one-out against really leaving out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

import steepest as st
from optim.sven_runs import DOUBLE, data, dense_jacobian, flat, jacobian_of, mlp, residuals, same, seen
from steepest.linalg import symmetric_spectrum
from steepest.optim.leave_one_out import left_out

pytestmark = pytest.mark.usefixtures("no_model_is_small")

LAMBDAS = torch.tensor([1e-6, 1e-2, 1.0, 1e4], dtype=DOUBLE)


def system(samples: list[tuple[int, int]], parameters: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(count * size for count, size in samples)
    matrix = torch.randn(rows, parameters, generator=generator, dtype=DOUBLE)
    return matrix, torch.randn(rows, generator=generator, dtype=DOUBLE)


def slowly(matrix: Tensor, rhs: Tensor, damping: float, samples: list[tuple[int, int]]) -> Tensor:
    """Solve for every sample by the conditions of all others, and see what is left of its own."""
    left, start = [], 0
    for count, size in samples:
        for _ in range(count):
            own = torch.zeros(len(rhs), dtype=torch.bool)
            own[start : start + size] = True
            start += size
            others = matrix[~own]
            damped = others.T @ others + damping * torch.eye(matrix.shape[1], dtype=DOUBLE)
            left.append(rhs[own] - matrix[own] @ torch.linalg.solve(damped, others.T @ rhs[~own]))
    return torch.cat(left)


def closed_form(
    matrix: Tensor, rhs: Tensor, dampings: Tensor, samples: list[tuple[int, int]], *, primal: bool = False
) -> Tensor:
    spectrum = symmetric_spectrum(matrix.T @ matrix if primal else matrix @ matrix.T)
    features = matrix @ spectrum.vectors if primal else spectrum.vectors
    return left_out(spectrum.values.square(), features, rhs, dampings, samples, primal=primal)


@pytest.mark.parametrize("primal", [False, True])
@given(
    samples=some.lists(some.tuples(some.integers(1, 4), some.integers(1, 3)), min_size=1, max_size=3),
    parameters=some.integers(2, 16),
    seed=some.integers(0, 99),
)
def test_what_is_left_is_what_solving_without_the_sample_leaves(
    primal: bool, samples: list[tuple[int, int]], parameters: int, seed: int
) -> None:
    """Several rows of a sample, several blocks, fewer and more rows than parameters, every damping, of either Gram."""
    matrix, rhs = system(samples, parameters, seed)
    found = closed_form(matrix, rhs, LAMBDAS[1:], samples, primal=primal)
    for damping, left in zip(LAMBDAS[1:].tolist(), found, strict=True):
        torch.testing.assert_close(left, slowly(matrix, rhs, damping, samples), rtol=1e-7, atol=1e-8)


def test_a_tiny_damping_is_exact_too_where_the_rows_are_independent() -> None:
    samples = [(5, 1), (2, 2)]
    matrix, rhs = system(samples, 20, 0)
    found = closed_form(matrix, rhs, LAMBDAS[:1], samples)[0]
    torch.testing.assert_close(found, slowly(matrix, rhs, 1e-6, samples), rtol=1e-6, atol=1e-7)


def by_definition(
    solver: st.LeaveOneOut, matrix: Tensor, rhs: Tensor, memory: Tensor | None, samples: list[tuple[int, int]]
) -> dict[str, Any]:
    """Damping, length, direction and memory, every solution without a sample made for itself."""
    smallest = max(solver.smallest, 1e-8) if any(size > 1 for _, size in samples) else solver.smallest
    decades = torch.log10(torch.tensor([smallest, solver.largest], dtype=DOUBLE)).round(decimals=9).tolist()
    points = int(2 * (decades[1] - decades[0])) + 1  # two for each decade, evenly, both ends among them
    relative = [10 ** (decades[0] + n * (decades[1] - decades[0]) / (points - 1)) for n in range(points)]
    mean = float((matrix @ matrix.T).trace()) / len(rhs)
    predicted = [rhs - slowly(matrix, rhs, r * mean, samples) for r in relative]
    worth = torch.stack([torch.stack([p @ rhs, p @ p]) / (rhs @ rhs) for p in predicted], 1)
    floor = solver.smallest
    if memory is not None:
        worth = solver.decay * memory[:-3].view(2, -1) + (1 - solver.decay) * worth
        floor = float(memory[-2])
    gains = []
    for r, (a, b) in zip(relative, worth.T.tolist(), strict=True):
        eta = min(max(a / b, 0.0), 1.0)
        gains.append(eta * (2 * a - eta * b) if r > 0.99 * floor else -1)
    most = max(gains)
    enough = max((1 - solver.slack) * most, most - solver.slack * (1 - most))
    near = [index for index, gain in enumerate(gains) if gain >= min(enough, most)]
    best = near[-1] if max(gains) > 0 else len(gains) - 1
    length = min(max(float(worth[0, best] / worth[1, best]), 1e-3), 1.0)
    damping = relative[best] * mean
    solved = torch.linalg.solve(matrix @ matrix.T + damping * torch.eye(len(rhs), dtype=DOUBLE), rhs)
    learnt = torch.cat([worth.flatten(), torch.tensor([torch.inf, floor, relative[best]], dtype=DOUBLE)])
    return {"damping": damping, "step": length**solver.caution, "direction": matrix.T @ solved, "memory": learnt}


TALL_AND_WIDE = {
    "wide": [(7, 1)],
    "several rows": [(3, 1), (2, 2)],
    "tall": [(12, 1)],
    "tall, several": [(6, 1), (4, 2)],
}


@pytest.mark.parametrize("samples", TALL_AND_WIDE.values(), ids=TALL_AND_WIDE)
@pytest.mark.parametrize(("caution", "slack"), [(0.0, 0.3), (0.25, 0.0), (1.0, 0.1)])
def test_damping_and_length_follow_the_definition(samples: list[tuple[int, int]], caution: float, slack: float) -> None:
    solver = st.LeaveOneOut(caution=caution, slack=slack, decay=0.6, smallest=1e-5, largest=1e2)
    memory: Tensor | None = None
    for batch in range(4):
        matrix, _ = system(samples, 9, batch)
        truth = torch.linspace(-1, 1, 9, dtype=DOUBLE)
        rhs = matrix @ truth + system(samples, 9, 50 + batch)[1] * 0.3
        want = by_definition(solver, matrix, rhs, memory, samples)
        solution = solver.adapt(jacobian_of(matrix), rhs, memory, samples)
        assert solution.damping == pytest.approx(want["damping"], rel=1e-9)
        assert solution.step == pytest.approx(want["step"], rel=1e-6)
        torch.testing.assert_close(solution.direction()["w"], want["direction"], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(solution.memory, want["memory"], rtol=1e-6, atol=1e-8)
        assert 0 < solution.step <= 1
        memory = solution.memory


def test_it_goes_on_a_little_where_samples_predict_nothing_of_each_other() -> None:
    matrix = torch.eye(4, dtype=DOUBLE)
    rhs = torch.tensor([1.0, -2.0, 3.0, 1.0], dtype=DOUBLE)
    for caution in (0.25, 1.0):
        solution = st.LeaveOneOut(caution=caution).solve(jacobian_of(matrix), rhs)
        assert solution.damping == pytest.approx(0.3)
        assert solution.step == pytest.approx(1e-3**caution)
        torch.testing.assert_close(solution.direction()["w"], rhs / 1.3)


@pytest.mark.parametrize(("noise", "lowest", "highest"), [(0.3, 0.9, 1.0), (4.0, 0.0, 0.5)])
def test_slack_is_a_share_of_the_decrease_or_of_what_it_leaves(noise: float, lowest: float, highest: float) -> None:
    matrix, _ = system([(60, 1)], 20, 5)
    rhs = matrix @ torch.linspace(-1, 1, 20, dtype=DOUBLE) + noise * system([(60, 1)], 20, 6)[1]
    grid = torch.logspace(-6, 2, 17, dtype=DOUBLE) * float(matrix.square().sum()) / 60
    guesses = rhs - closed_form(matrix, rhs, grid, [(60, 1)])
    right, length = guesses @ rhs / (rhs @ rhs), guesses.square().sum(1) / (rhs @ rhs)
    shares = (right / length).clamp(0, 1)
    gains = (shares * (2 * right - shares * length)).tolist()
    most = max(gains)
    assert lowest < most < highest
    dampings = []
    for slack in (0.0, 0.1, 0.5):
        solver = st.LeaveOneOut(smallest=1e-6, largest=1e2, slack=slack)
        taken = solver.solve(jacobian_of(matrix), rhs).damping
        assert taken is not None
        gain = gains[int((grid - taken).abs().argmin())]
        given = (most - gain) / min(most, 1 - most)
        assert 0 <= given <= slack + 1e-9
        dampings.append(taken)
    assert dampings == sorted(dampings)
    assert dampings[0] < dampings[-1]


def test_more_rows_than_parameters_are_never_multiplied_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, rhs = system([(40, 1)], 6, 0)
    jacobian = jacobian_of(matrix)
    monkeypatch.setattr(type(jacobian), "gram", lambda *_: pytest.fail("40 x 40 numbers"))
    solution = st.LeaveOneOut().solve(jacobian, rhs)
    assert solution.weights is None
    assert 0 < solution.step <= 1


def test_dampings_below_the_rounding_of_a_sum_over_rows_are_not_taken() -> None:
    """Two columns that are the same but for rounding: an exact fit would ask for the smallest damping there is."""
    matrix, _ = system([(200, 1)], 5, 0)
    matrix[:, 1] = matrix[:, 0] * (1 + 1e-15)
    rhs = matrix @ torch.ones(5, dtype=DOUBLE)
    solution = st.LeaveOneOut(slack=0.0).solve(jacobian_of(matrix), rhs)
    assert solution.damping is not None
    assert solution.damping >= torch.finfo(DOUBLE).eps * float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    torch.testing.assert_close(matrix @ solution.direction()["w"], rhs, rtol=1e-6, atol=1e-6)


def test_a_sample_that_no_other_speaks_of_is_left_as_it_is() -> None:
    """Its own share of the prediction is 1 but for the damping, which rounding swallows."""
    matrix = torch.zeros(5, 2, dtype=DOUBLE)
    matrix[0, 0], matrix[1:, 1] = 1e8, 1.0
    rhs = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0], dtype=DOUBLE)
    solution = st.LeaveOneOut().solve(jacobian_of(matrix), rhs)
    assert solution.memory is not None
    assert solution.memory[:-3].isfinite().all()
    assert all(part.isfinite().all() for part in solution.direction().values())


def test_solve_is_adapt_without_a_past() -> None:
    matrix, rhs = system([(6, 1)], 9, 3)
    alone = st.LeaveOneOut().solve(jacobian_of(matrix), rhs)
    first = st.LeaveOneOut().adapt(jacobian_of(matrix), rhs, None, [(6, 1)])
    assert same(alone.direction(), first.direction())
    assert alone.step == first.step


def test_smaller_dampings_than_the_floor_are_not_taken_and_the_largest_always_may_be() -> None:
    solver, (matrix, _) = st.LeaveOneOut(decay=0.999, largest=1e3), system([(6, 1)], 40, 1)
    rhs = matrix @ torch.ones(40, dtype=DOUBLE)
    mean = float((matrix @ matrix.T).trace()) / 6
    free = solver.solve(jacobian_of(matrix), rhs)
    assert free.memory is not None
    for floor, taken in ((1e-1, 1e-1), (1e9, 1e3)):
        memory = torch.cat([free.memory[:-2], free.memory.new_tensor([floor, 1.0])])
        held = solver.adapt(jacobian_of(matrix), rhs, memory, [(6, 1)])
        assert held.damping is not None
        assert held.damping >= 0.999 * taken * mean
        assert held.memory is not None
        assert held.memory[-2] == floor


@pytest.mark.parametrize("samples", TALL_AND_WIDE.values(), ids=TALL_AND_WIDE)
def test_a_step_that_is_longer_than_what_is_trusted_takes_a_larger_damping(samples: list[tuple[int, int]]) -> None:
    solver, (matrix, _) = st.LeaveOneOut(decay=0.999, slack=0.0, largest=1e3), system(samples, 40, 3)
    rhs = matrix @ torch.linspace(-1, 1, 40, dtype=DOUBLE)
    free = solver.adapt(jacobian_of(matrix), rhs, None, samples)
    assert free.memory is not None
    assert free.damping is not None
    used = free.damping
    for share in (10.0, 0.3, 0.03):
        radius = share * free.step * free.norm
        memory = torch.cat([free.memory[:-3], free.memory.new_tensor([radius, 1e-14, 1.0])])
        held = solver.adapt(jacobian_of(matrix), rhs, memory, samples)
        assert held.damping is not None
        assert held.step * held.norm <= radius * (1 + 1e-9)
        assert held.damping == used if share > 1 else held.damping > used
        assert held.step > 0.5, "it is not shortened"
        assert held.memory is not None
        assert held.memory[-3] == radius
        used = held.damping


@pytest.mark.parametrize(("share", "length"), [(0.2, 0.2), (1e-9, 1 / 32)])
def test_a_step_is_shortened_where_no_damping_is_large_enough_and_never_to_nothing(share: float, length: float) -> None:
    solver, (matrix, rhs) = st.LeaveOneOut(), system([(6, 1)], 9, 3)
    largest = torch.linalg.solve(matrix @ matrix.T + 0.3 * matrix.square().sum() / 6 * torch.eye(6, dtype=DOUBLE), rhs)
    norm = float(torch.linalg.vector_norm(matrix.T @ largest))
    free = solver.solve(jacobian_of(matrix), rhs)
    assert free.memory is not None
    memory = torch.cat([free.memory[:-3], free.memory.new_tensor([share * norm, 1e-14, 1.0])])
    held = solver.adapt(jacobian_of(matrix), rhs, memory, [(6, 1)])
    assert held.norm == pytest.approx(norm)
    assert held.step == pytest.approx(length)


def test_a_memory_of_another_grid_is_begun_anew() -> None:
    """Rows of one output after rows of several, or a state of other options: their running means say nothing."""
    matrix, rhs = system([(6, 1)], 9, 3)
    solver = st.LeaveOneOut()
    several = solver.adapt(jacobian_of(matrix), rhs, None, [(3, 2)])
    single = solver.adapt(jacobian_of(matrix), rhs, several.memory, [(6, 1)])
    fresh = solver.adapt(jacobian_of(matrix), rhs, None, [(6, 1)])
    assert single.memory is not None
    assert fresh.memory is not None
    assert torch.equal(single.memory[:-2], fresh.memory[:-2])


@pytest.mark.parametrize("zero", ["jacobian", "rows", "both"])
def test_conditions_that_say_nothing_move_nothing(zero: str) -> None:
    matrix, rhs = system([(4, 1)], 5, 0)
    matrix, rhs = matrix * (zero == "rows"), rhs * (zero == "jacobian")
    solution = st.LeaveOneOut().solve(jacobian_of(matrix), rhs)
    moved = solution.direction()["w"] * solution.step
    assert torch.equal(moved, torch.zeros_like(moved))
    assert solution.memory is not None
    assert solution.memory[:-3].isfinite().all()


def test_the_engine_row_by_row_gives_the_same_step() -> None:
    steps = []
    for reference in (False, True):
        model, (x, y) = mlp(2), data(8, 2)
        capture = st.ReferenceCapture(model) if reference else None
        opt = st.Sven(model, rows="residuals", metric=None, capture=capture)
        for _ in range(3):
            opt.step(lambda m=model, x=x, y=y: m(x) - y)
        steps.append(flat(model))
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-11)


def test_the_step_taken_is_the_definitions() -> None:
    """Through the optimizer: vector rows are left out sample by sample, and lr multiplies the advised length."""
    model, (x, _) = mlp(2), data(5, 2)
    y = torch.stack([x.sum(1).sin() + 1, x[:, 0] - 2], 1)
    rows = model(x) - y
    matrix = dense_jacobian(list(model.parameters()), rows.flatten())
    solver = st.LeaveOneOut(verify=False)
    want = by_definition(solver, matrix, rows.detach().flatten(), None, [(5, 2)])
    before = flat(model)
    assert want["step"] > 0
    opt = st.Sven(model, rows="residuals", lr=0.5, solver=solver, max_norm_ratio=None)
    opt.step(lambda: model(x) - y)
    torch.testing.assert_close(before - flat(model), 0.5 * want["step"] * want["direction"], rtol=1e-7, atol=1e-10)
    assert seen(opt).damping == pytest.approx(want["damping"], rel=1e-9)
    assert seen(opt).length == pytest.approx(want["step"], rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_single_precision_gram_keeps_away_from_its_rounding(dtype: torch.dtype) -> None:
    model, (x, y) = mlp().to(dtype), (part.to(dtype) for part in data(12))
    opt = st.Sven(model, rows="residuals", solver=st.LeaveOneOut(precision="float32"))
    history = [float(opt.step(lambda: residuals(model, x, y))) for _ in range(10)]
    assert history[-1] < 0.5 * history[0]


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"decay": 1.0}, "decay=1.0"),
    ({"caution": 1.5}, "caution=1.5"),
    ({"slack": 1.0}, "slack=1.0"),
    ({"smallest": 0.0}, "smallest"),
    ({"smallest": 1.0, "largest": 0.1}, "largest=0.1"),
    ({"precision": "float16"}, "precision"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=message):
        st.LeaveOneOut(**options)


def test_one_damping_is_a_grid_too() -> None:
    matrix, rhs = system([(6, 1)], 9, 3)
    one = dataclasses.replace(st.LeaveOneOut(), smallest=0.1, largest=0.1)
    mean = float((matrix @ matrix.T).trace()) / 6
    assert one.solve(jacobian_of(matrix), rhs).damping == pytest.approx(0.1 * mean)

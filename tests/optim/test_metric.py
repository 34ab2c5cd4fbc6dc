"""The metric against a dense matrix that is built by hand from hooks and autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from optim.metric_runs import CASES, Case, each, rows_of, solved, sven, taken
from optim.sven_runs import DOUBLE, data, dense_jacobian, flat, mlp, residuals, same, state_of
from steepest.engine import Capture
from zoo_parts import Net

pytestmark = pytest.mark.usefixtures("no_model_is_small")

Factors = dict[str, tuple[Tensor, Tensor]]


def by_hand(case: Case, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Factors]:
    """Rows, Jacobian, and for every layer mean ``x x^T`` over positions and mean over rows of ``g g^T``."""
    modules = dict(model.named_modules())
    met: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in case.layers}
    hooks = [
        modules[name].register_forward_hook(lambda _, args, out, name=name: met[name].append((args[0], out)))
        for name in case.layers
    ]
    rows = rows_of(model, x).flatten()
    for hook in hooks:
        hook.remove()
    factors = {}
    for name, uses in met.items():
        layer = modules[name]
        inputs = torch.cat([_positions(layer, given.detach()) for given, _ in uses])
        grads = [torch.autograd.grad(row, [out for _, out in uses], retain_graph=True) for row in rows]
        seen = torch.cat([(g.movedim(1, -1) if g.ndim == 4 else g).flatten(0, -2) for found in grads for g in found])
        factors[f"{name}.weight"] = inputs.T @ inputs / len(inputs), seen.T @ seen / len(rows)
    return rows.detach(), dense_jacobian(list(model.parameters()), rows), factors


def _positions(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
    x = x.flatten(0, -2)
    return x if layer.bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1)


def powered(factor: Tensor, damping: float, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(factor / factor.diagonal().mean())
    return vectors @ torch.diag((values + damping) ** power) @ vectors.T


def dense_metric(model: nn.Module, factors: Factors, damping: float, power: float) -> Tensor:
    """M in the order of the parameters; identity where there is no factor."""
    start, place = 0, {}
    for name, p in model.named_parameters():
        place[name] = torch.arange(start, start + p.numel()).view(len(p), -1) if p.ndim else torch.tensor([[start]])
        start += p.numel()
    metric = torch.eye(start, dtype=DOUBLE)
    for name, (inputs, grads) in factors.items():
        bias = name.replace("weight", "bias")
        index = torch.cat([place[name], place[bias]], 1) if bias in place else place[name]
        index = index.flatten()  # of a matrix [d_out, d_in (+ 1)], row by row
        block = torch.kron(powered(grads, damping, power), powered(inputs, damping, power))
        metric[index.unsqueeze(1), index] = block
    return metric


@each
@pytest.mark.parametrize(("power", "damping"), [(1.0, 0.1), (0.5, 0.1), (1.0, 1e-3), (0.3, 2.0)])
def test_the_step_is_the_shortest_in_the_metric(case: Case, power: float, damping: float) -> None:
    model, x = case.fresh(), case.x()
    rows, jacobian, factors = by_hand(case, model, x)
    want = solved(jacobian, rows, dense_metric(model, factors, damping, power))
    opt = sven(model, st.KroneckerMetric(damping=damping, power=power))
    found = taken(model, opt, x)
    torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-9 * float(want.norm()))
    plain = solved(jacobian, rows, torch.eye(len(want), dtype=DOUBLE))
    assert (found - plain).norm() > 1e-2 * plain.norm()
    assert {name for name, p in opt.capture.params.items() if "metric" in opt.state[p]} == set(factors)


@each
def test_a_large_damping_of_the_metric_is_the_euclidean_norm(case: Case) -> None:
    """Of every layer for itself: those that have a metric become short and long together."""
    model, x = case.fresh(), case.x()
    rows, jacobian, factors = by_hand(case, model, x)
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    inside = {name.replace("weight", kind) for name in factors for kind in ("weight", "bias")}
    diagonal = torch.tensor([1e16 if name in inside else 1.0 for name in names], dtype=DOUBLE)
    want = solved(jacobian, rows, torch.diag(diagonal))
    found = taken(model, sven(model, st.KroneckerMetric(damping=1e8)), x)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6 * float(want.norm()))
    if all(name in inside for name in names):
        plain = solved(jacobian, rows, torch.eye(len(want), dtype=DOUBLE))
        assert torch.cosine_similarity(found, plain, dim=0) > 1 - 1e-9


def test_layers_beyond_the_largest_size_keep_the_euclidean_norm() -> None:
    case = next(case for case in CASES if case.name == "convolutions")
    model, x = case.fresh(), case.x()
    rows, jacobian, factors = by_hand(case, model, x)
    small = {name: factors[name] for name in ("2.weight", "6.weight")}  # the first layer has 18 inputs
    want = solved(jacobian, rows, dense_metric(model, small, 0.1, 1.0))
    opt = sven(model, st.KroneckerMetric(damping=0.1, max_size=12))
    torch.testing.assert_close(taken(model, opt, x), want, rtol=1e-7, atol=1e-9 * float(want.norm()))
    assert {name for name, p in opt.capture.params.items() if "metric" in opt.state[p]} == set(small)


def test_a_power_of_zero_is_the_euclidean_norm() -> None:
    case = CASES[0]
    first, second = case.fresh(), case.fresh()
    found, plain = taken(first, sven(first, st.KroneckerMetric(power=0.0)), case.x()), None
    plain = taken(second, sven(second, None), case.x())
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("every", [1, 3])
def test_factors_are_running_means_and_roots_are_renewed_in_time(every: int) -> None:
    """Batches of other sizes count as one each; the roots are those of the factors when they were made."""
    case = CASES[0]
    model = case.fresh()
    metric = st.KroneckerMetric(decay=0.7, damping=0.2, every=every)
    opt = sven(model, metric)
    means: Factors = {}
    used: Factors = {}
    renewed = set(range(1, 9)) if every == 1 else {1, 2, 4, 7}  # after 1, 2, 4 steps, then every third
    for step in range(1, 9):
        x = case.x(step)[: 2 + step % 4]
        rows, jacobian, factors = by_hand(case, model, x)
        for name, new in factors.items():
            old = means.get(name, new)
            means[name] = tuple(0.7 * a + 0.3 * b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]
        if step in renewed:
            used = dict(means)
        want = solved(jacobian, rows, dense_metric(model, used, 0.2, 1.0))
        torch.testing.assert_close(taken(model, opt, x), want, rtol=1e-7, atol=1e-9)
    for name, p in opt.capture.params.items():
        if name in means:
            state = opt.state[p]["metric"]
            torch.testing.assert_close(state["input_factor"], means[name][0])
            torch.testing.assert_close(state["grad_factor"], means[name][1])
            assert state["updates"] == 8


def test_a_layer_keeps_its_metric_while_no_batch_uses_it() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda n, x: n.out((n.left if x[0, 0] > 0 else n.right)(x).tanh()),
        left=nn.Linear(3, 4), right=nn.Linear(3, 4), out=nn.Linear(4, 1),
    ).double()  # fmt: skip
    opt = sven(model, st.KroneckerMetric())
    for sign in (1, -1, -1, 1):
        x = torch.rand(5, 3, dtype=DOUBLE) * sign
        idle, busy = (model.left, model.right) if sign < 0 else (model.right, model.left)
        before = [opt.state[layer.weight].get("metric") for layer in (idle, busy)]
        weight = idle.weight.detach().clone()
        opt.step(lambda x=x: rows_of(model, x))
        assert torch.equal(idle.weight, weight)
        assert same(opt.state[idle.weight].get("metric"), before[0])
        assert not same(opt.state[busy.weight]["metric"], before[1])


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_a_resumed_run_goes_on_to_the_bit(case: Case) -> None:
    def build() -> tuple[nn.Module, st.Sven]:
        model = case.fresh().float()
        return model, sven(model, st.KroneckerMetric(every=3), lr=0.3)

    def go(model: nn.Module, opt: st.Sven, start: int) -> None:
        for step in range(start, start + 5):
            x = case.x(step).float()
            opt.step(lambda x=x: model(x).flatten() - 1)

    model, opt = build()
    go(model, opt, 0)
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state_of(opt))
    go(model, opt, 5)
    go(other, resumed, 5)
    assert torch.equal(flat(model), flat(other))
    assert same(opt.state_dict(), resumed.state_dict())


def test_rows_without_records_of_layers_have_the_euclidean_norm() -> None:
    """An engine that differentiates row by row knows gradients, and not what they are products of."""
    case = CASES[0]
    first, second = case.fresh(), case.fresh()
    found = taken(first, sven(first, st.KroneckerMetric(), capture=st.ReferenceCapture(first)), case.x())
    torch.testing.assert_close(found, taken(second, sven(second, None), case.x()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [st.LeaveOneOut(), st.LevenbergMarquardt(), st.TruncatedEigh(), st.TruncatedSVD()])
def test_every_solver_works_in_the_metric(solver: Any) -> None:
    model, (x, _) = mlp(), data(8)
    y = x.sum(1).sin() + 1
    opt = st.Sven(model, rows="residuals", lr=0.5, solver=solver, metric=st.KroneckerMetric())
    history = [float(opt.step(lambda: residuals(model, x, y))) for _ in range(20)]
    assert history[-1] < 0.3 * history[0]
    assert any("metric" in state for state in opt.state.values())


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("rank", [0, 2, 4])
def test_a_root_is_one_of_the_damped_inverse(power: float, rank: int) -> None:
    torch.manual_seed(0)
    half = torch.randn(4, rank, dtype=DOUBLE)
    factor = half @ half.T
    metric = st.KroneckerMetric(damping=0.1, power=power)
    root = metric.root(factor, "factor")
    want = 0.1 * torch.eye(4, dtype=DOUBLE)
    if rank:
        want = want + factor / factor.diagonal().mean()
    torch.testing.assert_close(root @ root.T, torch.linalg.inv(powered_sum(want, power)), rtol=1e-9, atol=1e-9)


def powered_sum(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.T


def test_whitened_records_are_products_with_the_roots() -> None:
    """Every kind of record, against its explicit gradients."""
    for case in CASES:
        model = case.fresh()
        capture = Capture(model)
        with capture:
            rows = rows_of(model, case.x())
        for record in capture.jacobian(rows).records:
            weight, *bias = record.names
            grads = record.per_sample_grads()
            if grads[weight].ndim < 3 or bias[1:] or "table" in weight:
                continue
            matrix = grads[weight].flatten(2)
            matrix = torch.cat([matrix, grads[bias[0]].unsqueeze(2)], 2) if bias else matrix
            left, right = (torch.randn(size, size, dtype=DOUBLE) for size in matrix.shape[1:])
            found = record.whitened(right, left)
            assert found.names == (weight,)
            torch.testing.assert_close(found.per_sample_grads()[weight], left.T @ matrix @ right)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"decay": 1.0}, "decay=1.0"),
    ({"damping": 0.0}, "damping=0.0"),
    ({"power": -1.0}, "power=-1.0"),
    ({"every": 0}, "every=0"),
    ({"max_size": 0}, "max_size=0"),
    ({"damping": math.nan}, "damping=nan"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=message):
        st.KroneckerMetric(**options)

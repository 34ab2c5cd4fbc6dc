"""The balanced metric against dense sums over the parameters of every module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from optim.metric_runs import CASES, Case, each, rows_of, solved, sven, taken
from optim.sven_runs import DOUBLE, data, dense_jacobian, flat, mlp, residuals, same, state_of


def layer_sizes(model: nn.Module, jacobian: Tensor) -> dict[str, Tensor]:
    """Mean square of the rows in the parameters of every module that the rows use."""
    sizes: dict[str, Tensor] = {}
    start = 0
    for name, p in model.named_parameters():
        owner = name.rpartition(".")[0]
        part = jacobian[:, start : start + p.numel()].square().sum(1).mean()
        sizes[owner] = sizes.get(owner, torch.zeros((), dtype=DOUBLE)) + part
        start += p.numel()
    return {owner: size for owner, size in sizes.items() if size > 0}


def dense_metric(model: nn.Module, sizes: dict[str, Tensor], damping: float) -> Tensor:
    middle = torch.stack(list(sizes.values())).mean()
    parts = []
    for name, p in model.named_parameters():
        size = sizes.get(name.rpartition(".")[0])
        parts.append(torch.full((p.numel(),), 1.0 if size is None else float(size / middle) + damping, dtype=DOUBLE))
    return torch.diag(torch.cat(parts))


def by_hand(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows_of(model, x).flatten()
    return rows.detach(), dense_jacobian(list(model.parameters()), rows)


@each
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
def test_the_step_is_the_shortest_in_the_metric(case: Case, damping: float) -> None:
    model, x = case.fresh(), case.x()
    rows, jacobian = by_hand(model, x)
    want = solved(jacobian, rows, dense_metric(model, layer_sizes(model, jacobian), damping))
    found = taken(model, sven(model, st.BalancedMetric(damping=damping)), x)
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-10 * float(want.norm()))
    plain = solved(jacobian, rows, torch.eye(len(want), dtype=DOUBLE))
    assert (found - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize("engine", [st.ReferenceCapture, st.BatchedCapture])
@pytest.mark.parametrize("name", ["mlp", "a layer that is not used"])
def test_explicit_gradients_are_balanced_in_the_same_way(engine: type[st.ReferenceCapture], name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model, x = case.fresh(), case.x()
    twin = copy.deepcopy(model)
    want = taken(model, sven(model, st.BalancedMetric()), x)
    found = taken(twin, sven(twin, st.BalancedMetric(), capture=engine(twin)), x)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_a_large_damping_is_the_euclidean_norm() -> None:
    model = mlp()
    x, _ = data()
    rows, jacobian = by_hand(model, x)
    want = solved(jacobian, rows, torch.eye(jacobian.shape[1], dtype=DOUBLE))
    found = taken(model, sven(model, st.BalancedMetric(damping=1e9)), x)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-8)


def test_sizes_are_running_means_over_the_batches() -> None:
    model, decay = mlp(), 0.75
    opt = sven(model, st.BalancedMetric(decay=decay, damping=0.0))
    means: dict[str, Tensor] = {}
    for seed in range(4):
        x, y = data(seed=seed)
        jacobian = dense_jacobian(list(model.parameters()), residuals(model, x, y))
        sizes = layer_sizes(model, jacobian)
        means = {n: decay * means[n] + (1 - decay) * sizes[n] if n in means else sizes[n] for n in sizes}
        want = solved(jacobian, residuals(model, x, y).detach(), dense_metric(model, means, 0.0))
        before = flat(model)
        opt.step(lambda x=x, y=y: residuals(model, x, y))
        torch.testing.assert_close(before - flat(model), want, rtol=1e-8, atol=1e-10)
    kept = {
        name: opt.state[p]["metric"]["mean_square"] for name, p in model.named_parameters() if name.endswith("weight")
    }
    for name, size in kept.items():
        torch.testing.assert_close(size, means[name.rpartition(".")[0]])


def test_a_layer_that_nothing_reaches_keeps_its_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)  # no unit is on: nothing of the first layer matters
    before = model[0].weight.detach().clone()
    x, y = data()
    opt = sven(model, st.BalancedMetric(damping=0.0))
    opt.step(lambda: residuals(model, x, y))
    assert torch.equal(model[0].weight, before)
    assert bool(torch.isfinite(flat(model)).all())


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    x, y = data()
    model = mlp()
    opt = st.Sven(model, metric=st.BalancedMetric(), momentum=0.3)
    closure = lambda: residuals(model, x, y).square()  # noqa: E731
    for _ in range(3):
        opt.step(closure)
    twin = copy.deepcopy(model)
    other = st.Sven(twin, metric=st.BalancedMetric(), momentum=0.3)
    other.load_state_dict(state_of(opt))
    for _ in range(2):
        opt.step(closure)
        other.step(lambda: residuals(twin, x, y).square())
    assert torch.equal(flat(model), flat(twin))
    assert same(state_of(opt), state_of(other))


def test_what_another_metric_has_kept_is_begun_anew() -> None:
    x, y = data()
    model = mlp()
    opt = st.Sven(model)
    opt.step(lambda: residuals(model, x, y).square())
    fresh = copy.deepcopy(model)
    balanced, begun = (sven(m, st.BalancedMetric()) for m in (model, fresh))
    state = state_of(opt)
    balanced.load_state_dict(state | {"param_groups": state_of(balanced)["param_groups"]})
    balanced.step(lambda: residuals(model, x, y))
    begun.step(lambda: residuals(fresh, x, y))
    torch.testing.assert_close(flat(model), flat(fresh), rtol=1e-12, atol=0.0)


def test_a_fraction_of_the_rows_is_balanced_as_it_is() -> None:
    x, y = data()
    model = mlp()
    opt = st.Sven(model, rows="residuals", solver=st.Damped(0.1), metric=st.BalancedMetric(), fraction=0.5, lr=0.5)
    first = float(opt.step(lambda: residuals(model, x, y)) or 0.0)
    for _ in range(60):
        last = float(opt.step(lambda: residuals(model, x, y)) or 0.0)
    assert last < 0.1 * first

"""One Sven, two sets of parameters: the conditions move one, AdamW the other by the gradient of the mean loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from optim.sven_runs import DOUBLE, data, flat, mlp, residuals, same, seen, snapshot, state_of, unchanged

ADAM: dict[str, Any] = {"method": "adamw", "lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
Output = Callable[[nn.Module, int], Any]


def batch(step: int, rows: int = 8, outputs: int = 1) -> tuple[Tensor, Tensor]:
    x, y = data(rows, outputs, seed=step)
    return x, y + 1


def losses(model: nn.Module, step: int) -> Tensor:
    return residuals(model, *batch(step)).square()


def signed(model: nn.Module, step: int) -> Tensor:
    return residuals(model, *batch(step))


def vectors(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, outputs=3)
    return model(x) - y


def blocks(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Of different sizes: their means add up."""
    x, y = batch(step)
    return {"few": model(x[:2]).squeeze(1) - y[:2], "many": 3 * (model(x[2:]).squeeze(1) - y[2:])}


def squared_blocks(model: nn.Module, step: int) -> dict[str, Tensor]:
    return {name: block.square() for name, block in blocks(model, step).items()}


def mean_loss(output: Any, kind: str) -> Tensor:
    """What AdamW alone would descend."""
    parts = list(output.values()) if isinstance(output, dict) else [output]
    if kind == "residuals":
        parts = [part.square().flatten(1).sum(1) if part.ndim == 2 else part.square() for part in parts]
    return torch.stack([part.mean() for part in parts]).sum()


@dataclass(frozen=True)
class Case:
    """What the closure returns, and how Sven takes it."""

    name: str
    output: Output
    options: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1

    @property
    def kind(self) -> str:
        return str(self.options.get("rows", "losses"))


RESIDUALS: dict[str, Any] = {"rows": "residuals"}
CASES = [
    Case("losses", losses),
    Case("kappa 2", losses, {"kappa": 2.0, "solver": st.Damped(0.1), "lr": 0.2}),
    Case("kappa 1", losses, {"kappa": 1.0, "solver": st.Damped(0.1), "lr": 0.2}),
    Case("kappa 1/2 and rows of two", losses, {"kappa": 0.5, "samples_per_row": 2, "solver": st.Damped(0.1)}),
    Case("residuals", signed, RESIDUALS),
    Case("vector residuals", vectors, RESIDUALS, outputs=3),
    Case("blocks", blocks, RESIDUALS),
    Case("blocks of losses", squared_blocks),
    Case("momentum and a fraction", signed, {**RESIDUALS, "solver": st.Damped(0.1), "momentum": 0.5, "fraction": 0.5}),
    Case("levenberg", signed, {**RESIDUALS, "solver": st.LevenbergMarquardt()}),
    Case("kalman", signed, {**RESIDUALS, "solver": st.KalmanFilter()}),
    Case("weights", blocks, {**RESIDUALS, "weights": {"few": 5.0}}),
]  # fmt: skip
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def weigh(case: Case, output: Any) -> Any:
    weights = case.options.get("weights", {})
    return {n: b * weights.get(n, 1.0) ** 0.5 for n, b in output.items()} if weights else output


def parted(
    case: Case, *, adam_first: bool = False
) -> tuple[nn.Module, st.Sven, list[nn.Parameter], list[nn.Parameter]]:
    """Sven trains the last layer and AdamW the first."""
    model = mlp(case.outputs)
    first, last = list(model[0].parameters()), list(model[2].parameters())
    groups: list[dict[str, Any]] = [{"params": last}, {"params": first, **ADAM}]
    opt = st.Sven(model, params=groups[::-1] if adam_first else groups, **case.options)
    return model, opt, first, last


@each
@pytest.mark.parametrize("adam_first", [False, True])
def test_each_set_moves_as_if_it_were_alone(case: Case, adam_first: bool) -> None:
    model, opt, _, _ = parted(case, adam_first=adam_first)
    twin = mlp(case.outputs)
    first, last = list(twin[0].parameters()), list(twin[2].parameters())
    adam = torch.optim.AdamW(first, **{k: v for k, v in ADAM.items() if k != "method"})
    alone = st.Sven(twin, params=last, **case.options)
    start = flat(model)
    for step in range(5):
        mean = mean_loss(weigh(case, case.output(twin, step)), case.kind)
        grads = torch.autograd.grad(mean, first)
        want = alone.step(lambda step=step: case.output(twin, step))
        found = opt.step(lambda step=step: case.output(model, step))
        for p, grad in zip(first, grads, strict=True):
            p.grad = grad
        adam.step()
        torch.testing.assert_close(found, mean.detach())
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-8, atol=1e-10)
        assert seen(opt).accepted == seen(alone).accepted
        assert seen(opt).update_norm == pytest.approx(seen(alone).update_norm, rel=1e-8)
    assert ((flat(model) - start).abs() > 1e-6).all()  # both sets have moved
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_a_loops_own_stay_as_they_are() -> None:
    model, opt, first, _ = parted(CASES[0])
    kept = [torch.full_like(p, 7.0) for p in first]
    for p, grad in zip(first, kept, strict=True):
        p.grad = grad
    opt.step(lambda: losses(model, 0))
    assert all(p.grad is grad and bool((grad == 7).all()) for p, grad in zip(first, kept, strict=True))


def test_a_layer_parted_between_the_sets_is_refused_by_name() -> None:
    model = mlp()
    groups = [{"params": [model[0].weight, *model[2].parameters()]}, {"params": [model[0].bias], "method": "adamw"}]
    opt = st.Sven(model, params=groups)
    before = snapshot(model)
    with pytest.raises(st.InvalidOptionError, match=r"'0\.weight', '0\.bias' belong to one layer"):
        opt.step(lambda: losses(model, 0))
    assert unchanged(model, before)


def test_parameters_of_no_layer_may_be_in_any_set() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    matrices = [p for name, p in model.named_parameters() if not name.startswith("1.")]
    opt = st.Sven(model, params=[{"params": matrices}, {"params": list(model[1].parameters()), "method": "adamw"}])
    before = snapshot(model)
    opt.step(lambda: losses(model, 0))
    assert not any(map(torch.equal, before, model.parameters()))


def test_the_defaults_of_a_set_are_those_of_torch() -> None:
    model = mlp()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "method": "adamw"}]
    opt = st.Sven(model, params=groups)
    torchs = torch.optim.AdamW([torch.zeros(1)]).defaults
    assert all(opt.param_groups[1][name] == torchs[name] for name in ("lr", "betas", "eps", "weight_decay"))
    assert opt.param_groups[0]["lr"] == 1.0
    assert "betas" not in opt.param_groups[0]


def test_a_set_added_later_is_trained() -> None:
    model = mlp()
    opt = st.Sven(model, params=list(model[2].parameters()))
    opt.step(lambda: losses(model, 0))
    opt.add_param_group({"params": list(model[0].parameters()), **ADAM})
    before = snapshot(model)
    opt.step(lambda: losses(model, 1))
    assert not any(map(torch.equal, before, model.parameters()))
    assert opt.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize("adam_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_resumed_run_goes_on_to_the_bit(dtype: torch.dtype, adam_first: bool) -> None:
    def build() -> tuple[nn.Module, st.Sven]:
        model = mlp().to(dtype)
        groups = [{"params": list(model[2].parameters())}, {"params": list(model[0].parameters()), **ADAM}]
        return model, st.Sven(model, params=groups[::-1] if adam_first else groups, momentum=0.4)

    def go(model: nn.Module, opt: st.Sven, start: int) -> None:
        for step in range(start, start + 4):
            x, y = (part.to(dtype) for part in batch(step))
            opt.step(lambda x=x, y=y: residuals(model, x, y).square())

    model, opt = build()
    go(model, opt, 0)
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state_of(opt))
    twin, copied = copy.deepcopy((model, opt))
    for one in ((model, opt), (other, resumed), (twin, copied)):
        go(*one, 4)
    assert torch.equal(flat(model), flat(other))
    assert torch.equal(flat(model), flat(twin))
    assert same(opt.state_dict(), resumed.state_dict())
    assert same(opt.state_dict(), copied.state_dict())


@pytest.mark.parametrize("solver", [None, st.Damped(0.1), st.LevenbergMarquardt(), st.KalmanFilter()])
def test_what_is_not_finite_changes_neither_set(solver: Any) -> None:
    case = Case("bad", signed, {**RESIDUALS, "solver": solver, "on_nonfinite": "skip"})
    model, opt, first, _ = parted(case)
    opt.step(lambda: signed(model, 0))
    before, adam = snapshot(model), copy.deepcopy([opt.state[p] for p in first])

    def steep() -> Tensor:
        """Finite rows whose gradient in AdamW's parameters alone overflows."""
        hidden = model[1](model[0](batch(1)[0])) * 1e200
        return model[2]((hidden - hidden.detach()) * 1e200 + hidden.detach() * 1e-200).squeeze(1)

    for bad in (lambda: signed(model, 1) * torch.nan, steep):
        with pytest.warns(RuntimeWarning, match="skipped"):
            assert opt.step(bad) is None
        assert unchanged(model, before)
        assert same([opt.state[p] for p in first], adam)
    opt.step(lambda: signed(model, 1))
    assert not unchanged(model, before)
    assert seen(opt).num_skipped == 2


def test_a_rejected_step_of_sven_is_still_one_of_adamw() -> None:
    model, opt, first, last = parted(Case("x", signed, {**RESIDUALS, "solver": st.LevenbergMarquardt(max_trials=1)}))
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return signed(model, 0) + (0 if len(calls) == 1 else 100)

    before = flat(first), flat(last)
    opt.step(closure)
    assert not seen(opt).accepted
    assert not torch.equal(flat(first), before[0])
    assert torch.equal(flat(last), before[1])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "sgd"}, "method='sgd'"),
    ({"method": "adamw", "lr": -1.0}, "lr=-1.0"),
    ({"method": "adamw", "weight_decay": -1.0}, "weight_decay"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_impossible_sets_are_refused(options: dict[str, Any], message: str) -> None:
    model = mlp()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), **options}]
    with pytest.raises(st.InvalidOptionError, match=message):
        st.Sven(model, params=groups)


def test_a_sven_with_nothing_for_sven_is_refused() -> None:
    model = mlp()
    with pytest.raises(st.InvalidOptionError, match="leave one to Sven"):
        st.Sven(model, params=[{"params": list(model.parameters()), "method": "adamw"}])

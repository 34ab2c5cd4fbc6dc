"""What goes wrong on one of the ranks that take Sven's steps together, one thing after the other."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import steepest as st
from optim.rank_runs import assert_identical
from optim.sven_cases import CASES, EIGH, TRIED, Case, Data, far_losses, losses, parted, residuals, text
from steepest.training.losses import CrossEntropy
from steepest.training.steps import residuals_step


def attempt(opt: st.Sven, closure: Any) -> str:
    """The error of a step, after a check that it changed nothing."""
    model_state = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    state = copy.deepcopy(opt.state_dict()["state"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = opt.step(closure)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    else:
        return "skipped" if result is None else "stepped"
    now = [p for group in opt.param_groups for p in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(model_state, now, strict=True))
    assert_identical(opt.state_dict()["state"], state)
    return found


class Odd:
    """A user's own solver, made of products alone: gradient descent on the squared conditions."""

    def solve(self, jacobian: st.Jacobian, rhs: Tensor) -> Any:
        from steepest.optim.solvers import Solution

        scale = jacobian.jvp(jacobian.vjp(rhs)).norm() / rhs.norm()
        return Solution(jacobian, 1, None, 0.0, 1.0, 1.0, weights=rhs / scale)


class Broken(Odd):
    """It fails on rank 0, after the last of its products."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def solve(self, jacobian: st.Jacobian, rhs: Tensor) -> Any:
        found = super().solve(jacobian, rhs)
        if self.rank == 0:
            raise ValueError("no solution")
        return found


def failures(rank: int, world: int) -> dict[str, Any]:
    case, last = CASES[0], rank == world - 1
    data = case.batches(world, 0)[rank]
    model = case.fresh()

    def good() -> Tensor:
        return losses(model, data)

    def wrong(kind: Callable[[], Any]) -> Callable[[], Any]:
        return kind if last else good

    def broken() -> Tensor:
        raise KeyError("user")

    opt = st.Sven(model)
    skipping = st.Sven(model, on_nonfinite="skip")
    nan = wrong(lambda: good() * torch.tensor([1.0, float("nan"), 1.0, 1.0]))
    found: dict[str, Any] = {
        "fresh state": opt.state_dict()["state"] == {},
        "nan": attempt(opt, nan),
        "error": attempt(opt, wrong(broken)),
        "no closure": attempt(opt, None if last else good),
        "reduced": attempt(opt, wrong(lambda: good().mean())),
        "dict": attempt(opt, wrong(lambda: {"a": good()})),
        "half": attempt(opt, wrong(lambda: good().float())),
        "skipped": [attempt(skipping, nan), attempt(skipping, good), attempt(skipping, nan)],
        "not skipped": attempt(skipping, nan if rank != 0 or world == 1 else broken),
        "count": skipping.state_dict()["state"][0]["num_skipped"],
    }
    fast = st.Sven(model, lr=0.5 if last else 0.1)
    found["lr"] = attempt(fast, good)
    found["solver"] = attempt(st.Sven(model, solver=st.Damped(0.1 if last else 0.2)), good)
    found["fewer"] = attempt(st.Sven(model, params=list(model.parameters())[: 3 if last else None]), good)
    found["broken"] = attempt(st.Sven(model, solver=Broken(rank)), good)
    found["odd"] = attempt(st.Sven(model, solver=Odd()), good)
    found["overflow"] = attempt(st.Sven(model, solver=st.Damped()), wrong(lambda: good() * 1e200))
    found["too far"] = attempt(st.Sven(model, **EIGH, lr=1e308, max_norm_ratio=None), good)
    found |= _new_failures(case, data, last)
    other = case.fresh()
    if last:
        with torch.no_grad():
            other[2].weight[0].copy_(other[2].weight[0].flip(0))  # the same numbers in another order
    strange = st.Sven(other)
    found["start"] = attempt(strange, lambda: losses(other, data))
    frozen = case.fresh()
    frozen[0].requires_grad_(False)
    if last:
        frozen[0].bias.data[0] += 1e-12
    found["frozen"] = attempt(st.Sven(frozen), lambda: losses(frozen, data))
    found["after all"] = [attempt(opt, good) for _ in range(2)]
    found["saved"] = _saved(opt, model, data)
    found["params"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    found["wrapped"] = _wrapped(case, data)
    found["lengths"] = _lengths(rank)
    return found


def _new_failures(case: Case, data: Data, last: bool) -> dict[str, Any]:
    """Of options that differ between the ranks, and of the closure's second call."""
    model = case.fresh()

    def good() -> Tensor:
        return far_losses(model, data)

    def named() -> dict[str, Tensor]:
        return {"some": far_losses(model, data)}

    def second(change: Callable[[Tensor], Any]) -> Callable[[], Any]:
        calls: list[None] = []

        def closure() -> Any:
            calls.append(None)
            return change(good()) if last and len(calls) > 1 else good()

        return closure

    def broken(_: Tensor) -> Any:
        raise KeyError("user")

    first, _, middle, _, end = model
    groups, swapped = [
        [{"params": list(a.parameters()), "method": "adamw"}, {"params": [*b.parameters(), *end.parameters()]}]
        for a, b in ((first, middle), (middle, first))
    ]
    opt = st.Sven(model, momentum=0.5, metric=st.KroneckerMetric())
    found: dict[str, Any] = {
        "levenberg of one": attempt(
            st.Sven(model, kappa=1, solver=st.LevenbergMarquardt() if last else st.LeaveOneOut()), good
        ),
        "adamw of one": attempt(st.Sven(model, params=groups if last else groups[1:]), good),
        "other groups": attempt(st.Sven(model, params=swapped if last else groups), good),
        "momentum": attempt(st.Sven(model, momentum=0.5 if last else 0.2), good),
        "decay": attempt(st.Sven(model, relative_decay=0.5 if last else None), good),
        "metric": attempt(st.Sven(model, metric=st.KroneckerMetric() if last else None), good),
        "weights": attempt(st.Sven(model, weights={"some": 2.0 if last else 1.0}), named),
        "unknown": attempt(st.Sven(model, weights={"other": 2.0}), named),
        "before": attempt(opt, good),
        "second": attempt(opt, second(broken)),
    }
    before = [p.detach().clone() for p in model.parameters()]
    found["second nan"] = attempt(opt, second(lambda rows: rows * torch.nan))
    found["second worse"] = attempt(opt, second(lambda rows: rows + 1e6))
    found["given up"] = opt.diagnostics is not None and not opt.diagnostics.accepted
    found["as it was"] = all(map(torch.equal, before, model.parameters()))
    found["after"] = attempt(opt, good)
    found |= _failures_of_levenberg(model, good, second, last)
    torch.manual_seed(3)
    classes, inputs = nn.Linear(5, 4).double(), torch.randn(8, 5, dtype=torch.float64)
    here, targets = (inputs[:3], torch.arange(3)) if last else (inputs[3:5], torch.arange(3, 5) % 4)
    step = residuals_step(st.Sven(classes, rows="residuals"), classes, CrossEntropy(), here, targets)
    found["reported"] = step, inputs, [(p.detach().clone()) for p in classes.parameters()]
    found["new params"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    return found


def _failures_of_levenberg(
    model: nn.Module, good: Callable[[], Tensor], second: Callable[..., Callable[[], Any]], last: bool
) -> dict[str, Any]:
    """In the trials of one rank, in its Jacobian, and in its part of a gradient for AdamW."""

    def broken(_: Tensor) -> Any:
        raise KeyError("user")

    def steep() -> Tensor:
        rows = good()
        return torch.where(torch.arange(len(rows)) == 1, (rows - rows.detach()).sqrt(), rows) if last else rows

    found: dict[str, Any] = {}
    for name, most in (("primal", 4096), ("dual", 0)):
        opt = st.Sven(model, solver=st.LevenbergMarquardt(max_primal=most, max_trials=3), kappa=1.0)
        found[f"{name} good"] = attempt(opt, good)
        found[f"{name} broken"] = attempt(opt, second(broken))
        found[f"{name} nan"] = attempt(opt, second(lambda rows: rows * torch.nan))
        found[f"{name} taken back"] = opt.diagnostics is not None and not opt.diagnostics.accepted
        found[f"{name} steep"] = attempt(opt, steep)
    rest = [p for layer in model[1:] for p in layer.parameters()]  # type: ignore[index]
    groups = [{"params": list(model[0].parameters()), "method": "adamw"}, {"params": rest}]  # type: ignore[index]
    for name, metric in (("metric", st.KroneckerMetric()), ("adamw", None)):
        opt = st.Sven(model, params=groups, metric=metric, kappa=1)
        found[f"{name} steep"] = attempt(opt, steep)
        found[f"{name} good"] = attempt(opt, good)
    return found


def _saved(opt: st.Sven, model: nn.Module, data: Data) -> bool:
    """A copy of model and optimizer goes on like the original."""
    twin, model_twin = copy.deepcopy((opt, model))
    one, two = opt.step(lambda: losses(model, data)), twin.step(lambda: losses(model_twin, data))
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), model_twin.parameters(), strict=True)]
    return bool(all(same) and one == two)


def _wrapped(case: Case, data: Data) -> dict[str, Any]:
    plain, inner = case.fresh(), case.fresh()
    wrapper = DistributedDataParallel(inner)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt, alone = st.Sven(wrapper), st.Sven(plain)
        tried = [st.Sven(m, **parted(**TRIED)(getattr(m, "module", m))) for m in (wrapper, plain)]
    for _ in range(3):
        for one, model in ((opt, wrapper), (alone, plain)):
            one.step(lambda model=model: losses(model, data))
        for one, model in zip(tried, (wrapper, plain), strict=True):
            one.step(lambda model=model: residuals(model, data))
    same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), inner.parameters(), strict=True))
    return {"same": same, "said": [str(w.message) for w in seen], "names": list(opt.capture.params)[:1]}


def _lengths(rank: int) -> dict[str, Tensor]:
    """Sentences of another length on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = text().double()
    x = sentences(rank)
    loss = st.Sven(model, solver=st.Damped(1e-2)).step(lambda: model(x).flatten().square())
    assert loss is not None
    return {"params": torch.cat([p.detach().flatten() for p in model.parameters()]), "loss": loss}


def sentences(rank: int) -> Tensor:
    return torch.randint(30, (3, 4 + 2 * rank), generator=torch.Generator().manual_seed(rank))

"""Sven on several processes: the step of one process with the whole batch."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import steepest as st
from optim.rank_runs import assert_identical
from ranks import run_ranks
from steepest.training.losses import CrossEntropy
from steepest.training.steps import residuals_step
from zoo_parts import Net, param

STEPS = 4
EQUAL, UNEQUAL = (4, 4, 4, 4), (6, 2, 4, 8)
Data = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data, and how Sven trains it."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], Data]
    rows: Callable[[Any, Data], Tensor | dict[str, Tensor]]
    options: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    counts: tuple[int, ...] = UNEQUAL
    tolerance: float = 1e-10
    dtype: torch.dtype = torch.float64

    def fresh(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return self.model().to(self.dtype)

    def batches(self, world: int, step: int) -> list[Data]:
        """A part of the batch for each rank; tensors named so are rank 0's alone."""
        generator = torch.Generator().manual_seed(100 * step + 7)
        parts = [self.data(count, generator) for count in self.counts[:world]]
        return [
            {
                k: v.to(self.dtype) if v.is_floating_point() else v
                for k, v in part.items()
                if rank == 0 or not k.startswith("only_")
            }
            for rank, part in enumerate(parts)
        ]


def whole(parts: list[Data]) -> Data:
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}


def floats(*shape: int) -> Callable[[int, torch.Generator], Data]:
    def make(count: int, generator: torch.Generator) -> Data:
        x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        return {"x": x, "y": torch.sin(x.flatten(1).sum(1))}

    return make


def tokens(count: int, generator: torch.Generator) -> Data:
    found = torch.randint(30, (count, 7), generator=generator)
    return {"x": found, "y": (found.sum(1) % 5).double() / 5}


def points(count: int, generator: torch.Generator) -> Data:
    x, edge = (torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in (count, 3))
    return {"x": x, "edge": edge, "only_here": torch.rand(2, 2, generator=generator, dtype=torch.float64)}


def losses(model: Any, data: Data) -> Tensor:
    return (model(data["x"]).flatten() - data["y"]).square()


def residuals(model: Any, data: Data) -> Tensor:
    return model(data["x"]).flatten() - data["y"]


def far(model: Any, data: Data) -> Tensor:
    """What even a few samples say something of."""
    return residuals(model, data) - 2


def far_losses(model: Any, data: Data) -> Tensor:
    return far(model, data).square()


def blocks(model: Any, data: Data) -> dict[str, Tensor]:
    """Named conditions, one of which rank 0 alone has, with a parameter of its own."""
    found = {"equation": model.net(data["x"]).flatten() - data["x"].prod(1), "edge": 3 * model.net(data["edge"])[:, 0]}
    if "only_here" in data:
        found["here"] = model.net(data["only_here"]).flatten() * model.scale - 0.5
    return found


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 1))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 4, 3, stride=2, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(4 * 9, 1),
    )  # fmt: skip


def text() -> nn.Module:
    return Net(
        lambda n, x: n.last(n.norm(n.first(n.table(x))).tanh().mean(1)),
        table=nn.Embedding(30, 6), first=nn.Linear(6, 8), norm=nn.LayerNorm(8), last=nn.Linear(8, 1),
    )  # fmt: skip


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 1))


def recurrent() -> nn.Module:
    return Net(lambda n, x: n.last(n.cell(x)[0][:, -1]), cell=nn.LSTM(3, 4, batch_first=True), last=nn.Linear(4, 1))


def field() -> nn.Module:
    return Net(lambda n, x: n.net(x), net=nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), scale=param())


def branched() -> nn.Module:
    """A layer that rank 0's own block alone uses."""
    return Net(
        lambda n, x: n.net(x),
        net=nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), scale=param(), own=nn.Linear(2, 2),
    )  # fmt: skip


def own_layer(model: Any, data: Data) -> dict[str, Tensor]:
    found = blocks(model, data)
    if "here" in found:
        found["here"] = found["here"] + model.own(data["only_here"]).tanh().sum(1)
    return found


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))


def vectors(model: Any, data: Data) -> Tensor:
    return model(data["x"]) - torch.stack([data["y"] + 2, data["y"] - 2, data["x"][:, 0] + 1], 1)


def mixed(model: Any, data: Data) -> dict[str, Tensor]:
    """Vector rows and single ones, weighted."""
    return {"vectors": vectors(model, data), "single": model(data["x"])[:, 0] - 2}


def grouped(model: nn.Module) -> dict[str, Any]:
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.2, "weight_decay": 0.1}, {"params": rest, "lr": 0.4}]
    return {"params": groups, **DAMPED, "weight_decay": 0.01}


def always(**options: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: options


EIGH: dict[str, Any] = {"solver": st.TruncatedEigh(rtol=1e-3)}
DAMPED: dict[str, Any] = {"solver": st.Damped(1e-2), "rows": "residuals"}
# Leave-one-out decides by sums that rounding changes: of eigenvectors, more than of anything else.
LOOSE: dict[str, Any] = {"tolerance": 1e-9}
CASES = [
    Case("losses", mlp, floats(5), losses, always(**EIGH, lr=0.3), EQUAL),
    Case("default", mlp, floats(5), far_losses, counts=EQUAL, **LOOSE),
    Case("default of parts", mlp, floats(5), far_losses, **LOOSE),
    Case("residuals and momentum", mlp, floats(5), far, always(rows="residuals", momentum=0.6), **LOOSE),
    Case("untried", mlp, floats(5), far_losses, always(solver=st.LeaveOneOut(verify=False), kappa=1.0), **LOOSE),
    Case("metric", mlp, floats(5), residuals, always(**DAMPED, metric=st.KroneckerMetric(every=2), momentum=0.5)),
    Case("metric of images", cnn, floats(2, 8, 8), residuals, always(**DAMPED, metric=st.KroneckerMetric(power=0.5))),
    Case("metric of text", text, tokens, residuals, always(**DAMPED, metric=st.KroneckerMetric())),
    Case("vector rows", wide, floats(5), vectors, always(rows="residuals"), **LOOSE),
    Case("blocks of vector rows", wide, floats(5), mixed,
         always(rows="residuals", weights={"single": 3.0}, momentum=0.3), **LOOSE),
    Case("weights", field, points, blocks, always(**DAMPED, weights={"here": 4.0, "edge": 0.3})),
    Case("a layer of one rank", branched, points, own_layer, always(**DAMPED, metric=st.KroneckerMetric())),
    Case("momentum and a fraction", mlp, floats(5), residuals, always(**DAMPED, momentum=0.5, fraction=0.5)),
    Case("twice the batch and a floor", mlp, floats(5), far_losses,
         always(solver=st.LeaveOneOut(smallest=1e-12, slack=0.0), kappa=1.0), **LOOSE),
    Case("residuals in groups with decay", mlp, floats(5), residuals, grouped),
    Case("kappa and rows of two", mlp, floats(5), losses, always(**EIGH, kappa=1.0, samples_per_row=2, lr=0.3)),
    Case("a fraction", mlp, floats(5), losses, always(**EIGH, fraction=0.4, seed=3, lr=0.3)),
    Case("named blocks", field, points, blocks, always(**DAMPED, lr=0.5)),
    Case("a clipped step", mlp, floats(5), losses, always(max_norm_ratio=1.0, solver=st.TruncatedEigh(rtol=1e-6))),
    Case("images", cnn, floats(2, 8, 8), losses, always(solver=st.Damped(1e-2, relative_to="max", exponent=0.5))),
    Case("a fraction of images", cnn, floats(2, 8, 8), losses, always(solver=st.Damped(1e-1), fraction=0.5)),
    Case("text", text, tokens, losses, always(solver=st.TruncatedEigh(rank=5))),
    Case("a fraction of text", text, tokens, residuals, always(**DAMPED, fraction=0.5)),
    Case("more rows than parameters", tiny, floats(5), residuals, always(**DAMPED, lr=0.5)),
    Case("primal", mlp, floats(5), losses, always(solver=st.TruncatedEigh(form="primal"), lr=0.3)),
    Case("by the SVD", mlp, floats(5), losses, always(solver=st.TruncatedSVD(rtol=1e-2), lr=0.3)),
    Case("by random directions", mlp, floats(5), losses, always(solver=st.RandomizedSVD(3), lr=0.3), tolerance=1e-8),
    Case("single precision", mlp, floats(5), losses,
         always(solver=st.Damped(1e-1, precision="float32")), tolerance=1e-5),
    Case("float32", cnn, floats(2, 8, 8), residuals, always(**DAMPED), tolerance=1e-5, dtype=torch.float32),
    Case("one backward for each row", recurrent, floats(4, 3), losses,
         lambda model: {"capture": st.ReferenceCapture(model), **EIGH, "lr": 0.2}),
]  # fmt: skip


def train(case: Case, batches: list[list[Data]], own: int | None) -> dict[str, Any]:
    """Some steps with one rank's part of each batch, or with all of it."""
    model = case.fresh()
    opt = st.Sven(model, **case.options(model))
    returned, seen, calls = [], [], 0
    for parts in batches:
        data = whole(parts) if own is None else parts[own]
        before = (opt.traffic.sent, opt.traffic.gathered, opt.traffic.reduced, opt.traffic.broadcast)
        closure, called = counting(case, model, data)
        returned.append(opt.step(closure))
        calls = len(called)
        after = (opt.traffic.sent, opt.traffic.gathered, opt.traffic.reduced, opt.traffic.broadcast)
        assert opt.diagnostics is not None
        seen.append((opt.diagnostics.rows, opt.diagnostics.rank, opt.diagnostics.update_norm, opt.diagnostics.clipped))
    return {
        "params": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "losses": torch.stack(returned),
        "seen": seen,
        "spectrum": opt.diagnostics.spectrum if opt.diagnostics else None,
        "state": [v for state in opt.state.values() for v in state.values()],
        "calls": calls,
        "traffic": tuple(b - a for a, b in zip(before, after, strict=True)),
        "buffers": [p.grad is None for p in model.parameters()],
    }


def counting(case: Case, model: nn.Module, data: Data) -> tuple[Callable[[], Any], list[None]]:
    called: list[None] = []

    def closure() -> Any:
        called.append(None)
        return case.rows(model, data)

    return closure, called


def all_cases(rank: int, world: int) -> list[dict[str, Any]]:
    return [train(case, [case.batches(world, step) for step in range(STEPS)], rank) for case in CASES]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_step_is_that_of_one_process_with_the_whole_batch(world: int, tmp_path: Path) -> None:
    found = run_ranks(world, tmp_path, all_cases)
    for number, case in enumerate(CASES):
        want = train(case, [case.batches(world, step) for step in range(STEPS)], None)
        assert want["traffic"] == (0, 0, 0, 0)
        first = found[0][number]
        for one in (rank[number] for rank in found):
            assert torch.equal(one["params"], first["params"]), case.name  # to the bit
            assert torch.equal(one["losses"], first["losses"]), case.name
            assert_identical(one["state"], first["state"], case.name)
            assert one["calls"] == want["calls"], case.name
            assert one["seen"] == first["seen"], case.name
            assert all(one["buffers"])
        moved = (want["params"] - torch.cat([p.detach().flatten() for p in case.fresh().parameters()])).norm()
        assert moved > 1e-3
        assert (first["params"] - want["params"]).norm() <= case.tolerance * want["params"].norm(), case.name
        torch.testing.assert_close(first["losses"], want["losses"], rtol=case.tolerance, atol=0)
        for mine, theirs in zip(first["seen"], want["seen"], strict=True):
            assert mine[:2] == theirs[:2], case.name
            assert mine[2] == pytest.approx(theirs[2], rel=max(1e-9, case.tolerance)), case.name
            assert mine[3] == theirs[3], case.name
        assert (first["spectrum"] is None) == (want["spectrum"] is None)
    _check_traffic(world, found)


def _check_traffic(world: int, found: list[list[dict[str, Any]]]) -> None:
    """The formula of the docstring, for the multilayer perceptrons of dual and primal form."""
    names = [case.name for case in CASES]
    for rank, one in enumerate(found):
        counts = EQUAL[:world]
        rows, most, size = sum(counts), max(counts), sum(p.numel() for p in mlp().parameters())
        # Of inputs and output gradients or of gradients, whichever is less.
        wire = [min(i + o, i * o + o) * 8 * counts[rank] for i, o in ((5, 12), (12, 9), (9, 1))]
        turns = [(world - 1) // 2 + (world % 2 == 0 and (rank < world // 2) != (n % 2 == 0)) for n in range(3)]
        assert one[names.index("losses")]["traffic"] == (
            sum(t * w for t, w in zip(turns, wire, strict=True)),
            most * (rows + 1) * 8 + most * 8,
            size * 8 + 8,
            88 + 8 * rows + 8 * rows,
        )
        _check_traffic_of_trials(one[names.index("default")], counts, rank, momentum=False)
        _check_traffic_of_trials(one[names.index("residuals and momentum")], UNEQUAL[:world], rank, momentum=True)
        counts = UNEQUAL[:world]
        assert one[names.index("primal")]["traffic"] == (
            0,
            max(counts) * 8,
            (size * size + size) * 8,
            88 + 8 * size + 8 * size,
        )


def _check_traffic_of_trials(found: dict[str, Any], counts: tuple[int, ...], rank: int, *, momentum: bool) -> None:
    """With a metric, leave-one-out and momentum."""
    rows, most, world, layers = sum(counts), max(counts), len(counts), ((5, 12), (12, 9), (9, 1))
    size = sum(i * o + o for i, o in layers)
    # A 1 is joined to the inputs; the ranks choose by what all of them send.
    wire = [min((i + 1) + o, i * o + o) * 8 * counts[rank] for i, o in layers]
    turns = [(world - 1) // 2 + (world % 2 == 0 and (rank < world // 2) != (n % 2 == 0)) for n in range(3)]
    factors = sum((i + 1) ** 2 + o**2 for i, o in layers) * 8 + 16 * len(layers)
    trials = found["calls"] - 1
    memory = len(next(value for value in found["state"] if isinstance(value, Tensor) and value.ndim == 1))
    assert trials >= 1
    assert found["traffic"] == (
        sum(t * w for t, w in zip(turns, wire, strict=True)),
        most * (rows + 1) * 8 + most * 8 * (2 if momentum else 1),
        factors + trials * (size * 8 + 8 + 8) + (size * 8 + 8 if momentum else 0),
        88 + 8 * rows + 8 * rows + 8 * memory,
    )


# ---- what goes wrong on one rank


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
    """Of options that one process alone has, and of the closure's second call."""
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

    first, *rest = model
    groups = [{"params": list(first.parameters()), "method": "adamw"}, {"params": list(rest[-1].parameters())}]
    opt = st.Sven(model, momentum=0.5, metric=st.KroneckerMetric())
    found: dict[str, Any] = {
        "levenberg": attempt(st.Sven(model, solver=st.LevenbergMarquardt()), good),
        "levenberg of one": attempt(st.Sven(model, solver=st.LevenbergMarquardt() if last else None), good),
        "adamw": attempt(st.Sven(model, params=groups), good),
        "momentum": attempt(st.Sven(model, momentum=0.5 if last else 0.2), good),
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
    torch.manual_seed(3)
    classes, inputs = nn.Linear(5, 4).double(), torch.randn(8, 5, dtype=torch.float64)
    here, targets = (inputs[:3], torch.arange(3)) if last else (inputs[3:5], torch.arange(3, 5) % 4)
    step = residuals_step(st.Sven(classes, rows="residuals"), classes, CrossEntropy(), here, targets)
    found["reported"] = step, inputs, [(p.detach().clone()) for p in classes.parameters()]
    found["new params"] = torch.cat([p.detach().flatten() for p in model.parameters()])
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
        opt = st.Sven(wrapper)
    alone = st.Sven(plain)
    for _ in range(3):
        opt.step(lambda: losses(wrapper, data))
        alone.step(lambda: losses(plain, data))
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


def test_what_goes_wrong_on_one_rank_raises_on_all_and_changes_nothing(tmp_path: Path) -> None:
    world = 3
    found = run_ranks(world, tmp_path, failures)
    told = f"Rank {world - 1} of {world} failed, so that none goes on. It said: "
    for rank, one in enumerate(found):
        last = rank == world - 1
        assert one["fresh state"]
        for name, kind, text_ in (
            ("nan", "NonFiniteError", "1 of 4 losses"),
            ("error", "KeyError", "user"),
            ("no closure", "ClosureError", "needs a closure"),
            ("reduced", "ClosureError", "It looks reduced"),
        ):
            prefix = kind if last else ("NonFiniteRankError: " if name == "nan" else "RankError: ") + told + kind
            assert one[name].startswith(prefix), one[name]
            assert text_ in one[name]
        assert f"what the closure returns is a tensor on rank 0 and a dict on rank {world - 1}" in one["dict"]
        assert "dtype of the rows is torch.float64 on rank 0 and torch.float32" in one["half"]
        assert one["skipped"] == ["skipped", "stepped", "skipped"]
        assert one["not skipped"].startswith("KeyError" if rank == 0 else "RankError: Rank 0")
        assert one["count"] == 2
        assert f"lr is [0.1] on rank 0 and [0.5] on rank {world - 1}" in one["lr"]
        assert "solver is Damped(damping=0.2" in one["solver"]
        assert "number of parameters is" in one["fewer"]
        assert one["broken"].startswith("ValueError: no sol" if rank == 0 else "RankError: Rank 0")
        assert one["odd"] == "stepped"
        assert one["overflow"].startswith("NonFiniteError: The Gram of the per-sample gradients holds NaN or infinity")
        assert one["too far"].startswith("NonFiniteError: The update reaches")
        assert f"Parameter '2.weight' is not the same on rank 0 and on rank {world - 1}" in one["start"]
        assert "Parameter '0.bias' is not the same" in one["frozen"]
        for name, text_ in (("levenberg", "solver=LevenbergMarquardt"), ("adamw", "method='adamw'")):
            assert one[name].startswith("InvalidOptionError"), one[name]
            assert f"{text_}" in one[name]
            assert "works in one process" in one[name]
        assert "solver=LevenbergMarquardt(...) works in one process" in one["levenberg of one"]
        assert one["levenberg of one"].startswith("InvalidOptionError" if last else "RankError")
        assert f"momentum is 0.2 on rank 0 and 0.5 on rank {world - 1}" in one["momentum"]
        assert "metric is None on rank 0 and KroneckerMetric(" in one["metric"]
        assert "weights is {'some': 1.0} on rank 0 and {'some': 2.0}" in one["weights"]
        assert "a weight for 'other', and the closure returned the blocks 'some'" in one["unknown"]
        assert one["before"] == one["after"] == "stepped"
        assert one["second"].startswith("KeyError" if last else "RankError: " + told + "KeyError"), one["second"]
        assert one["second nan"] == one["second worse"] == "stepped"  # whole steps that moved nothing
        assert one["given up"]
        assert one["as it was"]
        assert torch.equal(one["new params"], found[0]["new params"])
        assert torch.equal(one["reported"][0], found[0]["reported"][0])
        assert_identical(one["reported"][2], found[0]["reported"][2])
        assert one["after all"] == ["stepped", "stepped"]
        assert one["saved"]
        assert torch.equal(one["params"], found[0]["params"])
        assert one["wrapped"]["same"]
        assert one["wrapped"]["names"] == ["0.weight"]
        (said,) = one["wrapped"]["said"]
        assert "Sven trains the module inside DistributedDataParallel" in said
        assert torch.equal(one["lengths"]["params"], found[0]["lengths"]["params"])
    _check_reported(world, found[0]["reported"][0])
    torch.manual_seed(5)
    model = text().double()
    opt = st.Sven(model, solver=st.Damped(1e-2), capture=st.ReferenceCapture(model))
    loss = opt.step(lambda: torch.cat([model(sentences(rank)).flatten().square() for rank in range(world)]))
    torch.testing.assert_close(found[0]["lengths"]["loss"], loss, rtol=1e-12, atol=0)
    want = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (found[0]["lengths"]["params"] - want).norm() <= 1e-10 * want.norm()


def _check_reported(world: int, loss: Tensor) -> None:
    """A step by residuals tells the mean loss of all samples: three on the last rank, two on the others."""
    torch.manual_seed(3)
    classes, inputs = nn.Linear(5, 4).double(), torch.randn(8, 5, dtype=torch.float64)
    each = nn.functional.cross_entropy(classes(inputs[:5]), torch.tensor([0, 1, 2, 3, 0]), reduction="none").detach()
    want = (each[:3].sum() + (world - 1) * each[3:].sum()) / (3 + 2 * (world - 1))
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)


def test_one_process_alone_sends_nothing() -> None:
    model = mlp()
    opt = st.Sven(model)
    opt.step(lambda: model(torch.ones(3, 5)).square().sum(1))
    assert dataclasses.asdict(opt.traffic) == dict.fromkeys(dataclasses.asdict(opt.traffic), 0)
    assert isinstance(opt.state_dict()["state"][0], Mapping)

"""Problems that Sven solves on several processes, and on one with the batches put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import steepest as st
from zoo_parts import Net, param

EQUAL, UNEQUAL, MANY = (4, 4, 4, 4), (6, 2, 4, 8), (150, 20, 60, 80)
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


def near(model: Any, data: Data) -> Tensor:
    """Conditions that are all but met, wherever the model is."""
    found = model(data["x"]).flatten()
    return found - found.detach() + 0.1 * data["y"]


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


def curved(model: Any, data: Data) -> dict[str, Tensor]:
    """An equation with second derivatives, by plain autograd, and its boundary."""
    points = data["x"].detach().requires_grad_()
    u = model(points)
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    seconds = [torch.autograd.grad(slope[:, i].sum(), points, create_graph=True)[0][:, i] for i in (0, 1)]
    return {"equation": seconds[0] + seconds[1] - u[:, 0] * slope[:, 0] - 2, "edge": model(data["edge"])[:, 0]}


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 1))


def recurrent() -> nn.Module:
    return Net(lambda n, x: n.last(n.cell(x)[0][:, -1]), cell=nn.LSTM(3, 4, batch_first=True), last=nn.Linear(4, 1))


def plane() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


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


def parted(**options: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """AdamW trains the first layer, or all that has no layer."""

    def groups(model: nn.Module) -> dict[str, Any]:
        others = [model.scale] if hasattr(model, "scale") else list(model[0].parameters())
        ids = {id(p) for p in others}
        rest = [p for p in model.parameters() if id(p) not in ids]
        adamw = {"params": others, "method": "adamw", "lr": 0.03, "weight_decay": 0.1, "betas": (0.8, 0.9)}
        return {"params": [adamw, {"params": rest}], **options}

    return groups


def always(**options: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: options


EIGH: dict[str, Any] = {"solver": st.TruncatedEigh(rtol=1e-3)}
DAMPED: dict[str, Any] = {"solver": st.Damped(1e-2), "rows": "residuals"}
TRIED: dict[str, Any] = {"solver": st.LevenbergMarquardt(), "rows": "residuals"}
FILTERED: dict[str, Any] = {"solver": st.KalmanFilter(), "rows": "residuals"}
# The default of models that are not small.
LARGE: dict[str, Any] = {
    "kappa": 1.0,
    "solver": st.LeaveOneOut(),
    "metric": st.KroneckerMetric(),
    "relative_decay": 2e-3,
}
DUAL: dict[str, Any] = {"solver": st.LevenbergMarquardt(max_primal=0), "rows": "residuals"}
# Leave-one-out decides by sums that rounding changes: of eigenvectors, more than of anything else.
LOOSE: dict[str, Any] = {"tolerance": 1e-9}
CASES = [
    Case("losses", mlp, floats(5), losses, always(**EIGH, lr=0.3), EQUAL),
    Case("default of small models", mlp, floats(5), far_losses),
    Case("default", mlp, floats(5), far_losses, always(**LARGE), EQUAL, **LOOSE),
    Case("default of parts", mlp, floats(5), far_losses, always(**LARGE), **LOOSE),
    Case("residuals and momentum", mlp, floats(5), far, always(rows="residuals", momentum=0.6), **LOOSE),
    Case("untried", mlp, floats(5), far_losses, always(solver=st.LeaveOneOut(verify=False), kappa=1.0), **LOOSE),
    Case("metric", mlp, floats(5), residuals, always(**DAMPED, metric=st.KroneckerMetric(every=2), momentum=0.5)),
    Case("balanced metric", mlp, floats(5), residuals, always(**DAMPED, metric=st.BalancedMetric(), momentum=0.5)),
    Case("metric of images", cnn, floats(2, 8, 8), residuals, always(**DAMPED, metric=st.KroneckerMetric(power=0.5))),
    Case("metric of text", text, tokens, residuals, always(**DAMPED, metric=st.KroneckerMetric())),
    Case("vector rows", wide, floats(5), vectors, always(**LARGE, rows="residuals"), **LOOSE),
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
    Case("more rows than parameters, each left out", tiny, floats(5), residuals, always(**LARGE, rows="residuals"),
         **LOOSE),
    Case("primal", mlp, floats(5), losses, always(solver=st.TruncatedEigh(form="primal"), lr=0.3)),
    Case("by the SVD", mlp, floats(5), losses, always(solver=st.TruncatedSVD(rtol=1e-2), lr=0.3)),
    Case("by random directions", mlp, floats(5), losses, always(solver=st.RandomizedSVD(3), lr=0.3), tolerance=1e-8),
    Case("single precision", mlp, floats(5), losses,
         always(solver=st.Damped(1e-1, precision="float32")), tolerance=1e-5),
    Case("float32", cnn, floats(2, 8, 8), residuals, always(**DAMPED), tolerance=1e-5, dtype=torch.float32),
    Case("adamw", mlp, floats(5), far, parted(**DAMPED, lr=0.3)),
    Case("adamw of losses", mlp, floats(5), far_losses, parted(**LARGE), **LOOSE),
    Case("adamw and rows of two", mlp, floats(5), losses, parted(**EIGH, kappa=1.0, samples_per_row=2)),
    Case("adamw of vectors", wide, floats(5), vectors, parted(**DAMPED, momentum=0.4, fraction=0.5)),
    Case("adamw of blocks", field, points, blocks, parted(**DAMPED, weights={"here": 4.0, "edge": 0.3})),
    Case("levenberg", mlp, floats(5), far, always(**TRIED)),
    Case("levenberg of rows", mlp, floats(5), far, always(**DUAL)),
    Case("levenberg of more rows than parameters", tiny, floats(5), far, always(**DUAL)),
    Case("levenberg with rate, decay and momentum", mlp, floats(5), far,
         always(**TRIED, lr=0.5, weight_decay=0.1, momentum=0.4)),
    Case("levenberg of rows with momentum", mlp, floats(5), far, always(**DUAL, momentum=0.4)),
    Case("levenberg in the metric", mlp, floats(5), far, always(**TRIED, metric=st.KroneckerMetric()), **LOOSE),
    Case("levenberg of blocks", field, points, blocks, always(**TRIED, weights={"here": 4.0})),
    Case("levenberg of vectors and a fraction", wide, floats(5), vectors, always(**TRIED, fraction=0.5)),
    Case("levenberg and adamw", mlp, floats(5), far, parted(**TRIED)),
    Case("levenberg in float32", mlp, floats(5), far, always(**TRIED), tolerance=1e-4, dtype=torch.float32),
    Case("kalman", mlp, floats(5), far, always(**FILTERED)),
    Case("kalman of losses with rate, decay and momentum", mlp, floats(5), far_losses,
         always(solver=st.KalmanFilter(), kappa=1.0, lr=0.5, weight_decay=0.1, momentum=0.4)),
    Case("kalman of more rows than parameters", tiny, floats(5), far, always(**FILTERED)),
    Case("kalman of blocks beside adamw", field, points, blocks, parted(**FILTERED, weights={"here": 4.0})),
    Case("kalman of vectors", wide, floats(5), vectors, always(**FILTERED)),
    Case("kalman of many rows", mlp, floats(5), far, always(**FILTERED), MANY),
    Case("kalman in float32", mlp, floats(5), far, always(**FILTERED), tolerance=1e-4, dtype=torch.float32),
    Case("a relative decay", mlp, floats(5), near, always(**DAMPED, relative_decay=0.5)),
    Case("a relative decay with rate, decay and momentum", mlp, floats(5), far,
         always(**DAMPED, relative_decay=0.3, weight_decay=0.1, momentum=0.4, fraction=0.5, lr=0.4)),
    Case("a relative decay in the metric", mlp, floats(5), near,
         always(**DAMPED, relative_decay=0.5, metric=st.KroneckerMetric())),
    Case("a relative decay of blocks beside adamw", field, points, blocks, parted(**DAMPED, relative_decay=0.2)),
    Case("levenberg with a relative decay", mlp, floats(5), far, always(**TRIED, relative_decay=0.01)),
    Case("a relative decay, one backward for each row", recurrent, floats(4, 3), near,
         lambda model: {"capture": st.ReferenceCapture(model), **DAMPED, "relative_decay": 0.5}),
    Case("one backward for each row", recurrent, floats(4, 3), losses,
         lambda model: {"capture": st.ReferenceCapture(model), **EIGH, "lr": 0.2}),
    Case("an equation, one backward for all rows", plane, points, curved,
         lambda model: {"capture": st.BatchedCapture(model), **DAMPED, "weights": {"edge": 5.0}, "fraction": 0.5}),
    Case("levenberg of an equation, one backward for all rows", plane, points, curved,
         lambda model: {"capture": st.BatchedCapture(model), **TRIED, "weights": {"edge": 5.0}}),
]  # fmt: skip

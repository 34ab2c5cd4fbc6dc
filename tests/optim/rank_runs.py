"""Runs of KFAC and FOP on several processes, and the same on one with their batches put together."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import steepest as st
from optim.kfac_runs import DOUBLE
from ranks import run_ranks
from steepest.optim.triangles import packed_size
from zoo_parts import Net

PERIODS: dict[str, Any] = {"factor_update_steps": 2, "inverse_update_steps": 4}
COMMON: dict[str, Any] = {
    "lr": 0.2, "damping": 0.03, "kl_clip": 1e-2, "momentum": 0.7, "embeddings": "kronecker", **PERIODS,
}  # fmt: skip
CLASSES = 3
# Who does what: "half" is teams of two of four ranks, and "sharded" of two or three.
MODES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "sharded": {"distribution": "sharded"},
    "hybrid": {"distribution": "hybrid"},
    "half": {"distribution": "hybrid", "hybrid_fraction": 0.5},
}
# Layers (n, m) of the model, which one is a table, and how many parameters there are: tensors and numbers.
SIDES, TABLE, TENSORS, NUMBERS = [(4, 7), (5, 13), (3, 16)], 0, 7, 28 + 65 + 10 + 48
MATRICES = sum(n * m for n, m in SIDES)
TRIANGLES = sum((m if i == TABLE else packed_size(m)) + packed_size(n) for i, (n, m) in enumerate(SIDES))
BASES = [n * n + n + m + (m if i == TABLE else m * m) for i, (n, m) in enumerate(SIDES)]


def counts_bytes(world: int) -> int:
    """What every rank gives to the sum of counts, and to the verdict on one group of layers."""
    return 8 * (3 + 4 * world + TENSORS + 4 * len(SIDES)) + 8 * 3


def words() -> nn.Module:
    """Embedding, convolution, LayerNorm and linear layers; AdamW trains the norm and the positions."""
    torch.manual_seed(0)
    return Net(
        lambda n, x: n.out(n.norm(n.conv(n.table(x).mT).mT).tanh().flatten(1)),
        table=nn.Embedding(7, 4), conv=nn.Conv1d(4, 5, 3), norm=nn.LayerNorm(5), out=nn.Linear(15, CLASSES),
    )  # fmt: skip


def batch(rows: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(7, (rows, 5), generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


@dataclass(frozen=True)
class Case:
    """One run: ``sizes`` of the local batches, each cut into ``micro`` parts; ``wrap`` is how DDP is used."""

    sizes: tuple[int, ...]
    kind: str = "KFAC"
    options: dict[str, Any] = field(default_factory=dict)
    wrap: str = "plain"
    micro: int = 1
    passes: bool = False
    steps: int = 6
    dtype: torch.dtype = DOUBLE

    @property
    def offsets(self) -> Iterator[slice]:
        start = 0
        for size in self.sizes:
            yield slice(start, start + size)
            start += size


def build(case: Case) -> tuple[nn.Module, st.KFAC, nn.Module]:
    """The model, its optimizer, and what the loop calls."""
    model = words().to(case.dtype)
    called = model if case.wrap == "plain" else DistributedDataParallel(model)
    given = called if case.wrap == "ddp" else model
    return model, getattr(st, case.kind)(given, **{**COMMON, **case.options}), called


def backward_parts(case: Case, opt: Any, called: nn.Module, x: Tensor, y: Tensor) -> None:
    """The backwards of one step of one process: in micro-batches, or in the two passes of FOP."""
    if case.passes:
        for index, (xs, ys) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            with opt.sub_batch(index):
                F.cross_entropy(called(xs), ys).backward()
        return
    for k, (xs, ys) in enumerate(zip(x.chunk(case.micro), y.chunk(case.micro), strict=True)):
        idle = k + 1 < case.micro and isinstance(called, DistributedDataParallel)
        with called.no_sync() if idle else nullcontext():
            (F.cross_entropy(called(xs), ys) / case.micro).backward()


def on_ranks(rank: int, case: Case) -> dict[str, Any]:
    """One rank's run."""
    model, opt, called = build(case)
    local = list(case.offsets)[rank]
    for step in range(case.steps):
        x, y = batch(sum(case.sizes), step)
        opt.zero_grad()
        backward_parts(case, opt, called, x[local], y[local])
        opt.step()
    return outcome(model, opt)


def alone(case: Case) -> dict[str, Any]:
    """The same run in one process: its k-th micro-batch, or pass, is made of the k-th of all ranks.

    The gradient of unequal local batches is the mean over ranks of their means: it replaces that of the whole batch,
    of which the factors are made. So does half of it: that of the first ranks.
    """
    case = replace(case, wrap="plain")
    model, opt, called = build(case)
    count = 2 if case.passes else case.micro
    order = [
        i for k in range(count) for part in case.offsets for i in torch.arange(10**4)[part].chunk(count)[k].tolist()
    ]
    for step in range(case.steps):
        x, y = batch(sum(case.sizes), step)
        opt.zero_grad()
        backward_parts(case, opt, called, x[order], y[order])
        if len(set(case.sizes)) > 1:
            means = [mean_gradients(model, x[part], y[part]) for part in case.offsets]
            for p, *grads in zip(model.parameters(), *means, strict=True):
                p.grad.copy_(torch.stack(grads).mean(0))
            for name, block in opt._blocks.items() if case.kind == "FOP" else ():
                firsts = [block.join([mean[n] for n in block.names]) for mean in named(model, means)]
                opt._halves[name] = torch.stack(firsts[: len(firsts) // 2]).sum(0)
        opt.step()
    return outcome(model, opt)


def named(model: nn.Module, means: list[list[Tensor]]) -> list[dict[str, Tensor]]:
    return [dict(zip((name for name, _ in model.named_parameters()), mean, strict=True)) for mean in means]


def mean_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    other = copy.deepcopy(model)
    return list(torch.autograd.grad(F.cross_entropy(other(x), y), list(other.parameters())))


def outcome(model: nn.Module, opt: Any) -> dict[str, Any]:
    ranks = opt._crew.ranks
    traffic = None if ranks is None else copy.copy(ranks.traffic)
    return {
        "params": {name: p.detach().clone() for name, p in model.named_parameters()},
        "diagnostics": opt.diagnostics,
        "layers": {name.removeprefix("module."): layer for name, layer in getattr(opt, "layers", {}).items()},
        "traffic": traffic,
        "state": copy.deepcopy(opt.state_dict()),
        "held": sum(bool(opt.state[b.weight].get("decomposition")) for b in opt._blocks.values()),
    }


def running(work: Callable[..., Any], *args: Callable[[], Any]) -> Callable[..., Any]:
    """A fixture: what every rank of a world found, each world started once, which takes longest."""

    @pytest.fixture(scope="module")
    def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
        return functools.cache(
            lambda world: run_ranks(world, tmp_path_factory.mktemp("ranks"), work, *(given() for given in args))
        )

    return ran


def run_all(rank: int, world: int, cases: dict[str, Case]) -> dict[str, Any]:
    return {name: on_ranks(rank, case) for name, case in cases.items()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float, atol: float, name: str = "") -> None:
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{name} {key} {text}"
        )


def assert_identical(a: Any, b: Any, path: str = "") -> None:
    """Nested states, to the bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_identical(left, right, f"{path}[{i}]")
    else:
        assert a == b, path


# -- what goes wrong, and what is saved --------------------------------------------------------------


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Any:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def broken(error: Exception) -> Any:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    return fail


def told(action: Callable[..., Any], *args: Any) -> str:
    try:
        action(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def saved(model: nn.Module, opt: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    return buffer.getvalue()


def load(model: nn.Module, opt: Any, data: bytes) -> None:
    state = torch.load(io.BytesIO(data), weights_only=True)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])

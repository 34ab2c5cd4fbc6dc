"""LPSGD's and LPSGDM's step against torch's AdamW and SGD: time in turn in one process, and memory beside parameters.

    python benchmarks/lpsgd_step.py [--threads 1] [--quick]

Ten million parameters in 40 tensors and in 400. `over_adamw` is the time over that of AdamW(foreach=True); `extra` the
bytes that were live at the same time during a step, beyond parameters, gradients and state, over the parameters'.
LPSGDM's rows: as it is by default, without looking for NaN, tensor by tensor, with p = 2, and as one compiled pass,
whose memory this cannot see.
"""

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steepest as st
from records import write

Row = dict[str, object]
RIVALS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "AdamW(foreach=True)": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "AdamW()": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "AdamW(fused=True)": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "SGD(foreach=True)": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, foreach=True),
    "LPSGD()": lambda params: st.LPSGD(params, lr=1e-3, weight_decay=0.01),
    "LPSGDM()": lambda params: st.LPSGDM(params, lr=1e-3, weight_decay=0.01),
    "LPSGDM(weight_decay=0)": lambda params: st.LPSGDM(params, lr=1e-3),
    "LPSGDM(on_nonfinite='ignore')": lambda params: st.LPSGDM(
        params, lr=1e-3, weight_decay=0.01, on_nonfinite="ignore"
    ),
    "LPSGDM(foreach=False)": lambda params: st.LPSGDM(params, lr=1e-3, weight_decay=0.01, foreach=False),
    "LPSGDM(p=2)": lambda params: st.LPSGDM(params, lr=1e-3, p=2.0, weight_decay=0.01),
    "LPSGDM(fused=True)": lambda params: st.LPSGDM(params, lr=1e-3, weight_decay=0.01, fused=True),
}


class Peak(TorchDispatchMode):
    """Bytes of tensors that were made inside and were live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given | self.known:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        self.known.add(place)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def freed() -> None:
            self.alive -= size
            self.known.discard(place)

        weakref.finalize(storage, freed)


def parameters(total: int, tensors: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = [
        torch.nn.Parameter(torch.randn(total // tensors, generator=generator)) for _ in range(tensors)
    ]
    for param in params:
        param.grad = 1e-2 * torch.randn(param.shape, generator=generator)
    return params


def measure(total: int, tensors: int, repetitions: int) -> list[Row]:
    """Rows of the record for one number of tensors."""
    times: dict[str, list[float]] = {name: [] for name in RIVALS}
    extra: dict[str, float | None] = {}
    optimizers = {name: make(parameters(total, tensors)) for name, make in RIVALS.items()}
    for name, optimizer in optimizers.items():
        optimizer.step()
        extra[name] = None
        if "fused" not in name:  # a compiled pass that has run under a mode once stays slow
            with Peak() as memory:
                optimizer.step()
            extra[name] = memory.peak / (4 * total)
    for _ in range(repetitions):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return [
        {
            "tensors": tensors,
            "optimizer": name,
            "ms": 1e3 * seconds,
            "over_adamw": seconds / medians["AdamW(foreach=True)"],
            "over_sgd": seconds / medians["SGD(foreach=True)"],
            "extra": extra[name],
        }
        for name, seconds in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size, three repetitions; no record")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    total, repetitions = (100_000, 3) if given.quick else (10_000_000, 31)
    rows = [row for tensors in (40, 400) for row in measure(total, tensors, repetitions)]
    if given.quick:
        for row in rows:
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
    else:
        write("lpsgd_step", [{"threads": given.threads, **row} for row in rows])


if __name__ == "__main__":
    main()

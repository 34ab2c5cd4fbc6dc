"""Time of the Gram, forward pass included, against torchjd's autogram engine, in turn in one process.

make peers && python benchmarks/torchjd_gram.py
"""

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torchjd.autogram import Engine

import steepest as st
from models import make
from records import write


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for name, batch, repetitions in (("mlp_small", 64, 10), ("mlp_wide", 128, 5)):
        problem = make(name, batch)
        twin = make(name, batch)
        capture, engine = st.Capture(problem.model), Engine(twin.model, batch_dim=0)

        def ours(problem=problem, capture=capture) -> torch.Tensor:
            with capture:
                losses = problem.losses()
            return capture.jacobian(losses).gram()

        def theirs(twin=twin, engine=engine) -> torch.Tensor:
            return engine.compute_gramian(twin.losses())

        difference = float((ours() - theirs()).abs().max() / ours().abs().max())
        for _ in range(3):
            ours()
        pairs = [(timed(ours), timed(theirs)) for _ in range(repetitions)]
        rows.append(
            {
                "model": name, "batch": batch, "relative_difference": difference,
                "steepest_ms": 1e3 * statistics.median(o for o, _ in pairs),
                "torchjd_ms": 1e3 * statistics.median(t for _, t in pairs),
                "speedup": statistics.median(t / o for o, t in pairs),
            }
        )  # fmt: skip
    write("torchjd_gram", rows)


if __name__ == "__main__":
    main()

"""Sven's step against Adam's: time (in turn, in one process) and peak memory.

    python benchmarks/sven_step.py [--quick] [--threads 2]

Every row trains both optimizers on the same model and batch in turn and reports the median of the pairwise ratios.
Peak memory is that of all tensors, model, data and optimizer state among them, in the third step; `first_mb` is
Sven's in the first, when the engine probes which dimension carries the rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import steepest as st
from models import Problem, make
from records import write
from steepest.training.memory import peak_memory

SOLVERS: dict[str, Callable[[], st.optim.Solver]] = {
    "eigh": lambda: st.TruncatedEigh(rtol=1e-3),
    "cholesky": lambda: st.Damped(1e-2),
    "cholesky_float32": lambda: st.Damped(1e-2, precision="float32"),
}
# model, batch, solver, target ratio, repetitions
CASES = [
    ("mlp_wide", 128, "eigh", 0.8, 30),
    ("mlp_wide", 128, "cholesky", 0.8, 30),
    ("mlp_wide", 128, "cholesky_float32", 0.8, 30),
    ("mlp_small", 64, "eigh", 1.2, 200),
    ("mlp_small", 64, "cholesky", 1.2, 200),
    ("mlp_wide", 512, "cholesky", 1.3, 12),
    ("mlp_wide", 512, "eigh", 2.2, 12),
    ("mlp_wide", 512, "cholesky_float32", 1.3, 12),
    ("gpt", 64, "cholesky", 2.0, 5),
    ("resnet18", 128, "cholesky", 3.0, 2),
    ("resnet18", 128, "cholesky_float32", 3.0, 2),
]


def adam_step(problem: Problem) -> Callable[[], object]:
    opt = torch.optim.Adam(problem.model.parameters())

    def step() -> None:
        opt.zero_grad()
        problem.losses().mean().backward()
        opt.step()

    return step


def sven_step(problem: Problem, solver: str) -> Callable[[], object]:
    opt = st.Sven(problem.model, lr=1e-3, solver=SOLVERS[solver]())
    return lambda: opt.step(problem.losses)


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_bytes(model: str, batch: int, optimizer: str) -> tuple[float, float]:
    """Megabytes of model, data, state and temporaries in the first and in the third step."""
    problem = make(model, batch)
    resident = [*problem.model.parameters(), problem.inputs, problem.targets]
    step = adam_step(problem) if optimizer == "adam" else sven_step(problem, optimizer)
    state = 2 * sum(p.numel() * p.itemsize for p in problem.model.parameters()) if optimizer == "adam" else 0
    held = sum(t.numel() * t.itemsize for t in resident)
    first = held + peak_memory("cpu", step)
    step()
    return first / 1e6, (held + state + peak_memory("cpu", step)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="leave out GPT and ResNet-18")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for model, batch, solver, target, repetitions in CASES:
        if args.quick and model in {"gpt", "resnet18"}:
            continue
        adam, sven = adam_step(make(model, batch)), sven_step(make(model, batch), solver)
        for _ in range(2 if repetitions < 10 else 5):
            adam(), sven()
        pairs = [(timed(adam), timed(sven)) for _ in range(repetitions)]
        memory = {name: peak_bytes(model, batch, name) for name in ("adam", solver)}
        rows.append({
            "model": model,
            "batch": batch,
            "solver": solver,
            "adam_ms": 1e3 * statistics.median(a for a, _ in pairs),
            "sven_ms": 1e3 * statistics.median(s for _, s in pairs),
            "ratio": statistics.median(s / a for a, s in pairs),
            "target": target,
            "adam_mb": memory["adam"][1],
            "sven_mb": memory[solver][1],
            "memory_ratio": memory[solver][1] / memory["adam"][1],
            "first_mb": memory[solver][0],
        })
        print(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True
        )
    write("sven_step", rows)


if __name__ == "__main__":
    main()

"""KFAC's and FOP's step against SGD's with momentum: time in turn in one process.

    python benchmarks/kfac_step.py [--threads 2]

Plain steps, what an update of the factors adds to one, and a decomposition of all layers are timed apart;
`fop_over_sgd` and `fop_over_kfac` are what a step costs on average at refresh periods of 10 and 100 steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import steepest as st
from models import Problem, make
from records import write

NEVER = 10**9
# model, batch, repetitions
# No ResNet-18: the eigenbasis of a factor of 4,609 inputs takes half a minute on a CPU.
CASES = [("mlp_wide", 512, 12), ("mlp_wide", 4096, 6), ("mlp_small", 64, 200)]


def stepper(problem: Problem, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    def step() -> None:
        optimizer.zero_grad()
        problem.losses().mean().backward()
        optimizer.step()

    return step


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def decomposition_seconds(optimizer: torch.optim.Optimizer, problem: Problem) -> float:
    """Seconds to decompose the factors of every layer once."""
    solver, total = st.Eigenbasis(), 0.0
    for parameter in problem.model.parameters():
        state = optimizer.state[parameter]
        if "input_factor" in state:
            total += timed(lambda s=state: solver.decompose(s["input_factor"], s["grad_factor"], 1e-3))
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    rows = []
    for model, batch, repetitions in CASES:
        problems = {name: make(model, batch) for name in ("sgd", "kfac", "fop", "factors")}
        made: dict[str, torch.optim.Optimizer] = {
            "sgd": torch.optim.SGD(problems["sgd"].model.parameters(), lr=1e-3, momentum=0.9),
            "kfac": st.KFAC(problems["kfac"].model, lr=1e-3, factor_update_steps=NEVER),
            "fop": st.FOP(problems["fop"].model, lr=1e-3, factor_update_steps=NEVER),
            "factors": st.KFAC(problems["factors"].model, lr=1e-3, factor_update_steps=1, inverse_update_steps=NEVER),
        }
        steps = {name: stepper(problems[name], optimizer) for name, optimizer in made.items()}
        for name, step in steps.items():
            # The first ten steps all update the factors; the 1st, 2nd, 4th, 8th and 16th decompose them.
            for _ in range({"sgd": 2, "factors": 8}.get(name, 11)):
                step()
        rounds = [{name: timed(step) for name, step in steps.items() if name != "factors"} for _ in range(repetitions)]
        times = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        factors = statistics.median(timed(steps["factors"]) for _ in range(min(repetitions, 7))) - times["kfac"]
        decompose = decomposition_seconds(made["kfac"], problems["kfac"])
        mean = {name: times[name] + factors / 10 + decompose / 100 for name in ("kfac", "fop")}
        rows.append({
            "model": model,
            "batch": batch,
            "sgd_ms": 1e3 * times["sgd"],
            "kfac_ms": 1e3 * times["kfac"],
            "fop_ms": 1e3 * times["fop"],
            "factors_ms": 1e3 * factors,
            "decompose_ms": 1e3 * decompose,
            "kfac_over_sgd": mean["kfac"] / times["sgd"],
            "fop_over_sgd": mean["fop"] / times["sgd"],
            "fop_over_kfac": mean["fop"] / mean["kfac"],
        })
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    write("kfac_step", rows)


if __name__ == "__main__":
    main()

"""KFAC's and FOP's step against SGD's with momentum: time in turn in one process, and floating point operations.

    python benchmarks/kfac_step.py [--threads 2] [--cases mlp_small] [--solvers cholesky] [--slow] [--quick]

Plain steps, what an update of the factors adds to one, and what a decomposition of all layers adds to that are timed
apart; `fop_over_sgd` and `fop_over_kfac` are what a step costs on average at refresh periods of 10 and 100 steps.
`*_gflop` are the counted products and convolutions of one plain step, `factors_gflop` those that an update of KFAC's
factors adds. Where the hardware is busy with products, their ratio bounds what any writing of these steps can reach.

The slow case, a ResNet-18 with GroupNorm at CIFAR size, takes half an hour and has a record of its own. It is run with
Cholesky only: the eigenbasis of a factor of 4,609 inputs takes half a minute on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

import steepest as st
from models import Problem, make
from records import write
from steepest.linalg.kronecker import KroneckerSolver

NEVER = 10**9
# model, batch, repetitions
CASES = [("mlp_wide", 512, 12), ("mlp_wide", 4096, 6), ("mlp_small", 64, 200), ("resnet_small", 128, 7)]
SLOW = [("resnet18", 512, 1)]
SOLVERS: dict[str, KroneckerSolver] = {"eigenbasis": st.Eigenbasis(), "cholesky": st.Cholesky()}
UPDATE = 10
Row = dict[str, object]


class Stepper:
    """Steps of one optimizer; KFAC and FOP are told at each what it does beside moving the parameters."""

    def __init__(self, problem: Problem, optimizer: torch.optim.Optimizer) -> None:
        self.problem, self.optimizer = problem, optimizer
        self._train()  # the first step updates and decomposes
        if isinstance(optimizer, st.KFAC):
            # As if many updates lay behind: young factors are decomposed sooner than the period says.
            for block in optimizer._blocks.values():
                optimizer.state[block.weight]["updates"] = NEVER
        self.plain()

    def plain(self) -> None:
        self._step(UPDATE + 1, NEVER)

    def updating(self) -> None:
        self._step(UPDATE, NEVER)

    def decomposing(self) -> None:
        self._step(UPDATE, UPDATE)

    def _step(self, number: int, inverse_update_steps: int) -> None:
        optimizer = self.optimizer
        if not isinstance(optimizer, st.KFAC):
            self._train()
            return
        optimizer._memory["steps"], optimizer._inverse_update_steps = number, inverse_update_steps
        self._train()
        expected = len(optimizer._blocks) if inverse_update_steps == UPDATE else 0
        assert optimizer.diagnostics.num_decompositions == expected, "the schedule is another one than this file knows"

    def _train(self) -> None:
        self.optimizer.zero_grad()
        self.problem.losses().mean().backward()
        self.optimizer.step()

    def refresh(self, repetitions: int) -> tuple[float, float]:
        """Seconds that an update adds to a plain step, and a decomposition to an update."""
        self.updating()
        rounds = [tuple(map(timed, (self.plain, self.updating, self.decomposing))) for _ in range(repetitions)]
        return statistics.median(u - p for p, u, _ in rounds), statistics.median(d - u for _, u, d in rounds)


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def gflop(step: Callable[[], object]) -> float:
    """Billions of floating point operations of products and convolutions, as torch counts them."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
        step()
    return counter.get_total_flops() / 1e9


def _addmm_flop(_total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: object) -> int:
    """The product in place, of which the factors are made; torch counts the others."""
    return 2 * left[0] * left[1] * right[1]


def measure(model: str, batch: int, repetitions: int, solver: str) -> Row:
    """One row of the record."""
    problems = {name: make(model, batch) for name in ("sgd", "kfac", "fop")}
    options = {"lr": 1e-3, "factor_update_steps": UPDATE, "solver": SOLVERS[solver]}
    steppers = {
        "sgd": Stepper(problems["sgd"], torch.optim.SGD(problems["sgd"].model.parameters(), lr=1e-3, momentum=0.9)),
        "kfac": Stepper(problems["kfac"], st.KFAC(problems["kfac"].model, **options)),
        "fop": Stepper(problems["fop"], st.FOP(problems["fop"].model, **options)),
    }
    for stepper in steppers.values():
        stepper.plain()
    rounds = [{name: timed(stepper.plain) for name, stepper in steppers.items()} for _ in range(repetitions)]
    plain = {name: statistics.median(r[name] for r in rounds) for name in steppers}
    refresh = {name: steppers[name].refresh(min(repetitions, 7)) for name in ("kfac", "fop")}
    mean = {name: plain[name] + update / 10 + decompose / 100 for name, (update, decompose) in refresh.items()}
    flop = {name: gflop(stepper.plain) for name, stepper in steppers.items()}
    return {
        "model": model,
        "batch": batch,
        "solver": solver,
        **{f"{name}_ms": 1e3 * seconds for name, seconds in plain.items()},
        "factors_ms": 1e3 * refresh["kfac"][0],
        "decompose_ms": 1e3 * refresh["kfac"][1],
        "fop_factors_ms": 1e3 * refresh["fop"][0],
        "fop_decompose_ms": 1e3 * refresh["fop"][1],
        "kfac_over_sgd": mean["kfac"] / plain["sgd"],
        "fop_over_sgd": mean["fop"] / plain["sgd"],
        "fop_over_kfac": mean["fop"] / mean["kfac"],
        **{f"{name}_gflop": count for name, count in flop.items()},
        "factors_gflop": gflop(steppers["kfac"].updating) - flop["kfac"],
        "flop_ratio_fop_sgd": flop["fop"] / flop["sgd"],
        "flop_ratio_fop_kfac": flop["fop"] / flop["kfac"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--slow", action="store_true", help="the slow case instead of the others")
    parser.add_argument("--cases", nargs="+", choices=sorted({case[0] for case in CASES}), help="only these; no record")
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), help="only these; no record")
    parser.add_argument("--quick", action="store_true", help="batches of 8 and one repetition; no record")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for model, batch, repetitions in SLOW if given.slow else CASES:
        if given.cases and model not in given.cases:
            continue
        for solver in given.solvers or (["cholesky"] if given.slow else list(SOLVERS)):
            size, rounds = (8, 1) if given.quick else (batch, repetitions)
            rows.append(measure(model, size, rounds, solver))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if not (given.cases or given.solvers or given.quick):
        write("kfac_step_slow" if given.slow else "kfac_step", rows)


if __name__ == "__main__":
    main()

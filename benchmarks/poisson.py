"""Poisson's equation on the unit square by a small network: Sven with Levenberg-Marquardt against L-BFGS and Adam.

    OMP_NUM_THREADS=1 python benchmarks/poisson.py [--seeds 5] [--seconds 15 30]

The problem is that of examples/poisson.py, MLP 2-32-32-1 in float64 on 1,280 conditions: the relative L2 error on 101 x
101 points after 60 steps of Sven, and after as many seconds as said for the others (15 are what Sven takes), on the
same conditions and weights. L-BFGS has a strong Wolfe search and a history of 50; Adam's rate falls linearly, from the
best of three.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steepest as st
from records import write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from poisson import problem, solution

STEPS = 60
RATES = (1e-3, 3e-3, 1e-2)
Conditions = Callable[[], dict[str, Tensor]]


def error_of(model: nn.Module) -> float:
    grid = torch.cartesian_prod(torch.linspace(0, 1, 101), torch.linspace(0, 1, 101))
    with torch.no_grad():
        return float((model(grid)[:, 0] - solution(grid)).norm() / solution(grid).norm())


def squares(conditions: Conditions) -> Tensor:
    return torch.stack([rows.square().sum() for rows in conditions().values()]).sum()


def sven(model: nn.Module, conditions: Conditions, _seconds: float, **options: Any) -> None:
    opt = st.Sven(model, rows="residuals", solver=st.LevenbergMarquardt(**options))
    for _ in range(STEPS):
        opt.step(conditions)


def lbfgs(model: nn.Module, conditions: Conditions, seconds: float) -> None:
    opt = torch.optim.LBFGS(model.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe")
    start = time.perf_counter()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = squares(conditions)
        torch.autograd.backward(loss)
        return loss

    while time.perf_counter() - start < seconds:
        opt.step(closure)


def adam(model: nn.Module, conditions: Conditions, seconds: float, *, lr: float) -> None:
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        for group in opt.param_groups:
            group["lr"] = lr * (1 - spent / seconds)
        opt.zero_grad()
        torch.autograd.backward(squares(conditions))
        opt.step()


ARMS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "Sven, Levenberg-Marquardt": (sven, {}),
    "the same without acceleration": (sven, {"acceleration": False}),
    "L-BFGS": (lbfgs, {}),
    **{f"Adam, lr {rate:g}": (adam, {"lr": rate}) for rate in RATES},
}


def results(seeds: int, budgets: list[float]) -> Iterator[dict[str, Any]]:
    for name, (train, options) in ARMS.items():
        for budget in [math.inf] if train is sven else budgets:
            errors, spent = [], []
            for seed in range(seeds):
                model, conditions = problem(seed)
                start = time.perf_counter()
                train(model, conditions, budget, **options)
                spent.append(time.perf_counter() - start)
                errors.append(error_of(model))
            row = {"method": name, "median": statistics.median(errors), "worst": max(errors), "errors": errors}
            print(name, " ".join(f"{error:.1e}" for error in errors), f"{statistics.fmean(spent):.0f} s", flush=True)
            yield row | {"seconds": statistics.fmean(spent)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, nargs="+", default=[15.0, 30.0])
    given = parser.parse_args()
    rows = list(results(given.seeds, given.seconds))
    if all(math.isfinite(row["worst"]) for row in rows):
        write("poisson", rows)


if __name__ == "__main__":
    main()

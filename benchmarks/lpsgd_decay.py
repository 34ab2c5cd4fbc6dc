"""How the gradient norm of LPSGD falls with the number of steps, on a smooth function that is not convex.

    python benchmarks/lpsgd_decay.py [--out runs/lpsgd_decay] [--quick]

f(x) = sum_i a_i phi((W x)_i) with phi(z) = z^2 / (1 + z^2), which is convex for |z| < 0.58 only, weights a_i from 1 to
100 and W a perturbed identity, in 50 dimensions. A run has T steps at the fixed rate c / sqrt(T), exact gradients, and
its number is the mean over its steps of the Euclidean norm of the gradient. c is the best of a grid for every p, the
same for all T. A line of slope -1/2 stands beside the curves; `slope` is that of a curve, fitted from T = 1000 on.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import steepest as st
from records import write

DIMENSIONS = 50
STEPS = (100, 316, 1000, 3162, 10_000, 31_623)
FITTED_FROM = 1000
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# p at the start, and whether it is annealed to 2
ARMS: dict[str, tuple[float, bool]] = {
    "p = 2 (SGD)": (2.0, False),
    "p = 3": (3.0, False),
    "p = 4": (4.0, False),
    "p = 10": (10.0, False),
    "p = 1e6 (signs)": (1e6, False),
    "p from 4 to 2": (4.0, True),
}


class Function:
    """The function's gradient, and where runs start."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(DIMENSIONS, DIMENSIONS, generator=generator, dtype=torch.float64)
        self.mixing = torch.eye(DIMENSIONS, dtype=torch.float64) + 0.3 / math.sqrt(DIMENSIONS) * noise
        self.weights = torch.logspace(0, 2, DIMENSIONS, dtype=torch.float64)
        self.start = 2 * torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)

    def gradient(self, x: Tensor) -> Tensor:
        z = self.mixing @ x
        return self.mixing.T @ (self.weights * 2 * z / (1 + z * z) ** 2)


def mean_norm(function: Function, p: float, annealed: bool, lr: float, steps: int) -> float:
    """Mean norm of the gradient over a run; infinite where it leaves the numbers."""
    x = torch.nn.Parameter(function.start.clone())
    optimizer = st.LPSGD([x], lr=lr, p=p, on_nonfinite="ignore")
    schedule = st.CosineAnnealingP(optimizer, T_max=steps) if annealed else st.ConstantP(optimizer)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for _ in range(steps):
            x.grad = function.gradient(x)
            total += x.grad.norm()
            optimizer.step()
            schedule.step()
    mean = float(total) / steps
    return mean if math.isfinite(mean) else math.inf


def slope(counts: Sequence[int], norms: Sequence[float]) -> float:
    """Of the straight line through the logarithms."""
    pairs = [(math.log(c), math.log(n)) for c, n in zip(counts, norms, strict=True) if c >= FITTED_FROM]
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def draw(curves: dict[str, list[float]], counts: Sequence[int], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, norms in curves.items():
        axes.loglog(counts, norms, marker="o", markersize=3.5, linewidth=1.4, label=name)
    top = max(norms[0] for norms in curves.values())
    axes.loglog(counts, [1.6 * top * math.sqrt(counts[0] / c) for c in counts], "k--", linewidth=1, label="T^(-1/2)")
    axes.set(xlabel="steps T, at the rate c / sqrt(T)", ylabel="mean norm of the gradient over the run")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/lpsgd_decay"))
    parser.add_argument("--quick", action="store_true", help="up to 3162 steps; no record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    function = Function()
    counts = STEPS[:4] if given.quick else STEPS
    curves, rows = {}, []
    for name, (p, annealed) in ARMS.items():
        # The middle of the range of T decides; longer runs would take most of the time.
        tried = {c: mean_norm(function, p, annealed, c / math.sqrt(FITTED_FROM), FITTED_FROM) for c in RATES}
        c = min(tried, key=tried.__getitem__)
        norms = [mean_norm(function, p, annealed, c / math.sqrt(steps), steps) for steps in counts]
        curves[name] = norms
        columns = {f"T={steps}": norm for steps, norm in zip(counts, norms, strict=True)}
        rows.append({"arm": name, "c": c, "slope": slope(counts, norms), **columns})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    draw(curves, counts, given.out / "lpsgd_decay.svg")
    if not given.quick:
        write("lpsgd_decay", rows)


if __name__ == "__main__":
    main()

"""A curve through noisy values, with its value and its slope at both ends known.

y = sin(3 pi x) exp(-2 x) at 60 places with noise of 0.05; the same network without the constraints stands beside it.

python examples/constrained_fit.py --steps 60 --out constrained_fit.png
"""

import argparse
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import steepest as st

__all__ = ["main"]

torch.set_default_dtype(torch.float64)  # residuals are to become far smaller than float32 can tell


def solution(x: Tensor) -> Tensor:
    """What the values are taken from, `[N]`."""
    return (torch.sin(3 * math.pi * x) * torch.exp(-2 * x))[:, 0]


def fit(places: Tensor, values: Tensor, held: tuple[Tensor, Tensor] | None, steps: int) -> nn.Module:
    """A network through the values; with values of zero and slopes held at the ends, or without."""
    torch.manual_seed(1)
    model = nn.Sequential(
        st.nn.Affine(2.0, -1.0), nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1)
    )

    def conditions() -> dict[str, Tensor]:
        rows = {"data": model(places)[:, 0] - values}
        if held is not None:
            ends, slopes = held
            u = st.nn.differentiate(model, ends, order=1)
            rows |= {"value": 10 * u.value[:, 0], "slope": 3 * (u.d(0)[:, 0] - slopes)}
        return rows

    opt = st.Sven(model, lr=0.7, rows="residuals", solver=st.Damped(1e-2))  # not less: the noise is to stay outside
    for _ in range(steps):
        opt.step(conditions)
    return model


def draw(free: nn.Module, bound: nn.Module, places: Tensor, values: Tensor, path: str) -> dict[str, float]:
    """Draw both curves and their errors; the relative L2 errors."""
    x = torch.linspace(0, 1, 401).unsqueeze(1)
    true = solution(x)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left = figure.add_subplot(121, title="curves", xlabel="x", ylabel="y")
    right = figure.add_subplot(122, title="errors", xlabel="x")
    left.plot(places, values, ".", color="grey", label="data")
    left.plot(x, true, color="black", label="the curve")
    errors = {}
    for name, model, colour in (("without", free, "tab:orange"), ("with constraints", bound, "tab:blue")):
        with torch.no_grad():
            found = model(x)[:, 0]
        left.plot(x, found, color=colour, label=name)
        right.plot(x, found - true, color=colour, label=name)
        errors[name] = float((found - true).norm() / true.norm())
    left.legend()
    right.axhline(0, color="black", linewidth=0.8)
    figure.savefig(path, dpi=120)
    return errors


def main(steps: int, path: str) -> float:
    """Fit twice, draw, and return the relative L2 error of the fit with constraints."""
    torch.manual_seed(0)
    places, ends = torch.rand(60, 1), torch.tensor([[0.0], [1.0]])
    values = solution(places) + 0.05 * torch.randn(60)
    slopes = torch.tensor([3 * math.pi, -3 * math.pi * math.exp(-2)])
    free, bound = (fit(places, values, held, steps) for held in (None, (ends, slopes)))
    errors = draw(free, bound, places, values, path)
    with_them = errors["with constraints"]
    print(f"relative L2 error {with_them:.1e} with constraints, {errors['without']:.1e} without; {path}")
    return with_them


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="constrained_fit.png")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)

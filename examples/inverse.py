"""An unknown coefficient of an equation, from 50 noisy measurements.

-c laplace u = f on the unit square with c = 2.5, which nobody tells the network; u = 0 on the edge.

python examples/inverse.py --steps 40 --out inverse.png
"""

import argparse
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import steepest as st

__all__ = ["main"]

torch.set_default_dtype(torch.float64)  # residuals are to become far smaller than float32 can tell

COEFFICIENT = 2.5


def solution(points: Tensor) -> Tensor:
    """What was measured, `[N]`."""
    return torch.sin(math.pi * points).prod(1)


class Unknown(nn.Module):
    """A network for u beside a number for c."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            st.nn.Affine(2.0, -1.0), nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)
        )
        self.coefficient = nn.Parameter(torch.ones(()))

    def forward(self, points: Tensor) -> Tensor:
        """The network alone."""
        values: Tensor = self.net(points)
        return values


def draw(model: nn.Module, path: str) -> float:
    """Draw solution and error on a grid; the relative L2 error."""
    points = torch.cartesian_prod(torch.linspace(0, 1, 101), torch.linspace(0, 1, 101))
    with torch.no_grad():
        found = model(points)[:, 0]
    error = found - solution(points)
    most = float(error.abs().max())
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for place, values, name, colours in ((121, found, "u", "viridis"), (122, error, "error of u", "RdBu")):
        axes = figure.add_subplot(place, title=name, xlabel="x", ylabel="y")
        image = axes.imshow(
            values.view(101, 101).T.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap=colours, aspect="auto"
        )
        if values is error:
            image.set_clim(-most, most)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
    return float(error.norm() / solution(points).norm())


def main(steps: int, path: str) -> float:
    """Solve, draw, and return the relative L2 error."""
    torch.manual_seed(0)
    model = Unknown()
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=0)
    inside, places = sobol.draw(512, dtype=torch.float64), sobol.draw(50, dtype=torch.float64)
    along = (torch.arange(64) + 0.5) / 64
    low, high = torch.zeros(64), torch.ones(64)
    edge = torch.cat([torch.stack(side, 1) for side in ((along, low), (along, high), (low, along), (high, along))])
    source = 2 * math.pi**2 * COEFFICIENT * solution(inside)
    measured = solution(places) + 0.01 * torch.randn(50)

    def conditions() -> dict[str, Tensor]:
        u = st.nn.differentiate(model.net, inside)
        return {
            "equation": model.coefficient * u.laplacian()[:, 0] + source,
            "edge": 20 * model(edge)[:, 0],
            "measured": 30 * (model(places)[:, 0] - measured),
        }

    opt = st.Sven(model, rows="residuals", solver=st.LevenbergMarquardt())
    for step in range(steps):
        loss = opt.step(conditions)
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.2e}")
    error = draw(model, path)
    print(f"relative L2 error {error:.1e}, c = {model.coefficient.item():.3f} for 2.5; {path}")
    return error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="inverse.png")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)

"""Poisson's equation on the unit square, solved by a small network.

-laplace u = 2 pi^2 sin(pi x) sin(pi y) inside, u = 0 on the edge; the solution is sin(pi x) sin(pi y).

python examples/poisson.py --steps 60 --out poisson.png
"""

import argparse
import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import steepest as st

__all__ = ["main"]

torch.set_default_dtype(torch.float64)  # residuals are to become far smaller than float32 can tell


def solution(points: Tensor) -> Tensor:
    """What the network is to find, `[N]`."""
    return torch.sin(math.pi * points).prod(1)


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


def problem(seed: int) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """A network, and the conditions on it."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        st.nn.Affine(2.0, -1.0),  # the square to [-1, 1]^2, where a tanh network starts best
        *(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)),
    )
    inside = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(1024, dtype=torch.float64)
    along = (torch.arange(64) + 0.5) / 64
    low, high = torch.zeros(64), torch.ones(64)
    edge = torch.cat([torch.stack(side, 1) for side in ((along, low), (along, high), (low, along), (high, along))])
    source = 2 * math.pi**2 * solution(inside)

    def conditions() -> dict[str, Tensor]:
        u = st.nn.differentiate(model, inside)
        # A row counts as much as its factor: u on the edge is far smaller than its second derivatives inside.
        return {"equation": u.laplacian()[:, 0] + source, "edge": 20 * model(edge)[:, 0]}

    return model, conditions


def main(steps: int, path: str) -> float:
    """Solve, draw, and return the relative L2 error."""
    model, conditions = problem(seed=0)
    opt = st.Sven(model, rows="residuals", solver=st.LevenbergMarquardt())
    for step in range(steps):
        loss = opt.step(conditions)
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.2e}")
    error = draw(model, path)
    print(f"relative L2 error {error:.1e}; {path}")
    return error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="poisson.png")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)

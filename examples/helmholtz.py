"""Helmholtz' equation with four waves across the square, solved by a network of sines.

laplace u + u = f on [-1, 1]^2, u = 0 on the edge; f is chosen so that the solution is sin(pi x) sin(4 pi y).

python examples/helmholtz.py --steps 150 --out helmholtz.png
"""

import argparse
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import steepest as st

__all__ = ["main"]

torch.set_default_dtype(torch.float64)  # residuals are to become far smaller than float32 can tell


def solution(points: Tensor) -> Tensor:
    """What the network is to find, `[N]`."""
    return torch.sin(math.pi * points * torch.tensor([1.0, 4.0])).prod(1)


def draw(model: nn.Module, path: str) -> float:
    """Draw solution and error on a grid; the relative L2 error."""
    points = torch.cartesian_prod(torch.linspace(-1, 1, 101), torch.linspace(-1, 1, 101))
    with torch.no_grad():
        found = model(points)[:, 0]
    error = found - solution(points)
    most = float(error.abs().max())
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for place, values, name, colours in ((121, found, "u", "viridis"), (122, error, "error of u", "RdBu")):
        axes = figure.add_subplot(place, title=name, xlabel="x", ylabel="y")
        image = axes.imshow(
            values.view(101, 101).T.numpy(), origin="lower", extent=(-1, 1, -1, 1), cmap=colours, aspect="auto"
        )
        if values is error:
            image.set_clim(-most, most)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
    return float(error.norm() / solution(points).norm())


def main(steps: int, path: str) -> float:
    """Solve, draw, and return the relative L2 error."""
    torch.manual_seed(0)
    model = nn.Sequential(
        st.nn.Affine([1.0, 3.0]),  # four waves along y: a network of slow functions would take long to bend so often
        *(nn.Linear(2, 32), st.nn.Sine(), nn.Linear(32, 32), st.nn.Sine(), nn.Linear(32, 1)),
    )
    inside = 2 * torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(1024, dtype=torch.float64) - 1
    along = (2 * torch.arange(64) - 63) / 64
    one = torch.ones(64)
    edge = torch.cat([torch.stack(side, 1) for side in ((along, -one), (along, one), (-one, along), (one, along))])
    source = (1 - 17 * math.pi**2) * solution(inside)

    def conditions() -> dict[str, Tensor]:
        u = st.nn.differentiate(model, inside)
        # A row counts as much as its factor: u on the edge is far smaller than its second derivatives inside.
        return {"equation": (u.laplacian() + u.value)[:, 0] - source, "edge": 100 * model(edge)[:, 0]}

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
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", default="helmholtz.png")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)

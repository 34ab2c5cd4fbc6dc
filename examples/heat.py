"""The heat equation on an interval, from its beginning to t = 1, solved by a small network in x and t.

u_t = 0.1 u_xx, u = 0 at both ends, u = sin(pi x) + sin(3 pi x) / 2 at the beginning.

python examples/heat.py --steps 60 --out heat.png
"""

import argparse
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import steepest as st

__all__ = ["main"]

torch.set_default_dtype(torch.float64)  # residuals are to become far smaller than float32 can tell

DIFFUSION = 0.1


def solution(points: Tensor) -> Tensor:
    """What the network is to find at x and t, `[N]`."""
    x, t = math.pi * points[:, 0], DIFFUSION * math.pi**2 * points[:, 1]
    return torch.sin(x) * torch.exp(-t) + 0.5 * torch.sin(3 * x) * torch.exp(-9 * t)


def draw(model: nn.Module, path: str) -> float:
    """Draw solution and error on a grid; the relative L2 error."""
    points = torch.cartesian_prod(torch.linspace(0, 1, 101), torch.linspace(0, 1, 101))
    with torch.no_grad():
        found = model(points)[:, 0]
    error = found - solution(points)
    most = float(error.abs().max())
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for place, values, name, colours in ((121, found, "u", "viridis"), (122, error, "error of u", "RdBu")):
        axes = figure.add_subplot(place, title=name, xlabel="x", ylabel="t")
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
    model = nn.Sequential(
        st.nn.Affine(2.0, -1.0),  # x and t to [-1, 1], where a tanh network starts best
        *(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)),
    )
    inside = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(1024, dtype=torch.float64)
    along = (torch.arange(64) + 0.5) / 64
    low, high = torch.zeros(64), torch.ones(64)
    ends = torch.cat([torch.stack([low, along], 1), torch.stack([high, along], 1)])
    start = torch.stack([along, low], 1)

    def conditions() -> dict[str, Tensor]:
        u = st.nn.differentiate(model, inside, second=[(0, 0)])  # u_xx alone, no u_tt
        return {
            "equation": (u.d(1) - DIFFUSION * u.d(0, 0))[:, 0],
            "ends": 10 * model(ends)[:, 0],
            "beginning": 10 * (model(start)[:, 0] - solution(start)),
        }

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
    parser.add_argument("--out", default="heat.png")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)

"""An implicit image: a network from the place of a pixel to its brightness, trained on half of the pixels.

The picture comes with scikit-learn, as 48 x 72 pixels in grey. Sven takes 512 pixels at a time.

python examples/implicit_image.py --steps 200 --out implicit_image.png
"""

import argparse

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import steepest as st

__all__ = ["main"]

torch.set_default_dtype(torch.float64)

HEIGHT, WIDTH = 48, 72


def picture() -> Tensor:
    """Brightness of all pixels, 0 to 1, `[H, W]`."""
    pixels = torch.tensor(load_sample_image("china.jpg")).double().mean(2) / 255
    return nn.functional.adaptive_avg_pool2d(pixels[None], (HEIGHT, WIDTH))[0]


def draw(whole: Tensor, found: Tensor, path: str) -> None:
    """Draw the picture, what the network makes of it, and the difference."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for place, values, name in (
        (131, whole, "the picture"),
        (132, found, "the network"),
        (133, found - whole, "error"),
    ):
        axes = figure.add_subplot(place, title=name, xticks=[], yticks=[])
        error = name == "error"
        image = axes.imshow(
            values.numpy(), cmap="RdBu" if error else "gray", vmin=-0.3 if error else 0, vmax=0.3 if error else 1
        )
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)


def main(steps: int, path: str) -> float:
    """Fit, draw, and return the relative L2 error on the pixels that the network never saw."""
    torch.manual_seed(0)
    whole = picture()
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1) / HEIGHT
    seen = torch.randperm(HEIGHT * WIDTH)[: HEIGHT * WIDTH // 2]
    model = nn.Sequential(st.nn.FourierFeatures(2, 32, deviation=3.0), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 1))
    opt = st.Sven(model, lr=0.3, rows="residuals", solver=st.Damped(1e-1))
    for step in range(steps):
        batch = seen[torch.randint(len(seen), (512,))]
        loss = opt.step(lambda batch=batch: {"pixels": model(places[batch])[:, 0] - whole.flatten()[batch]})
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.2e}")
    hidden = torch.ones(HEIGHT * WIDTH, dtype=torch.bool)
    hidden[seen] = False
    with torch.no_grad():
        found = model(places)[:, 0].view(HEIGHT, WIDTH)
    draw(whole, found, path)
    error = float((found - whole).flatten()[hidden].norm() / whole.flatten()[hidden].norm())
    print(f"relative L2 error {error:.1e} on the pixels that it did not see; {path}")
    return error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="implicit_image.png")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)

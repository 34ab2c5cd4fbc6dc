"""An implicit image: a network that maps the place of a pixel to its colour.

The picture comes with scikit-learn and is averaged down to 64 x 96 pixels, so that nothing is downloaded. Pixels
are split at random 60/20/20: validation and test are held-out pixels of the same picture, and a good value there
means that the network fills the gaps. The inputs are fixed random Fourier features of the coordinates
(arXiv 2006.10739).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.training.data import Split, Splits, split_three_ways
from steepest.training.errors import DataError
from steepest.training.losses import SquaredError
from steepest.training.metrics import PSNR
from steepest.training.models import hidden
from steepest.training.task import Task
from steepest.training.tuned import rates, tuned_rates

_HEIGHT, _WIDTH = 64, 96
_FEATURES = 64
_FREQUENCY = 3.0  # standard deviation of the frequencies, in waves per height of the picture
_FEATURE_SEED = 0  # the features belong to the task, not to the split: the same for every data seed


def _picture() -> Tensor:
    try:
        from sklearn.datasets import load_sample_image

        picture = load_sample_image("china.jpg")
    except ImportError as error:
        raise DataError(
            "image_fit reads a picture that comes with scikit-learn, for which scikit-learn and pillow are needed: "
            "pip install 'steepest[cli]'"
        ) from error
    pixels = torch.tensor(picture).permute(2, 0, 1).float() / 255
    return F.adaptive_avg_pool2d(pixels, (_HEIGHT, _WIDTH))


def fourier_features(coordinates: Tensor) -> Tensor:
    """Cosines and sines of random linear functions of the coordinates.

    Args:
        coordinates: `[N, 2]`, in heights of the picture.

    Returns:
        `[N, 64]`, the same for every call.
    """
    generator = torch.Generator().manual_seed(_FEATURE_SEED)
    frequencies = _FREQUENCY * torch.randn(2, _FEATURES // 2, generator=generator)
    angles = 2 * math.pi * coordinates @ frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _load(data_seed: int) -> Splits:
    colours = _picture().flatten(start_dim=1).T.contiguous()
    rows, columns = torch.meshgrid(torch.arange(_HEIGHT), torch.arange(_WIDTH), indexing="ij")
    coordinates = torch.stack([rows.flatten(), columns.flatten()], dim=1) / _HEIGHT
    splits = split_three_ways(fourier_features(coordinates), colours, seed=data_seed)
    # Colours are centred and not rescaled: PSNR is about a range of 1.
    mean = splits.train.targets.mean(dim=0)
    parts = [Split(part.inputs, part.targets - mean) for part in (splits.train, splits.val, splits.test)]
    return Splits(*parts, scaling={"target_mean": mean, "target_scale": torch.ones_like(mean)})


ENTRIES = [
    Task(
        name="image_fit",
        description="colours of a picture of 64 x 96 pixels from their coordinates; MLP 64-64-64-3 on Fourier features",
        kind="regression",
        load=_load,
        model=hidden(64, 64),
        loss=SquaredError(),
        metrics=(PSNR,),
        batch_size=64,
        epochs=20,
        # Signed residuals are one row per sample: three colours go as losses.
        options={**rates(sgd=0.316, adam=0.03, lbfgs=0.1), "sven": {"rows": "losses", "lr": 1.0}},
        options_source=tuned_rates(7),
    )
]

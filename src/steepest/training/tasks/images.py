"""Images with ten classes, as files of the user's: MNIST, Fashion-MNIST, CIFAR-10.

The two MNIST tasks are the problems of the Sven paper (arXiv 2604.01279): the official test images, 50,000 of
the official training images for training and 10,000 for validation, drawn by the data seed.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from steepest.training.data import Shape, Split, Splits
from steepest.training.errors import DataError
from steepest.training.losses import CrossEntropy, LabelRegression, Loss
from steepest.training.metrics import ACCURACY
from steepest.training.models import cnn, hidden, resnet
from steepest.training.readers.cifar import cifar10_files, read_cifar10
from steepest.training.readers.files import find_files
from steepest.training.readers.idx import read_idx
from steepest.training.task import FileTask, Task
from steepest.training.tuned import rates, tuned_rates

__all__ = ["CIFAR10_RESNET", "ENTRIES", "FASHION_MNIST", "FASHION_MNIST_CNN"]

_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_OFFICIAL_TRAIN = 60_000
_CLASSES = 10
# The files of both sets have the same names; the sizes of the classes tell them apart.
_MNIST_CLASSES = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
_FASHION_CLASSES = (6000,) * _CLASSES

_MLP = hidden(32, 32, 32)
_CNN = cnn(16, 32, 64)

_Raw = tuple[Tensor, Tensor, Tensor, Tensor]


def _idx_files(folder: Path, name: str, origin: str) -> tuple[Path, ...]:
    wanted = [(f"{file}.gz", file, file.replace("-idx", ".idx")) for file in _IDX_FILES]
    return find_files(folder, name, wanted, origin)


def _read_idx_set(paths: tuple[Path, ...], name: str, class_sizes: tuple[int, ...]) -> _Raw:
    parts = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise DataError(
                f"{images_path} has the shape {list(images.shape)} and {labels_path} {list(labels.shape)}; needed are "
                "[N, 28, 28] and [N]: give the original files"
            )
        if labels.max() >= _CLASSES:
            raise DataError(
                f"{labels_path} has the class {int(labels.max())}, {name} has 0 to {_CLASSES - 1}: give the original"
            )
        parts += [images.unsqueeze(1), labels.long()]
    sizes = parts[1].bincount().tolist()
    if len(parts[1]) == _OFFICIAL_TRAIN and tuple(sizes) != class_sizes:
        raise DataError(
            f"{paths[1]} is not of {name}: its classes have {sizes} images; put the files of each data set into a "
            "folder of its own, called as the task"
        )
    return parts[0], parts[1], parts[2], parts[3]


def _split(raw: _Raw, data_seed: int, fraction: float, scaling: tuple[float, float] | None = None) -> Splits:
    images, labels, test_images, test_labels = raw
    held_out = int(len(images) * fraction)
    if not 0 < held_out < len(images):
        raise DataError(f"{len(images)} training images are too few to hold {fraction:.0%} of them out: give more")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(data_seed))
    train, val = order[held_out:], order[:held_out]
    pixels = images[train].float()
    if scaling is None:
        mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3), correction=0)
    else:
        mean, std = (torch.tensor([255 * number]) for number in scaling)
    # In units of the raw pixels, 0 to 255: what one needs to use the model on another image.
    shift, scale = mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)

    def scaled(part: Tensor) -> Tensor:
        return part.sub_(shift).div_(scale)

    return Splits(
        Split(scaled(pixels), labels[train]),
        Split(scaled(images[val].float()), labels[val]),
        Split(scaled(test_images.float()), test_labels),
        scaling={"input_mean": shift, "input_scale": scale},
    )


def _idx_entry(
    name: str,
    description: str,
    source: tuple[str, str, str],
    class_sizes: tuple[int, ...],
    *,
    scaling: tuple[float, float],
    epochs: int,
    loss: Loss | None = None,
    model: Callable[[Shape], nn.Module] = _MLP,
    batch_size: int = 64,
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> FileTask:
    folder_name, title, origin = source

    def at(folder: Path) -> Task:
        paths = _idx_files(folder, folder_name, origin)
        read = cache(lambda: _read_idx_set(paths, title, class_sizes))
        return Task(
            name=name,
            description=description,
            kind="classification",
            load=lambda data_seed: _split(read(), data_seed, 1 / 6, scaling),
            model=model,
            loss=loss or CrossEntropy(),
            metrics=(ACCURACY,),
            batch_size=batch_size,
            epochs=epochs,
            files=paths,
            options=options or {},
            options_source=tuned_rates(5) if options else None,
        )

    return FileTask(name, description, "classification", f"{folder_name}/{_IDX_FILES[0]}.gz and three more", origin, at)


def _cifar10_entry(
    name: str, network: str, model: Callable[[Shape], nn.Module], *, batch_size: int, epochs: int
) -> FileTask:
    description = f"10 classes of 32 x 32 colour images, all official test images; {network}"

    def at(folder: Path) -> Task:
        own = folder / "cifar10"
        place = own if own.is_dir() else folder
        paths = cifar10_files(place)
        read = cache(lambda: read_cifar10(place))
        return Task(
            name=name,
            description=description,
            kind="classification",
            load=lambda data_seed: _split(read(), data_seed, 0.2),
            model=model,
            loss=CrossEntropy(),
            metrics=(ACCURACY,),
            batch_size=batch_size,
            epochs=epochs,
            files=paths,
        )

    return FileTask(name, description, "classification", "cifar10/", _CIFAR_ORIGIN, at)


_CIFAR_ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar.html (cifar-10-binary.tar.gz, unpacked)"
_MNIST = ("mnist", "MNIST", "http://yann.lecun.com/exdb/mnist or a mirror of it (four files in IDX format)")
_FASHION = (
    "fashion_mnist",
    "Fashion-MNIST",
    "https://github.com/zalandoresearch/fashion-mnist (four files in IDX format)",
)
_CLOTHES = "70,000 pieces of clothing of 28 x 28 pixels, 10 classes"
_FASHION_SCALING = (0.2860, 0.3530)
_MODEL = "MLP 784-32-32-32-10"

FASHION_MNIST = _idx_entry(
    "fashion_mnist",
    f"{_CLOTHES}; {_MODEL}",
    _FASHION,
    _FASHION_CLASSES,
    scaling=_FASHION_SCALING,
    epochs=10,
    options=rates(sven=0.316, sgd=0.0316, adam=0.00169, lbfgs=0.178),
)
FASHION_MNIST_CNN = _idx_entry(
    "fashion_mnist_cnn",
    f"{_CLOTHES}; convolutional network of 16, 32 and 64 channels",
    _FASHION,
    _FASHION_CLASSES,
    scaling=_FASHION_SCALING,
    epochs=10,
    model=_CNN,
    batch_size=256,
)
CIFAR10_RESNET = _cifar10_entry(
    "cifar10_resnet",
    "residual network of 16, 32 and 64 channels with GroupNorm",
    resnet(16, 32, 64),
    batch_size=256,
    epochs=15,
)

ENTRIES = [
    _idx_entry(
        "mnist",
        f"70,000 handwritten digits of 28 x 28 pixels, 10 classes; {_MODEL}",
        _MNIST,
        _MNIST_CLASSES,
        scaling=(0.1307, 0.3081),
        epochs=20,
    ),
    _idx_entry(
        "mnist_label_regression",
        f"the same digits, squared distance from one-hot labels; {_MODEL}",
        _MNIST,
        _MNIST_CLASSES,
        scaling=(0.1307, 0.3081),
        epochs=20,
        loss=LabelRegression(),
    ),
    FASHION_MNIST,
    FASHION_MNIST_CNN,
    _cifar10_entry("cifar10", "convolutional network", _CNN, batch_size=64, epochs=10),
    CIFAR10_RESNET,
    _cifar10_entry(
        "cifar10_resnet_bn",
        "residual network of 16, 32 and 64 channels with BatchNorm",
        resnet(16, 32, 64, norm="batch"),
        batch_size=256,
        epochs=15,
    ),
]

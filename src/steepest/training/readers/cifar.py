"""CIFAR-10 as the official binary files, or as npz files of differences that pack well."""

from pathlib import Path

import torch
from torch import Tensor

from steepest.training.errors import DataError
from steepest.training.readers.files import read_bytes
from steepest.training.readers.npz import read_npz

__all__ = ["cifar10_files", "read_cifar10"]

_BINARY = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS
_CLASSES = 10
_SITE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def cifar10_files(folder: Path) -> tuple[Path, ...]:
    """Find the files of CIFAR-10.

    Args:
        folder: Holds `cifar10_train*.npz` and `cifar10_test*.npz`, or the six `.bin` files of the official
            binary version (or `cifar-10-batches-bin` with them).

    Returns:
        The training files and, last, the test file.

    Raises:
        DataError: If they are not there.
    """
    train, test = sorted(folder.glob("cifar10_train*.npz")), sorted(folder.glob("cifar10_test*.npz"))
    if len(train) == 1 and len(test) == 1:
        return train[0], test[0]
    if len(train) > 1 or len(test) > 1:
        names = ", ".join(path.name for path in train + test)
        raise DataError(f"{folder} holds {names}: keep one training file and one test file there")
    missing = _BINARY
    for place in (folder, folder / "cifar-10-batches-bin"):
        absent = tuple(name for name in _BINARY if not (place / name).is_file())
        if not absent:
            return tuple(place / name for name in _BINARY)
        missing = min(missing, absent, key=len)
    if (folder / "cifar-10-batches-py").is_dir() or (folder / "data_batch_1").is_file():
        raise DataError(
            f"{folder} holds the Python version of CIFAR-10, which are pickles: a pickle can run any code when it "
            f"is read; get the binary version (cifar-10-binary.tar.gz) from {_SITE} and unpack it there"
        )
    raise DataError(
        f"{', '.join(missing)}: not found in {folder}, and no cifar10_train*.npz with cifar10_test*.npz either; get "
        f"the binary version (cifar-10-binary.tar.gz) from {_SITE} and unpack it there"
    )


def read_cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read CIFAR-10.

    Test images that the npz file marks as decoded from JPEG (`from_jpeg`) are left out: their pixels are not
    the original ones.

    Args:
        folder: As for `cifar10_files`.

    Returns:
        Training images, uint8 `[N, 3, 32, 32]`, their class numbers, test images and their class numbers.
    """
    *train, test = cifar10_files(folder)
    read = _read_npz if test.suffix == ".npz" else _read_binary
    parts = [read(path) for path in train]
    return (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]), *read(test))


def _checked(path: Path, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if labels.max() >= _CLASSES:
        row = int(labels.ge(_CLASSES).nonzero()[0, 0])
        raise DataError(
            f"{path} gives image {row} the class {int(labels[row])}, CIFAR-10 has classes 0 to {_CLASSES - 1}: it "
            "is damaged or another data set, copy or download it again"
        )
    return images, labels.long()


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    data = read_bytes(path)
    if not data or len(data) % _RECORD:
        raise DataError(
            f"{path} has {len(data):,} bytes, which is no whole number of records of {_RECORD:,} bytes (class and "
            "3 x 32 x 32 pixels): it is incomplete or another file, copy or download it again"
        )
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, _RECORD)
    return _checked(path, records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])


def _read_npz(path: Path) -> tuple[Tensor, Tensor]:
    arrays = read_npz(path)
    delta, labels = arrays.get("delta"), arrays.get("labels")
    if (
        delta is None
        or labels is None
        or (delta.dtype.str, labels.dtype.str) != ("|u1", "|u1")
        or delta.shape != (3, *labels.shape, 32, 32)
        or labels.size == 0
    ):
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise DataError(
            f"{path} holds {found or 'no array'}; needed are delta uint8 (3, N, 32, 32) and labels uint8 (N,): copy or "
            "download it again"
        )
    # Differences along both axes, and of red and blue to green, all modulo 256.
    images = torch.from_numpy(delta).cumsum(2, dtype=torch.uint8).cumsum(3, dtype=torch.uint8).transpose(0, 1)
    images = images.contiguous()
    images[:, 0] += images[:, 1]
    images[:, 2] += images[:, 1]
    keep = torch.ones(len(images), dtype=torch.bool)
    if "from_jpeg" in arrays:
        marked = arrays["from_jpeg"]
        if marked.dtype.kind not in "iu" or (marked.size and not 0 <= marked.min() <= marked.max() < len(images)):
            raise DataError(
                f"{path}: from_jpeg must hold positions from 0 to {len(images) - 1}: copy or download it again"
            )
        keep[torch.from_numpy(marked.astype("int64"))] = False
    return _checked(path, images[keep], torch.from_numpy(labels)[keep])

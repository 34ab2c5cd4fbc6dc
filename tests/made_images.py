"""Image sets made by hand, in the files of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["made_cifar", "made_fashion"]


def made_cifar(folder: Path, *, images: int = 20) -> None:
    random = np.random.default_rng(0)
    for file in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = random.integers(0, 256, (images, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(images) % 10
        (folder / file).write_bytes(records.tobytes())


def made_fashion(folder: Path) -> None:
    random = np.random.default_rng(0)
    for prefix, images in (("train", 120), ("t10k", 20)):
        arrays = {
            "images-idx3": random.integers(0, 256, (images, 28, 28), dtype=np.uint8),
            "labels-idx1": (np.arange(images) % 10).astype(np.uint8),
        }
        for kind, array in arrays.items():
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())

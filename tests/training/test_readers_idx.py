"""IDX files, plain and gzipped: exact contents, and one clear error for every damaged one."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as hs

from steepest.training.errors import DataError
from steepest.training.readers.idx import read_idx
from training.made_files import written

PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@given(
    shape=hs.lists(hs.integers(1, 5), min_size=1, max_size=4),
    seed=hs.integers(0, 2**31),
    packed=hs.booleans(),
)
def test_an_idx_file_is_read_back(
    shape: list[int], seed: int, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    content = idx_bytes(array)
    path = written(tmp_path_factory.mktemp("idx"), gzip.compress(content) if packed else content)
    read = read_idx(path)
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), array)


def test_gzip_is_known_by_its_content_not_by_its_name(tmp_path: Path) -> None:
    packed = written(tmp_path, gzip.compress(idx_bytes(PIXELS)), "images-without-a-suffix")
    plain = written(tmp_path, idx_bytes(PIXELS), "images.gz")
    assert torch.equal(read_idx(packed), read_idx(plain))


def test_every_truncation_of_a_gzip_file_is_told(tmp_path: Path) -> None:
    content = gzip.compress(idx_bytes(PIXELS))
    for length in range(len(content)):
        path = written(tmp_path, content[:length])
        with pytest.raises(DataError, match="made") as caught:
            read_idx(path)
        if length >= 2:
            assert "ends too early" in str(caught.value)


def test_every_flipped_byte_of_a_gzip_file_is_told_or_harmless(tmp_path: Path) -> None:
    content = gzip.compress(idx_bytes(PIXELS), mtime=0)
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        try:
            # The header holds a time and an operating system, which decide nothing.
            assert torch.equal(read_idx(written(tmp_path, bytes(damaged))), torch.from_numpy(PIXELS))
        except DataError:
            refused += 1
    assert refused > len(content) // 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"\0\0\x08", "has 3 bytes"),
        (b"\x89PNG\r\n\x1a\n", "begins with the bytes 89 50 4e 47"),
        (b"\0\1\x08\1\0\0\0\1a", "begins with the bytes 00 01 08 01"),
        (b"\0\0\x07\1\0\0\0\1a", "begins with the bytes 00 00 07 01"),
        (idx_bytes(PIXELS, 0x0D), "holds float32 values"),
        (idx_bytes(PIXELS, 0x0B), "holds int16 values"),
        (b"\0\0\x08\0", "0 dimensions"),
        (b"\0\0\x08\3" + bytes(8), "3 dimensions .* the header is not complete"),
        (b"\0\0\x08\1" + bytes(4), "nothing in it"),
        (idx_bytes(PIXELS)[:-1], "24 bytes, and 23 bytes .* incomplete"),
        (idx_bytes(PIXELS) + b"\0", "24 bytes, and 25 bytes .* left over"),
        (b"\0\0\x08\3" + b"\xff" * 12 + b"abc", "incomplete"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_idx_file_is_told(content: bytes, message: str, packed: bool, tmp_path: Path) -> None:
    path = written(tmp_path, gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=f"made.*{message}"):
        read_idx(path)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_idx(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a folder"):
        read_idx(tmp_path)


def test_the_real_mnist_has_its_class_sizes(steepest_data: Path) -> None:
    images = read_idx(steepest_data / "mnist" / "train-images-idx3-ubyte.gz")
    labels = read_idx(steepest_data / "mnist" / "train-labels-idx1-ubyte.gz")
    assert images.shape == (60_000, 28, 28)
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert math.isclose(images.double().mean().item() / 255, 0.1307, abs_tol=1e-4)

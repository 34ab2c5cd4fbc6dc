"""The files of CIFAR-10: exact contents, and one clear error for every damaged one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from steepest.training.errors import DataError
from steepest.training.readers.cifar import read_cifar10


def cifar_records(count: int, seed: int) -> np.ndarray:
    records = np.random.default_rng(seed).integers(0, 256, (count, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    return records


def made_binary(folder: Path, count: int = 3) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    parts = [cifar_records(count, seed) for seed in range(6)]
    for name, part in zip(names, parts, strict=True):
        (folder / name).write_bytes(part.tobytes())
    return parts


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_the_official_binary_version_is_read(subfolder: str, tmp_path: Path) -> None:
    parts = made_binary(tmp_path / subfolder)
    images, labels, test_images, test_labels = read_cifar10(tmp_path)
    expected = np.concatenate(parts[:5])
    assert np.array_equal(images.numpy(), expected[:, 1:].reshape(-1, 3, 32, 32))
    assert labels.tolist() == expected[:, 0].tolist()
    assert np.array_equal(test_images.numpy(), parts[5][:, 1:].reshape(-1, 3, 32, 32))
    assert test_labels.tolist() == parts[5][:, 0].tolist()


def made_npz(folder: Path, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Encode as differences, the other way round than the reader does it."""
    records = cifar_records(count, 9)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    coded = images.copy()
    coded[:, 0] -= images[:, 1]
    coded[:, 2] -= images[:, 1]
    coded = np.diff(coded, axis=3, prepend=np.uint8(0))
    coded = np.diff(coded, axis=2, prepend=np.uint8(0))
    content = {"delta": coded.transpose(1, 0, 2, 3), "labels": records[:, 0]}
    np.savez_compressed(folder / "cifar10_train4.npz", **content)
    np.savez_compressed(folder / "cifar10_test4.npz", from_jpeg=np.array([1], np.int32), **content)
    return images, records[:, 0]


def test_differences_are_undone_and_images_from_jpeg_left_out(tmp_path: Path) -> None:
    images, labels = made_npz(tmp_path)
    found = read_cifar10(tmp_path)
    assert np.array_equal(found[0].numpy(), images)
    assert found[1].tolist() == labels.tolist()
    assert np.array_equal(found[2].numpy(), images[[0, 2, 3]])
    assert found[3].tolist() == labels[[0, 2, 3]].tolist()


def test_the_pickles_of_cifar_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"pickles.*binary version"):
        read_cifar10(tmp_path)


def test_wrong_cifar_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_batch_1.bin, .*not found"):
        read_cifar10(tmp_path)
    made_binary(tmp_path)
    (tmp_path / "data_batch_4.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match=r"data_batch_4.bin has 3,072 bytes"):
        read_cifar10(tmp_path)
    (tmp_path / "data_batch_4.bin").write_bytes(bytes(3073) + b"\x0a" + bytes(3072))
    with pytest.raises(DataError, match=r"data_batch_4.bin gives image 1 the class 10"):
        read_cifar10(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"^data_batch_4.bin: not found"):
        read_cifar10(tmp_path)


def test_wrong_npz_files_of_cifar_are_told(tmp_path: Path) -> None:
    made_npz(tmp_path)
    np.savez(tmp_path / "cifar10_train4.npz", delta=np.zeros((3, 4, 32, 32), np.uint8), labels=np.zeros(5, np.uint8))
    with pytest.raises(DataError, match=r"cifar10_train4.npz holds delta uint8 \(3, 4, 32, 32\), labels uint8 \(5,\)"):
        read_cifar10(tmp_path)
    content = {"delta": np.zeros((3, 4, 32, 32), np.uint8), "labels": np.zeros(4, np.uint8)}
    np.savez(tmp_path / "cifar10_train4.npz", from_jpeg=np.array([4]), **content)
    with pytest.raises(DataError, match="positions from 0 to 3"):
        read_cifar10(tmp_path)
    np.savez(tmp_path / "cifar10_train5.npz", **content)
    with pytest.raises(DataError, match="keep one training file"):
        read_cifar10(tmp_path)


def test_the_real_cifar_has_its_class_sizes_and_colours(steepest_data: Path) -> None:
    images, labels, test_images, test_labels = read_cifar10(steepest_data / "cifar10")
    assert (images.shape, test_images.shape) == ((20_000, 3, 32, 32), (9_977, 3, 32, 32))
    assert labels.bincount().tolist() == [2000] * 10
    assert test_labels.bincount().sum() == 9_977
    # The published means of the whole training set are .4914, .4822, .4465.
    means = images.double().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=5e-3, rtol=0)

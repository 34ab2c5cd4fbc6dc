"""NPZ files: exact contents, and one clear error for every damaged one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from steepest.training.errors import DataError
from steepest.training.readers.npz import read_npz
from training.made_files import written


def test_an_npz_file_is_read_back(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=np.eye(3), y=np.array(["a", "b", "c"]))
    arrays = read_npz(tmp_path / "a.npz")
    assert list(arrays) == ["X", "y"]
    assert np.array_equal(arrays["X"], np.eye(3))
    assert arrays["y"].tolist() == ["a", "b", "c"]


def test_an_npz_file_with_objects_is_refused_without_unpickling(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "exploded",)

    np.savez(tmp_path / "a.npz", X=np.eye(3), y=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"array 'y' of .*a.npz cannot be read .*pickles"):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_truncation_of_an_npz_file_is_told(save: object, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    save(buffer, X=np.arange(6.0), y=np.arange(3))  # type: ignore[operator]
    content = buffer.getvalue()
    for length in range(0, len(content), 3):
        with pytest.raises(DataError, match=r"a\.npz"):
            read_npz(written(tmp_path, content[:length], "a.npz"))


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
def test_a_flipped_byte_of_an_npz_file_is_told_or_harmless(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, X=np.arange(6.0))
    content = buffer.getvalue()
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        try:
            (values,) = read_npz(written(tmp_path, bytes(damaged), "a.npz")).values()
            assert np.array_equal(values, np.arange(6.0))
        except DataError:
            refused += 1
    assert refused > len(content) // 2


def test_what_is_no_npz_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_npz(tmp_path / "a.npz")
    with pytest.raises(DataError, match="is a folder"):
        read_npz(tmp_path)
    np.save(tmp_path / "one.npy", np.eye(2))
    with pytest.raises(DataError, match=r"numpy.savez"):
        read_npz(tmp_path / "one.npy")
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(DataError, match="holds no array"):
        read_npz(tmp_path / "empty.npz")

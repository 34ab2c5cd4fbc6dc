"""Where files of data are looked for, and how their bytes are read."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from steepest.training.errors import DataError
from steepest.training.readers.files import find_files, read_bytes
from training.made_files import written


def test_a_gzip_file_with_bytes_left_over_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged gzip"):
        read_bytes(written(tmp_path, gzip.compress(b"abc") + b"garbage"))


def test_files_are_found_in_the_own_folder_first_and_all_in_one_place(tmp_path: Path) -> None:
    own = tmp_path / "set"
    own.mkdir()
    for place in (own, tmp_path):
        written(place, b"", "b.gz")
    written(tmp_path, b"", "a")
    assert find_files(tmp_path, "set", [("a.gz", "a"), ("b.gz", "b")], "there") == (tmp_path / "a", tmp_path / "b.gz")
    written(own, b"", "a.gz")
    assert find_files(tmp_path, "set", [("a.gz", "a"), ("b.gz", "b")], "there") == (own / "a.gz", own / "b.gz")


def test_a_missing_file_names_the_places_the_origin_and_the_flag(tmp_path: Path) -> None:
    written(tmp_path, b"", "b")
    with pytest.raises(DataError) as caught:
        find_files(tmp_path, "set", [("a",), ("b",)], "the site of the set")
    message = str(caught.value)
    assert message.startswith("a: not found in")
    for part in (str(tmp_path / "set"), "the site of the set", "--data", "STEEPEST_DATA"):
        assert part in message
    with pytest.raises(DataError, match="is not a folder"):
        find_files(tmp_path / "none", "set", [("a",)], "there")

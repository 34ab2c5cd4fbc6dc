"""Readers of data files: exact contents of made files, and one clear error for every damaged one."""

from __future__ import annotations

import csv
import gzip
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as hs

from steepest.training.errors import DataError, UnknownNameError
from steepest.training.readers.cifar import read_cifar10
from steepest.training.readers.files import find_files, read_bytes
from steepest.training.readers.idx import read_idx
from steepest.training.readers.npz import read_npz
from steepest.training.readers.sheet import read_sheet
from steepest.training.readers.table import read_table


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def written(folder: Path, content: bytes | str, name: str = "made") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


# IDX


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


def test_a_gzip_file_with_bytes_left_over_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged gzip"):
        read_bytes(written(tmp_path, gzip.compress(b"abc") + b"garbage"))


# Where files are


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


# CIFAR-10


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


# NPZ


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


# Tables


cells = hs.one_of(
    hs.text(hs.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1, max_size=8),
    hs.sampled_from(["a,b", 'say "so"', "two\nlines", "a;b", "tab\there", "New York"]),
)


@given(
    numbers=hs.lists(hs.floats(-1e9, 1e9, allow_nan=False), min_size=2, max_size=20),
    data=hs.data(),
    delimiter=hs.sampled_from([",", "\t", ";"]),
    mark=hs.booleans(),
    packed=hs.booleans(),
)
def test_a_table_is_read_back(
    numbers: list[float],
    data: hs.DataObject,
    delimiter: str,
    mark: bool,
    packed: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    texts = data.draw(hs.lists(cells.map(lambda text: f"t{text}"), min_size=len(numbers), max_size=len(numbers)))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows([["word", "size", "again"], *zip(texts, numbers, numbers, strict=True)])
    content = buffer.getvalue().encode("utf-8-sig" if mark else "utf-8")
    table = read_table(written(tmp_path_factory.mktemp("csv"), gzip.compress(content) if packed else content))
    assert table.names == ("word", "size", "again")
    assert table.rows == len(numbers)
    assert table.columns[0] == tuple(text.strip() for text in texts)
    assert table.columns[1].tolist() == numbers  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "1,2,3\n4,5,6\n7,8,9\n",
        "1;2;3\r\n4;5;6\r\n7;8;9",
        "1\t2\t3\n4\t5\t6\n7\t8\t9\n",
        "1.0 \t2 \t3 \n4 \t5 \t6 \n7 \t8 \t9 \n",
        "  1  2   3\n 4 5 6\n7  8 9\n",
        '"1", 2, 3\n\n4, "5", 6\n7, 8, 9\n\n',
        "1,2,3\r4,5,6\r7,8,9\r",
        "\ufeff1,2,3\n4,5,6\n7,8,9\n",
    ],
)
def test_every_delimiter_gives_the_same_table(text: str, tmp_path: Path) -> None:
    table = read_table(written(tmp_path, text))
    assert table.names == ("1", "2", "3")
    assert torch.stack(table.columns, dim=1).tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]  # type: ignore[arg-type]


def test_cells_that_are_numbers_speak_for_a_delimiter(tmp_path: Path) -> None:
    town = read_sheet(written(tmp_path, "New York, 3\nLos Angeles, 4\n"))
    assert town.rows == [["New York", "3"], ["Los Angeles", "4"]]
    time = read_sheet(written(tmp_path, "2020-01-01 10:00,5\n2020-01-02 11:00,6\n"))
    assert time.rows[0] == ["2020-01-01 10:00", "5"]
    decimal = read_sheet(written(tmp_path, "1,5;2,5\n3,5;4,5\n"))
    assert decimal.rows[0] == ["1,5", "2,5"]
    # A damaged line does not make the white space inside the cells the delimiter.
    with pytest.raises(DataError, match="line 3 has 1 cell, the others have 2"):
        read_sheet(written(tmp_path, "2020-01-01 10:00,5\n2020-01-02 11:00,6\n2020-01-03 12:00\n2020-01-04 9:00,7\n"))


@pytest.mark.parametrize(
    ("text", "names", "rows"),
    [
        ("a,b\n1,2\n3,4\n", ("a", "b"), 2),
        ("a,7\n1,2\n3,4\n", ("a", "7"), 2),
        ("1,2\n3,4\n", ("1", "2"), 2),
        ("kind,colour\nx,red\ny,blue\n", ("kind", "colour"), 2),
        ("x,1\ny,2\n", ("1", "2"), 2),
        (",b\n0,5\n1,6\n", ("1", "b"), 2),
    ],
)
def test_a_header_is_text_above_numbers_or_no_number_at_all(
    text: str, names: tuple[str, ...], rows: int, tmp_path: Path
) -> None:
    sheet = read_sheet(written(tmp_path, text))
    assert (sheet.names, len(sheet.rows)) == (names, rows)


def test_names_of_the_caller_give_way_to_the_same_names_in_another_order(tmp_path: Path) -> None:
    assert read_sheet(written(tmp_path, "X,Y\n1,2\n3,4\n"), ("a", "b")).names == ("a", "b")
    assert read_sheet(written(tmp_path, "b,a\n1,2\n3,4\n"), ("a", "b")).names == ("b", "a")
    with pytest.raises(DataError, match="has 2 columns, this data set has 3"):
        read_sheet(written(tmp_path, "b,a\n1,2\n3,4\n"), ("a", "b", "c"))


GOOD = "a,b,c\n" + "".join(f"{i},{i + 0.5},{i * i}\n" for i in range(1, 20))


def with_cell(line: int, column: int, cell: str, text: str = GOOD) -> str:
    lines = text.splitlines()
    parts = lines[line - 1].split(",")
    parts[column] = cell
    lines[line - 1] = ",".join(parts)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n\n", "is empty"),
        ("a,b,c\n", "no row below it"),
        ("a,b,a\n1,2,3\n4,5,6\n", "more than one column called 'a'"),
        (GOOD + "1,2\n", "line 21 has 2 cells, the others have 3"),
        (with_cell(17, 1, "5,6"), "line 17 has 4 cells, the others have 3"),
        ('a,b\n"x\ny",1\nz,2\nw\n', "line 5 has 1 cell, the others have 2"),
        (GOOD.replace("\n", "\n\n", 3) + "1\n", "line 24 has 1 cell,"),
        ('a,b\n1,"2\n3,4\n', "line 2 cannot be cut into cells"),
        (with_cell(9, 1, "many"), "line 9, column 'b' holds 'many'.*--ignore b"),
        (with_cell(9, 1, "1_000"), "line 9, column 'b' holds '1_000'"),
        (with_cell(9, 1, "inf"), "line 9, column 'b' holds 'inf', which is infinite"),
        (with_cell(9, 1, "-1e400"), "line 9, column 'b' holds '-1e400', which is infinite"),
        (with_cell(9, 1, ""), "line 9, column 'b' is empty; 1 of 19 rows .*--drop-missing.*--ignore b"),
        (with_cell(5, 2, "NaN", with_cell(9, 1, "")), "line 5, column 'c' is 'NaN'; 2 of 19 rows"),
        (with_cell(5, 2, "?", with_cell(5, 1, "NA")), "line 5, column 'b' is 'NA'; 1 of 19 rows"),
        ("a,b\n,1\n,2\n", "column 'a' is empty in every row.*--ignore a"),
        ("1,5;2,5\n1,25;3,5\n", "line 1, column '1' holds '1,5', a number with a comma"),
        ("a;b\n1,5;2,5\n1,25;3\n", "line 2, column 'a' holds '1,5', a number with a comma"),
        (b"a,b\n1,2\n\xe9,3\n", "line 3 has the byte 0xe9; save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        (b"\x93NUMPY\x01\x00v\x00", "is a binary file"),
        (b"PK\x03\x04more", "is a zip archive"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_table_is_told(content: bytes | str, message: str, packed: bool, tmp_path: Path) -> None:
    data = content.encode() if isinstance(content, str) else content
    with pytest.raises(DataError, match=f"made.*{message}"):
        read_table(written(tmp_path, gzip.compress(data) if packed else data))


def test_infinity_is_refused_even_where_missing_cells_are_dropped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which is infinite"):
        read_table(written(tmp_path, with_cell(9, 1, "inf")), drop_missing=True)


def test_rows_with_missing_cells_are_dropped_on_request(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,c\n1,,x\n2,3,\n4,5,y\nnan,7,z\n8,9,w\n")
    table = read_table(path, drop_missing=True)
    assert (table.rows, table.dropped) == (2, 3)
    assert [c.tolist() if isinstance(c, torch.Tensor) else c for c in table.columns] == [[4, 8], [5, 9], ("y", "w")]
    with pytest.raises(DataError, match="every row has a missing cell"):
        read_table(written(tmp_path, "a,b\n,1\n2,\n"), drop_missing=True)


def test_ignored_columns_may_hold_anything(tmp_path: Path) -> None:
    path = written(tmp_path, with_cell(5, 2, "inf", with_cell(9, 1, "")))
    for ignore in (("b", "c"), ("2", "-1")):
        table = read_table(path, ignore=ignore)
        assert table.names == ("a",)
        assert table.columns[0].tolist() == list(range(1, 20))  # type: ignore[union-attr]
    with pytest.raises(UnknownNameError, match=r"unknown column of .*'prise': did you mean 'price'"):
        read_table(written(tmp_path, "price,b\n1,2\n3,4\n"), ignore=("prise",))
    with pytest.raises(UnknownNameError, match="'4'"):
        read_table(path, ignore=("4",))


def test_a_mostly_numeric_column_is_numeric_and_a_mostly_textual_one_is_text(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a,b\n1,x\n2,y\n3,3\n4,4\n"))
    assert isinstance(table.columns[0], torch.Tensor)
    assert table.columns[1] == ("x", "y", "3", "4")


# Real files


def test_the_real_mnist_has_its_class_sizes(steepest_data: Path) -> None:
    images = read_idx(steepest_data / "mnist" / "train-images-idx3-ubyte.gz")
    labels = read_idx(steepest_data / "mnist" / "train-labels-idx1-ubyte.gz")
    assert images.shape == (60_000, 28, 28)
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert math.isclose(images.double().mean().item() / 255, 0.1307, abs_tol=1e-4)


def test_the_real_cifar_has_its_class_sizes_and_colours(steepest_data: Path) -> None:
    images, labels, test_images, test_labels = read_cifar10(steepest_data / "cifar10")
    assert (images.shape, test_images.shape) == ((20_000, 3, 32, 32), (9_977, 3, 32, 32))
    assert labels.bincount().tolist() == [2000] * 10
    assert test_labels.bincount().sum() == 9_977
    # The published means of the whole training set are .4914, .4822, .4465.
    means = images.double().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=5e-3, rtol=0)


def test_the_real_california_housing_has_its_mean_price(steepest_data: Path) -> None:
    table = read_table(steepest_data / "california_housing" / "cal_housing.data")
    assert (table.rows, len(table.names)) == (20_640, 9)
    assert math.isclose(table.columns[-1].mean().item(), 206_855.8, abs_tol=0.05)  # type: ignore[union-attr]

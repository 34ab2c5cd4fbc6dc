"""Tables of text: exact contents, and one clear error for every damaged one."""

from __future__ import annotations

import csv
import gzip
import io
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as hs

from steepest.training.errors import DataError, UnknownNameError
from steepest.training.readers.sheet import read_sheet
from steepest.training.readers.table import read_table
from training.made_files import written

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


def test_the_real_california_housing_has_its_mean_price(steepest_data: Path) -> None:
    table = read_table(steepest_data / "california_housing" / "cal_housing.data")
    assert (table.rows, len(table.names)) == (20_640, 9)
    assert math.isclose(table.columns[-1].mean().item(), 206_855.8, abs_tol=0.05)  # type: ignore[union-attr]

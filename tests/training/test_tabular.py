"""Tasks from a user's table: what is inferred and said, what is refused, and what the tensors hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as hs

from steepest.errors import InvalidOptionError
from steepest.training.data import Splits
from steepest.training.errors import DataError, UnknownNameError
from steepest.training.tabular import table_task
from steepest.training.task import Task


def written(folder: Path, header: str, rows: Sequence[Sequence[object]], name: str = "made.csv") -> Path:
    path = folder / name
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def parts(splits: Splits) -> tuple[torch.Tensor, torch.Tensor]:
    all_parts = (splits.train, splits.val, splits.test)
    return torch.cat([part.inputs for part in all_parts]), torch.cat([part.targets for part in all_parts])


def numbered(count: int, target: Callable[[int], object]) -> list[list[object]]:
    return [[i / 8, (i * 7) % 11, target(i)] for i in range(count)]


def fits(task: Task) -> None:
    splits = task.load(0)
    model = task.model(splits.shape)
    outputs = model(splits.train.inputs)
    assert torch.isfinite(task.loss.per_sample(outputs, splits.train.targets)).all()
    assert len(splits.train) >= task.batch_size


def test_a_regression_is_split_and_standardised_by_the_training_part(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,y", numbered(50, lambda i: 100 + i * i / 3))
    task = table_task(path, target="y")
    assert (task.name, task.kind, task.metrics[0].name, task.loss.name) == ("made", "regression", "r2", "squared error")
    assert task.files == (path,)
    assert task.description == "made.csv: 50 rows, 2 inputs, target 'y'; MLP 2-64-64-1"
    splits = task.load(3)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [30, 10, 10]
    torch.testing.assert_close(splits.train.inputs.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(splits.train.targets.std(correction=0), torch.tensor(1.0))
    inputs, targets = parts(splits)
    assert inputs.dtype == targets.dtype == torch.float32
    raw_inputs = inputs * splits.scaling["input_scale"] + splits.scaling["input_mean"]
    raw_targets = targets * splits.scaling["target_scale"] + splits.scaling["target_mean"]
    found = sorted(torch.cat([raw_inputs, raw_targets], dim=1).tolist())
    expected = [[i / 8, (i * 7) % 11, 100 + i * i / 3] for i in range(50)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert torch.equal(task.load(3).train.inputs, splits.train.inputs)
    assert not torch.equal(task.load(4).train.inputs, splits.train.inputs)
    fits(task)


def test_the_file_is_read_once(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,y", numbered(50, lambda i: i / 3))
    task = table_task(path, target="y")
    path.unlink()
    fits(task)


def test_a_text_target_is_a_classification_and_said_to_be(tmp_path: Path) -> None:
    names = ["oak", "ash", "elm"]
    task = table_task(written(tmp_path, "a,b,tree", numbered(60, lambda i: names[i % 3])), target="tree")
    assert (task.kind, task.metrics[0].name, task.loss.name) == ("classification", "accuracy", "cross-entropy")
    assert task.notes == (
        "target 'tree' is text with 3 distinct values: taken as a classification (--kind changes that)",
    )
    splits = task.load(0)
    assert splits.shape.outputs == 3
    inputs, targets = parts(splits)
    rows = (inputs[:, 0].double() * splits.scaling["input_scale"][0] + splits.scaling["input_mean"][0]) * 8
    # Classes are numbered in the order of the alphabet.
    assert targets.tolist() == [["ash", "elm", "oak"].index(names[round(row) % 3]) for row in rows.tolist()]
    fits(task)


@pytest.mark.parametrize(
    ("target", "rows", "kind", "why"),
    [
        (lambda i: i % 20, 100, "classification", "20 distinct ones in 100 rows"),
        (lambda i: i % 21, 210, "regression", "21 distinct ones in 210 rows"),
        (lambda i: i % 20, 99, "regression", "20 distinct ones in 99 rows"),
        (lambda i: float(i % 2) + 3, 30, "classification", "whole numbers, 2 distinct ones"),
        (lambda i: i % 3 + 0.5, 90, "regression", "has fractional values"),
    ],
)
def test_the_kind_is_inferred_with_a_reason(
    target: Callable[[int], object], rows: int, kind: str, why: str, tmp_path: Path
) -> None:
    task = table_task(written(tmp_path, "a,b,y", numbered(rows, target)), target="y")
    assert task.kind == kind
    assert why in task.notes[0]
    assert f"taken as a {kind} (--kind changes that)" in task.notes[0]
    fits(task)


def test_the_user_overrides_the_kind_and_no_reason_is_given(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,y", numbered(60, lambda i: i % 3))
    task = table_task(path, target="y", kind="regression")
    assert (task.kind, task.notes) == ("regression", ())
    assert task.load(0).shape.outputs == 1
    many = written(tmp_path, "a,b,y", numbered(100, lambda i: i % 30))
    assert table_task(many, target="y", kind="classification").load(0).shape.outputs == 30


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        (lambda i: "ab"[i % 2], "regression", "is text, such as 'a': a regression needs numbers"),
        (lambda i: i % 2 + 0.5, "classification", "has fractional values.*--kind regression"),
        (lambda i: i, "classification", "has 60 distinct values in 60 rows.*--kind regression"),
        (lambda i: f"n{i}", None, "has 60 distinct values in 60 rows"),
        (lambda _i: "same", None, "is 'same' in every row: there is one class"),
        (lambda _i: 4, None, "is '4' in every row: there is one class"),
        (lambda _i: 4.5, None, "is 4.5 in every row"),
    ],
)
def test_an_impossible_target_is_told(
    target: Callable[[int], object], kind: str | None, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, "a,b,y", numbered(60, target))
    with pytest.raises(DataError, match=f"made.csv: target 'y' .*{message}"):
        table_task(path, target="y", kind=kind)  # type: ignore[arg-type]


def test_no_target_lists_the_columns_and_never_guesses(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,target", numbered(60, lambda i: i))
    with pytest.raises(DataError, match=r"columns a, b, target: .*--target NAME"):
        table_task(path, target=None)


def test_a_wrong_column_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path, "age,weight,price", numbered(60, lambda i: i / 3))
    with pytest.raises(UnknownNameError, match="'prise': did you mean 'price'"):
        table_task(path, target="prise")
    with pytest.raises(UnknownNameError, match="'wait': did you mean 'weight'"):
        table_task(path, target="price", ignore=("wait",))
    with pytest.raises(UnknownNameError, match="'0'"):
        table_task(path, target="0")
    with pytest.raises(UnknownNameError, match="'-4'"):
        table_task(path, target="-4")


def test_a_target_may_be_a_position_unless_a_column_has_that_name(tmp_path: Path) -> None:
    path = written(tmp_path, "a,1,y", numbered(60, lambda i: i / 3))
    for position, name in (("3", "y"), ("-1", "y"), ("1", "1"), ("-3", "a")):
        assert f"target {name!r}" in table_task(path, target=position, kind="regression").description


def test_ignored_columns_are_no_inputs(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,y", numbered(60, lambda i: i / 3))
    assert table_task(path, target="y", ignore=("a",)).load(0).shape.inputs == (1,)
    with pytest.raises(DataError, match="no column besides the target"):
        table_task(path, target="y", ignore=("a", "b"))
    with pytest.raises(InvalidOptionError, match="is the target and is ignored too"):
        table_task(path, target="y", ignore=("3",))


def test_text_inputs_become_one_input_for_each_value_and_constant_columns_stay(tmp_path: Path) -> None:
    rows = [[("red", "blue", "red")[i % 3], 0.1, i / 7, i * i / 3] for i in range(60)]
    task = table_task(written(tmp_path, "colour,same,x,y", rows), target="y")
    assert "column 'colour' is text: one input of 0 or 1 for each of its 2 values" in task.notes
    assert "constant in every row, kept all the same: same" in task.notes
    splits = task.load(0)
    inputs, _ = parts(splits)
    assert inputs.shape == (60, 4)
    raw = inputs.double() * splits.scaling["input_scale"] + splits.scaling["input_mean"]
    blue = (raw[:, 3] * 7).round() % 3 == 1
    torch.testing.assert_close(raw[:, 0], blue.double())
    torch.testing.assert_close(raw[:, 1], 1 - blue.double())
    assert (inputs[:, 2] == 0).all()
    fits(task)


def test_a_column_that_is_constant_in_the_training_part_alone_is_not_blown_up(tmp_path: Path) -> None:
    train = set(torch.randperm(50, generator=torch.Generator().manual_seed(0))[20:].tolist())
    rows = [[0.1 if i in train else 0.3, i / 7, i * i / 3] for i in range(50)]
    splits = table_task(written(tmp_path, "flat,x,y", rows), target="y").load(0)
    assert (splits.train.inputs[:, 0] == 0).all()
    torch.testing.assert_close(splits.val.inputs[:, 0], torch.full((10,), 0.2))


def test_columns_with_a_large_offset_keep_their_digits(tmp_path: Path) -> None:
    rows = [[1e9 + i / 4, i * i / 3] for i in range(60)]
    splits = table_task(written(tmp_path, "x,y", rows), target="y").load(0)
    raw = splits.train.inputs[:, 0].double() * splits.scaling["input_scale"] + splits.scaling["input_mean"]
    steps = (raw - 1e9) * 4
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.round().unique().numel() == len(steps)


def test_text_with_many_values_and_huge_numbers_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "id,x,y", [[f"n{i}", i, i / 3] for i in range(60)])
    with pytest.raises(DataError, match=r"column 'id' is text with 60 distinct values.*--ignore id"):
        table_task(path, target="y")
    assert table_task(path, target="y", ignore=("id",)).load(0).shape.inputs == (1,)
    with pytest.raises(DataError, match=r"column 'x' reaches 1e\+200"):
        table_task(written(tmp_path, "x,y", [[i * 1e200 / 59, i / 3] for i in range(60)]), target="y")


def test_fewer_than_ten_rows_are_refused_and_ten_are_enough(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 9 rows to use"):
        table_task(written(tmp_path, "a,b,y", numbered(9, lambda i: i / 3)), target="y")
    fits(table_task(written(tmp_path, "a,b,y", numbered(10, lambda i: i / 3)), target="y"))


def test_missing_cells_are_refused_or_dropped_and_told(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,y", [*numbered(30, lambda i: i / 3), ["", 1, 2], [1, 2, ""]])
    with pytest.raises(DataError, match="line 32, column 'a' is empty; 2 of 32 rows"):
        table_task(path, target="y")
    task = table_task(path, target="y", drop_missing=True)
    assert "2 rows with missing cells were left out" in task.notes
    assert task.description.startswith("made.csv: 30 rows")


def test_a_class_that_the_training_part_lacks_is_an_error_and_a_rare_one_a_note(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,y", numbered(50, lambda i: "rare" if i == 7 else "ab"[i % 2]))
    task = table_task(path, target="y")
    assert any("fewer than 5 rows: rare (1)" in note for note in task.notes)
    trained = []
    for seed in range(12):
        if 7 in torch.randperm(50, generator=torch.Generator().manual_seed(seed))[20:]:
            trained.append(seed)
            assert 2 in task.load(seed).train.targets
        else:
            message = f"class 'rare' is in 1 of 50 rows, none of them in the training part of data seed {seed}"
            with pytest.raises(DataError, match=message):
                task.load(seed)
    assert 0 < len(trained) < 12


@pytest.mark.parametrize(("rows", "plan"), [(20, (12, 40)), (3331, (32, 40)), (3332, (64, 20)), (33_400, (256, 10))])
def test_batch_size_and_epochs_follow_the_training_rows(rows: int, plan: tuple[int, int], tmp_path: Path) -> None:
    task = table_task(written(tmp_path, "a,b,y", numbered(rows, lambda i: i / 3)), target="y")
    assert (task.batch_size, task.epochs) == plan


@pytest.mark.parametrize(
    ("file", "name"),
    [("a b+c.csv", "a_b_c"), ("x.v2.csv.gz", "x_v2"), ("data", "data"), ("ü.csv", "table"), ("a-b_1.tsv", "a-b_1")],
)
def test_the_name_is_safe(file: str, name: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a,b,y", numbered(20, lambda i: i / 3), name=file)
    assert table_task(path, target="y").name == name
    assert table_task(path, target="y", name="other", description="words").description == "words"


def test_a_file_without_a_header_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("".join(f"{i} {i * i} {i / 3}\n" for i in range(1, 40)))
    task = table_task(path, target="-1")
    assert any("no header line" in note for note in task.notes)
    assert "target '3'" in task.description


# NPZ


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "made.npz", **arrays)  # type: ignore[arg-type]
    return folder / "made.npz"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "uint8", "int16", "uint64", ">f4", "bool"])
def test_arrays_of_any_number_type_are_inputs(dtype: str, tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).integers(0, 2, (40, 3, 4, 4)).astype(dtype)
    task = table_task(saved(tmp_path, images=inputs, y=np.arange(40) % 2), target="y")
    splits = task.load(0)
    assert (splits.shape.inputs, splits.shape.outputs, task.kind) == ((3, 4, 4), 2, "classification")
    raw = splits.train.inputs * splits.scaling["input_scale"] + splits.scaling["input_mean"]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[16:]
    torch.testing.assert_close(raw, torch.from_numpy(inputs.astype("float32"))[order])
    assert splits.train.targets.tolist() == (order % 2).tolist()
    assert task.description == "made.npz: 40 rows, 3 x 4 x 4 inputs, target 'y'; MLP 48-64-64-2"
    fits(task)


def test_flat_inputs_text_targets_and_several_targets(tmp_path: Path) -> None:
    flat = table_task(saved(tmp_path, x=np.arange(30), y=np.array(["p", "q", "q"] * 10)), target="y")
    assert flat.load(0).shape.inputs == (1,)
    fits(flat)
    many = table_task(saved(tmp_path, x=np.arange(30), y=np.arange(60.0).reshape(30, 2) ** 2), target="y")
    assert (many.kind, many.load(0).shape.outputs) == ("regression", 2)
    fits(many)
    # Sven takes one signed residual per sample.
    assert many.options == {"sven": {"rows": "losses"}}
    assert not flat.options
    column = table_task(saved(tmp_path, x=np.arange(30), y=np.arange(30).reshape(30, 1) % 2), target="y")
    assert (column.kind, column.load(0).train.targets.shape) == ("classification", (18,))
    onehot = saved(tmp_path, x=np.arange(30), y=np.eye(3)[np.arange(30) % 3])
    with pytest.raises(DataError, match="write class numbers instead of one-hot"):
        table_task(onehot, target="y", kind="classification")


def test_arrays_that_cannot_be_told_apart_are_listed(tmp_path: Path) -> None:
    path = saved(tmp_path, a=np.zeros((30, 2)), b=np.arange(60.0).reshape(30, 2), y=np.arange(30), note=np.zeros(3))
    with pytest.raises(
        DataError, match=re.escape("a [30, 2], b [30, 2], y [30], note [3]") + r".*found a, b; .*--ignore"
    ):
        table_task(path, target="y")
    task = table_task(path, target="y", ignore=("a",))
    assert task.load(0).shape.inputs == (2,)
    assert "arrays with other numbers of rows were left out: note" in task.notes
    with pytest.raises(DataError, match="found none"):
        table_task(path, target="y", ignore=("a", "b"))
    with pytest.raises(DataError, match=r"holds the arrays a \[30, 2\], .*--target NAME"):
        table_task(path, target=None)
    with pytest.raises(UnknownNameError, match=r"unknown array of .*'z'"):
        table_task(path, target="z")
    with pytest.raises(InvalidOptionError, match="is the target and is ignored too"):
        table_task(path, target="y", ignore=("y",))
    with pytest.raises(DataError, match="found none"):
        table_task(saved(tmp_path, x=np.zeros(3), y=np.float64(3)), target="y")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((30, 2), np.nan), r"array 'x' holds nan at \[0, 0\], and 60 such numbers"),
        (np.where(np.arange(30) == 7, np.inf, 1.0), r"array 'x' holds inf at \[7\], and 1 such"),
        (np.zeros((30, 2), complex), "array 'x' is complex128"),
        (np.array(["a"] * 30), "array 'x' is <U1"),
        (np.zeros((30, 0)), "at least one"),
        (np.full(30, 1e300), "beyond float32"),
    ],
)
def test_arrays_that_are_no_finite_numbers_are_told(x: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        table_task(saved(tmp_path, x=x, y=np.arange(30)), target="y")


@given(
    values=hs.lists(hs.integers(-5, 5), min_size=10, max_size=80),
    kind=hs.sampled_from([None, "classification", "regression"]),
)
def test_any_target_of_whole_numbers_trains_or_is_told(
    values: list[int], kind: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("table"), "a,y", [[i / 4, value] for i, value in enumerate(values)])
    distinct = len(set(values))
    if distinct == 1:
        with pytest.raises(DataError, match=r"target 'y' .* in every row"):
            table_task(path, target="y", kind=kind)  # type: ignore[arg-type]
    elif kind == "classification" and distinct > len(values) / 2:
        with pytest.raises(DataError, match="distinct values in"):
            table_task(path, target="y", kind=kind)
    else:
        task = table_task(path, target="y", kind=kind)  # type: ignore[arg-type]
        count = len(values) - 2 * int(len(values) * 0.2)
        held_in = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[-count:].tolist()
        if task.kind == "regression" or {values[i] for i in held_in} == set(values):
            fits(task)
        else:
            with pytest.raises(DataError, match="none of them in the training part"):
                task.load(0)

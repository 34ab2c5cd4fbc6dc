"""Tasks whose data the user has as files, on made files and on the real ones; the picture; losses and metrics."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from steepest.training.errors import DataError
from steepest.training.losses import LabelRegression
from steepest.training.metrics import PSNR
from steepest.training.registry import tasks
from steepest.training.task import FileTask, Task
from steepest.training.tasks.image_fit import fourier_features

TABLES = {
    "california_housing": ("cal_housing.data", 20_640, 8),
    "concrete": ("data.txt", 1_030, 8),
    "energy": ("data.txt", 768, 8),
    "power_plant": ("data.txt", 9_568, 4),
    "airfoil": ("airfoil_self_noise.dat", 1_503, 5),
}
MNIST_LIKE = {"mnist": "mnist", "mnist_label_regression": "mnist", "fashion_mnist": "fashion_mnist"}


def file_task(name: str) -> FileTask:
    entry = tasks()[name]
    assert isinstance(entry, FileTask)
    return entry


def fits(task: Task) -> None:
    splits = task.load(0)
    model = task.model(splits.shape)
    inputs, targets = splits.train.inputs[:8], splits.train.targets[:8]
    outputs = model(inputs)
    assert torch.isfinite(task.loss.per_sample(outputs, targets)).all()
    assert math.isfinite(task.metrics[0].compute(outputs, targets))
    for part in (splits.train, splits.val, splits.test):
        assert len(part.inputs) == len(part.targets) > 0
        assert torch.isfinite(part.inputs).all()


# Every one of them


@pytest.mark.parametrize("name", [*TABLES, *MNIST_LIKE, "cifar10"])
def test_missing_files_are_told_with_place_and_origin(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found in") as caught:
        file_task(name).at(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "http" in str(caught.value) or "StatLib" in str(caught.value)


@pytest.mark.parametrize("name", [*TABLES, *MNIST_LIKE, "cifar10"])
def test_the_entry_and_its_task_say_the_same(name: str, steepest_data: Path) -> None:
    entry = file_task(name)
    task = entry.at(steepest_data)
    assert (task.name, task.kind, task.description) == (entry.name, entry.kind, entry.description)
    assert task.files
    assert all(path.is_file() for path in task.files)
    assert not task.notes
    fits(task)


# Tables


def made_table(path: Path, columns: int, rows: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).random((rows, columns))
    np.savetxt(path, values, delimiter="\t")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_another_size_is_read_with_a_note(name: str, tmp_path: Path) -> None:
    file, rows, features = TABLES[name]
    made_table(tmp_path / name / file, features + 1)
    task = file_task(name).at(tmp_path)
    assert f"has 40 rows, the published data {rows:,}" in task.notes[-1]
    assert "40 rows" in task.description
    fits(task)
    made_table(tmp_path / name / file, features)
    with pytest.raises(DataError, match=f"has {features} columns, this data set has {features + 1}"):
        file_task(name).at(tmp_path)


def test_a_file_called_data_is_not_taken_for_any_data_set(tmp_path: Path) -> None:
    made_table(tmp_path / "data.txt", 9)
    with pytest.raises(DataError, match="put it into a folder energy"):
        file_task("energy").at(tmp_path)
    made_table(tmp_path / "concrete" / "data.txt", 9)
    assert file_task("concrete").at(tmp_path).files == (tmp_path / "concrete" / "data.txt",)
    assert file_task("concrete").at(tmp_path / "concrete").files == (tmp_path / "concrete" / "data.txt",)


@pytest.mark.parametrize("name", TABLES)
def test_a_real_table_has_its_published_size(name: str, steepest_data: Path) -> None:
    _, rows, features = TABLES[name]
    splits = file_task(name).at(steepest_data).load(0)
    assert sum(map(len, (splits.train, splits.val, splits.test))) == rows
    assert (splits.shape.inputs, splits.shape.outputs) == ((features,), 1)


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("california_housing", 206_855.8),
        ("concrete", 35.818),
        ("energy", 22.307),
        ("power_plant", 454.365),
        ("airfoil", 124.836),
    ],
)
def test_a_real_table_predicts_the_right_column(name: str, mean: float, steepest_data: Path) -> None:
    splits = file_task(name).at(steepest_data).load(0)
    targets = torch.cat([part.targets for part in (splits.train, splits.val, splits.test)]).double()
    raw = targets * splits.scaling["target_scale"] + splits.scaling["target_mean"]
    assert math.isclose(raw.mean().item(), mean, rel_tol=2e-5)


# MNIST and Fashion-MNIST


def made_images(
    folder: Path, *, train: int = 60, test: int = 10, packed: bool = True, dot: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (train + test, 28, 28), dtype=np.uint8)
    labels = (np.arange(train + test) % 10).astype(np.uint8)
    for prefix, part in (("train", slice(train)), ("t10k", slice(train, None))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = header + array.tobytes()
            name = f"{prefix}-{kind}-ubyte".replace("-idx", ".idx" if dot else "-idx")
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
    return images, labels


@pytest.mark.parametrize("name", MNIST_LIKE)
@pytest.mark.parametrize(("packed", "dot", "own"), [(True, False, True), (False, False, False), (False, True, True)])
def test_five_sixths_of_the_training_images_train_and_the_test_images_test(
    name: str, packed: bool, dot: bool, own: bool, tmp_path: Path
) -> None:
    images, labels = made_images(tmp_path / MNIST_LIKE[name] if own else tmp_path, packed=packed, dot=dot)
    task = file_task(name).at(tmp_path)
    splits = task.load(5)
    mean, std = (0.2860, 0.3530) if name == "fashion_mnist" else (0.1307, 0.3081)
    normalised = torch.from_numpy((images / 255 - mean) / std).float().unsqueeze(1)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [50, 10, 10]
    torch.testing.assert_close(splits.test.inputs, normalised[60:], atol=1e-5, rtol=1e-5)
    assert splits.test.targets.tolist() == labels[60:].tolist()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(splits.val.inputs, normalised[order[:10]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(splits.train.inputs, normalised[order[10:]], atol=1e-5, rtol=1e-5)
    assert splits.train.targets.tolist() == labels[order[10:]].tolist()
    raw = splits.test.inputs * splits.scaling["input_scale"] + splits.scaling["input_mean"]
    torch.testing.assert_close(raw.squeeze(1), torch.from_numpy(images[60:]).float(), atol=1e-3, rtol=0)
    assert torch.equal(task.load(5).train.inputs, splits.train.inputs)  # nothing was scaled in place
    assert sum(p.numel() for p in task.model(splits.shape).parameters()) == 27_562
    assert (task.batch_size, task.epochs) == (64, 10 if name == "fashion_mnist" else 20)
    fits(task)


def test_images_that_do_not_fit_their_labels_are_told(tmp_path: Path) -> None:
    made_images(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(b"\0\0\x08\1\0\0\0\2ab")
    with pytest.raises(DataError, match=r"\[60, 28, 28\] and .*\[2\]"):
        file_task("mnist").at(tmp_path).load(0)
    labels.write_bytes(b"\0\0\x08\1\0\0\0\x3c" + bytes(59) + b"\x0a")
    with pytest.raises(DataError, match="has the class 10, MNIST has 0 to 9"):
        file_task("mnist").at(tmp_path).load(0)


def test_too_few_images_are_told(tmp_path: Path) -> None:
    made_images(tmp_path, train=5)
    with pytest.raises(DataError, match="5 training images are too few"):
        file_task("mnist").at(tmp_path).load(0)


@pytest.mark.parametrize(("name", "other"), [("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")])
def test_one_set_is_not_taken_for_the_other(name: str, other: str, steepest_data: Path) -> None:
    with pytest.raises(DataError, match=r"is not of .*put the files of each data set into a folder"):
        file_task(name).at(steepest_data / other).load(0)


def test_the_real_mnist_is_the_published_problem(steepest_data: Path) -> None:
    task = file_task("mnist").at(steepest_data)
    splits = task.load(0)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [50_000, 10_000, 10_000]
    together = torch.cat([splits.train.targets, splits.val.targets]).bincount().tolist()
    assert together == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert splits.test.targets.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(splits.train.inputs.mean().item()) < 0.01
    assert abs(splits.train.inputs.std().item() - 1) < 0.01


# CIFAR-10


def test_cifar_is_standardised_per_channel_by_its_training_part(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for file in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = random.integers(0, 256, (10, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(10)
        (tmp_path / file).write_bytes(records.tobytes())
    task = file_task("cifar10").at(tmp_path)
    splits = task.load(0)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [40, 10, 10]
    torch.testing.assert_close(splits.train.inputs.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(splits.train.inputs.std(dim=(0, 2, 3), correction=0), torch.ones(3))
    raw = splits.test.inputs * splits.scaling["input_scale"] + splits.scaling["input_mean"]
    torch.testing.assert_close(raw.flatten(start_dim=1), torch.from_numpy(records[:, 1:]).float(), atol=1e-3, rtol=0)
    fits(task)


# The picture


def test_the_picture_is_split_into_held_out_pixels_and_its_colours_are_centred() -> None:
    task = tasks()["image_fit"]
    assert isinstance(task, Task)
    splits = task.load(0)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [3688, 1228, 1228]
    assert (splits.shape.inputs, splits.shape.outputs) == ((64,), 3)
    torch.testing.assert_close(splits.train.targets.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    colours = torch.cat([p.targets for p in (splits.train, splits.val, splits.test)]) + splits.scaling["target_mean"]
    assert 0 <= colours.min() < 0.2
    assert 0.8 < colours.max() <= 1
    inputs = torch.cat([part.inputs for part in (splits.train, splits.val, splits.test)])
    assert inputs.unique(dim=0).shape[0] == 64 * 96
    fits(task)


def test_pixels_and_colours_belong_together() -> None:
    """The sky is at the top of the picture: undo the shuffle and look."""
    task = tasks()["image_fit"]
    assert isinstance(task, Task)
    splits = task.load(1)
    order = torch.randperm(6144, generator=torch.Generator().manual_seed(1))
    where = torch.cat([order[2456:], order[:2456]])
    parts = (splits.train, splits.val, splits.test)
    colours = torch.empty(6144, 3)
    colours[where] = torch.cat([part.targets for part in parts])
    picture = colours.reshape(64, 96, 3)
    places = torch.stack([where // 96, where % 96], dim=1) / 64
    torch.testing.assert_close(torch.cat([part.inputs for part in parts]), fourier_features(places))
    # Neighbours are alike along both axes, and the first rows are brighter than the rest.
    assert picture.diff(dim=0).abs().mean() < 0.1
    assert picture.diff(dim=1).abs().mean() < 0.1
    assert picture[:8].mean() > picture.mean() + 0.1


def test_fourier_features_are_fixed_and_of_length_one_per_frequency() -> None:
    places = torch.rand(5, 2)
    first, again = fourier_features(places), fourier_features(places)
    assert torch.equal(first, again)
    torch.testing.assert_close(first[:, :32] ** 2 + first[:, 32:] ** 2, torch.ones(5, 32))


# Loss and metric


def test_label_regression_is_the_squared_distance_from_one_hot_labels() -> None:
    loss = LabelRegression()
    outputs, targets = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]), torch.tensor([2, 1])
    assert loss.per_sample(outputs, targets).tolist() == [1 + 4 + 4, 0]
    assert loss.residuals(outputs, targets).tolist() == [[1, 2, 2], [0, 0, 0]]
    random, classes = torch.randn(7, 4), torch.randint(4, (7,))
    torch.testing.assert_close(loss.residuals(random, classes).square().sum(dim=1), loss.per_sample(random, classes))


def test_psnr_is_in_decibels_and_does_not_mind_a_shift() -> None:
    targets = torch.rand(20, 3)
    assert math.isclose(PSNR.compute(targets + 0.1, targets), 20, abs_tol=1e-4)
    assert math.isclose(PSNR.compute(targets - 0.5 + 0.01, targets - 0.5), 40, abs_tol=1e-2)
    assert PSNR.compute(targets, targets) == math.inf
    assert PSNR.higher_is_better

"""Long-tailed tasks: how many samples of each class are left, which ones, and what stays as it was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steepest.errors import InvalidOptionError
from steepest.training.data import Split, Splits
from steepest.training.errors import DataError
from steepest.training.registry import tasks
from steepest.training.source import Source, resolve
from steepest.training.task import FileTask, Task
from steepest.training.tasks.long_tailed import RARE_ACCURACY, long_tailed

NAMES = [f"{name}_lt{number}" for number in (50, 100) for name in ("digits", "fashion_mnist_cnn", "cifar10_resnet")]


def made(sizes: list[int], **changes: object) -> Task:
    """A task whose training part has classes of these sizes; every input is a number of its own."""
    targets = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(9))]
    inputs = torch.arange(len(targets)).float().unsqueeze(1)
    held_out = Split(torch.arange(2.0 * len(sizes)).unsqueeze(1), torch.arange(len(sizes)).repeat(2))
    splits = Splits(Split(inputs, targets), held_out, held_out, scaling={"input_mean": torch.tensor([1.5])})
    return replace(resolve(Source("digits")), name="made", load=lambda _: splits, **changes)


def counts(split: Split, classes: int = 10) -> list[int]:
    return split.targets.bincount(minlength=classes).tolist()


@pytest.mark.parametrize(
    ("sizes", "imbalance", "left"),
    [
        # 120 * 100^(-c/2): 120, 12, 1.2
        ([120, 300, 150], 100, [120, 12, 1]),
        # 64 * 16^(-c/4): 64, 32, 16, 8, 4
        ([70, 64, 80, 65, 90], 16, [64, 32, 16, 8, 4]),
        # 7 * 50^(-c/2) = 7, 0.99, 0.14: no class is lost
        ([7, 8, 9], 50, [7, 1, 1]),
        ([30, 40], 10, [30, 3]),
        # nothing but even sizes
        ([20, 21, 22], 1, [20, 20, 20]),
    ],
)
def test_the_classes_fall_off_in_equal_ratios(sizes: list[int], imbalance: float, left: list[int]) -> None:
    splits = long_tailed(made(sizes), imbalance).load(0)
    assert counts(splits.train, len(sizes)) == left


@pytest.mark.parametrize("imbalance", [50, 100])
def test_the_digits_have_exactly_the_sizes_of_the_formula(imbalance: int) -> None:
    smallest = min(counts(resolve(Source("digits")).load(0).train))
    found = counts(resolve(Source(f"digits_lt{imbalance}")).load(0).train)
    assert found == [max(1, math.floor(smallest / imbalance ** (number / 9) + 0.5)) for number in range(10)]
    assert found[0] == smallest
    assert found[-1] == round(smallest / imbalance)


def test_only_the_training_part_changes_and_its_samples_keep_their_classes() -> None:
    whole, part = (resolve(Source(name)).load(2) for name in ("digits", "digits_lt50"))
    for name in ("val", "test"):
        assert torch.equal(getattr(whole, name).inputs, getattr(part, name).inputs)
        assert torch.equal(getattr(whole, name).targets, getattr(part, name).targets)
    assert part.shape == whole.shape
    task = made([40, 50, 60])
    before, after = task.load(0), long_tailed(task, 20).load(0)
    chosen = after.train.inputs.squeeze(1).long()
    assert len(chosen.unique()) == len(chosen)
    assert torch.equal(after.train.targets, before.train.targets[chosen])
    assert after.scaling == before.scaling


def test_the_data_seed_alone_decides_which_samples_stay() -> None:
    task = long_tailed(made([40, 50, 60]), 20)
    state = torch.get_rng_state()
    first = task.load(0).train.inputs
    torch.manual_seed(77)
    assert torch.equal(task.load(0).train.inputs, first)
    torch.set_rng_state(state)
    assert torch.equal(torch.randn(3), torch.randn(3, generator=_generator(state)))  # and torch's own is untouched
    assert not torch.equal(task.load(1).train.inputs, first)
    assert counts(task.load(1).train, 3) == counts(task.load(0).train, 3)


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def test_every_sample_has_its_chance() -> None:
    task = long_tailed(made([6, 6]), 2)
    drawn = torch.cat([task.load(seed).train.inputs[task.load(seed).train.targets == 1] for seed in range(60)])
    times = drawn.flatten().long().bincount(minlength=12)
    wanted = torch.zeros(12)
    whole = made([6, 6]).load(0).train
    wanted[whole.inputs.squeeze(1)[whole.targets == 1].long()] = 30
    assert (times - wanted).abs().max() < 20
    assert times.sum() == 180


# What is not changed, and what is refused


def test_the_rest_of_the_task_stays_but_not_the_options_chosen_for_other_data() -> None:
    digits, tailed = resolve(Source("digits")), resolve(Source("digits_lt100"))
    assert (tailed.name, tailed.batch_size, tailed.epochs, tailed.kind) == ("digits_lt100", 64, 20, "classification")
    assert (tailed.model, tailed.loss) == (digits.model, digits.loss)
    assert tailed.description == f"{digits.description}; training classes of falling size, 100 to 1"
    assert tailed.metrics == (*digits.metrics, RARE_ACCURACY)
    assert digits.options
    assert (tailed.options, tailed.options_source) == ({}, None)


@pytest.mark.parametrize("imbalance", [0.5, 0, -3, math.nan, math.inf])
def test_an_imbalance_below_one_is_refused(imbalance: float) -> None:
    with pytest.raises(InvalidOptionError, match=r"imbalance=.*give a finite number in"):
        long_tailed(made([3, 3]), imbalance)


def test_a_regression_has_no_long_tail() -> None:
    with pytest.raises(InvalidOptionError, match=r"toy_1d is a regression .*give a classification"):
        long_tailed(resolve(Source("toy_1d")), 10)


def test_classes_without_samples_are_told() -> None:
    with pytest.raises(DataError, match="class 1 has none"):
        long_tailed(made([3, 0, 3]), 10).load(0)
    with pytest.raises(DataError, match="class 2 has none"):
        long_tailed(made([3, 3, 0]), 10).load(0)
    with pytest.raises(DataError, match="one class only"):
        long_tailed(made([3]), 10).load(0)


# The metric


def scores(predicted: list[int], classes: int) -> Tensor:
    return torch.eye(classes)[torch.tensor(predicted)]


@pytest.mark.parametrize(
    ("predicted", "targets", "classes", "value"),
    [
        # of ten classes the last three: 7 right in 1 of 2, 8 in 1 of 1, 9 in 0 of 1; the others do not matter
        ([7, 0, 8, 0, 5, 6], [7, 7, 8, 9, 6, 5], 10, 0.5),
        # a class without samples is left out
        ([7, 7], [7, 9], 10, 0.5),
        # of two classes the last
        ([0, 1, 1, 0], [0, 0, 1, 1], 2, 0.5),
        ([0, 1, 2], [0, 1, 2], 3, 1.0),
    ],
)
def test_the_metric_is_the_mean_over_the_rarest_third(
    predicted: list[int], targets: list[int], classes: int, value: float
) -> None:
    assert RARE_ACCURACY.compute(scores(predicted, classes), torch.tensor(targets)) == pytest.approx(value)
    assert RARE_ACCURACY.higher_is_better


def test_the_metric_of_no_rare_sample_is_no_number() -> None:
    assert math.isnan(RARE_ACCURACY.compute(scores([0, 1], 10), torch.tensor([0, 1])))


# The registry


def test_all_six_are_in_the_registry() -> None:
    assert set(NAMES) <= tasks().keys()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("digits")])
def test_files_are_read_when_the_data_are_asked_for(name: str, tmp_path: Path) -> None:
    entry = tasks()[name]
    assert isinstance(entry, FileTask)
    with pytest.raises(DataError, match="not found in"):
        entry.at(tmp_path)
    # Files that are there but cannot be read: the task is made, and only its data are refused.
    if name.startswith("fashion"):
        names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    else:
        names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for file in names:
        (tmp_path / file).write_bytes(b"no images")
    task = entry.at(tmp_path)
    assert (task.name, task.description, task.kind) == (entry.name, entry.description, entry.kind)
    assert [path.name for path in task.files] == names
    with pytest.raises(DataError):
        task.load(0)


@pytest.mark.parametrize("name", ["fashion_mnist_cnn_lt50", "cifar10_resnet_lt100"])
def test_the_real_images_have_the_sizes_of_the_formula(name: str, steepest_data: Path) -> None:
    entry, whole = tasks()[name], tasks()[name.rpartition("_")[0]]
    assert isinstance(entry, FileTask)
    assert isinstance(whole, FileTask)
    before, after = whole.at(steepest_data).load(0), entry.at(steepest_data).load(0)
    smallest, imbalance = min(counts(before.train)), int(name.rpartition("lt")[2])
    assert counts(after.train) == [round(smallest * imbalance ** (-number / 9)) for number in range(10)]
    assert counts(after.val) == counts(before.val)
    assert torch.equal(after.test.targets, before.test.targets)

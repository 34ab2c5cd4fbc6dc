"""Tasks with wrong labels: how many, which ones, known to be wrong, and what stays as it was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steepest.errors import InvalidOptionError
from steepest.training.data import Split, Splits
from steepest.training.errors import DataError
from steepest.training.registry import tasks
from steepest.training.source import Source, resolve
from steepest.training.task import FileTask, Task
from steepest.training.tasks.wrong_labels import wrong_labels

NAMES = [f"{name}_wrong20" for name in ("digits", "fashion_mnist", "fashion_mnist_cnn", "cifar10_resnet")]


def made(size: int, classes: int) -> Task:
    targets = torch.arange(size) % classes
    splits = Splits(*(Split(torch.arange(float(size)).unsqueeze(1), targets) for _ in range(3)))
    return replace(resolve(Source("digits")), name="made", load=lambda _: splits)


def test_exactly_a_fifth_of_the_digits_has_another_label_and_is_marked() -> None:
    right, part = (resolve(Source(name)).load(3) for name in ("digits", "digits_wrong20"))
    assert part.train.wrong is not None
    assert len(part.train) == 1079
    assert int(part.train.wrong.sum()) == 216  # 0.2 * 1079 = 215.8
    assert torch.equal(part.train.wrong, part.train.targets != right.train.targets)
    assert torch.equal(part.train.inputs, right.train.inputs)
    assert (int(part.train.targets.min()), int(part.train.targets.max())) == (0, 9)
    assert right.train.wrong is None


def test_validation_and_test_stay_clean() -> None:
    right, part = (resolve(Source(name)).load(0) for name in ("digits", "digits_wrong20"))
    for name in ("val", "test"):
        assert torch.equal(getattr(part, name).targets, getattr(right, name).targets)
        assert getattr(part, name).wrong is None
    assert part.shape == right.shape


def test_the_data_seed_alone_decides_which_labels_are_wrong() -> None:
    task = wrong_labels(made(500, 5), 0.2)
    state = torch.get_rng_state()
    first = task.load(0).train
    torch.manual_seed(77)
    again, other = task.load(0).train, task.load(1).train
    torch.set_rng_state(state)
    assert torch.equal(again.targets, first.targets)
    assert not torch.equal(other.targets, first.targets)
    assert other.wrong is not None
    assert int(other.wrong.sum()) == 100


@pytest.mark.parametrize(("size", "share", "count"), [(10, 0.2, 2), (7, 0.5, 4), (3, 0.1, 0), (1000, 0.999, 999)])
def test_the_count_is_the_rounded_share(size: int, share: float, count: int) -> None:
    wrong = wrong_labels(made(size, 3), share).load(0).train.wrong
    assert wrong is not None
    assert int(wrong.sum()) == count


def test_every_other_class_is_as_likely_as_the_next() -> None:
    task = made(20_000, 4)
    before, after = task.load(0).train.targets, wrong_labels(task, 0.5).load(0).train
    assert after.wrong is not None
    steps = (after.targets - before)[after.wrong] % 4
    counts = steps.bincount(minlength=4).tolist()
    assert counts[0] == 0
    assert all(abs(count - 10_000 / 3) < 300 for count in counts[1:])  # six standard deviations


def test_two_classes_change_places() -> None:
    task = made(10, 2)
    after = wrong_labels(task, 0.3).load(0).train
    assert int((after.targets != task.load(0).train.targets).sum()) == 3


def test_the_rest_of_the_task_stays_but_not_the_options_chosen_for_other_data() -> None:
    digits, noisy = resolve(Source("digits")), resolve(Source("digits_wrong20"))
    assert (noisy.batch_size, noisy.epochs, noisy.metrics) == (digits.batch_size, digits.epochs, digits.metrics)
    assert noisy.description == f"{digits.description}; 20 % of the training labels wrong"
    assert digits.options
    assert (noisy.options, noisy.options_source) == ({}, None)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(InvalidOptionError, match=r"share=.*give a finite number in \(0, 1\)"):
        wrong_labels(made(5, 2), share)


def test_what_has_no_other_class_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"toy_1d is a regression .*give a classification"):
        wrong_labels(resolve(Source("toy_1d")), 0.2)
    with pytest.raises(DataError, match="one class only"):
        wrong_labels(made(5, 1), 0.2).load(0)


def test_marks_go_with_their_samples() -> None:
    train = wrong_labels(made(20, 4), 0.5).load(0).train
    assert train.wrong is not None
    index = torch.tensor([7, 3, 11])
    part = train.to("cpu").take(index)
    assert part.wrong is not None
    assert torch.equal(part.wrong, train.wrong[index])
    assert torch.equal(part.targets, train.targets[index])
    plain = replace(train, wrong=None)
    assert plain.to("cpu").take(index).wrong is None


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_has_them(name: str) -> None:
    entry = tasks()[name]
    assert entry.description.endswith("20 % of the training labels wrong")
    assert isinstance(entry, FileTask) == (not name.startswith("digits"))


def test_fashion_mnist_has_ten_thousand_wrong_labels(steepest_data: Path) -> None:
    train = resolve(Source("fashion_mnist_wrong20", data=str(steepest_data))).load(0).train
    assert train.wrong is not None
    assert (len(train), int(train.wrong.sum())) == (50_000, 10_000)

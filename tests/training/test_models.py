"""Named models, and the tasks that bring a convolutional or a residual network along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steepest.errors import InvalidOptionError
from steepest.training.data import Shape
from steepest.training.errors import DataError
from steepest.training.evaluate import evaluate
from steepest.training.models import MODELS, cnn, resnet
from steepest.training.registry import tasks
from steepest.training.source import Source, resolve
from steepest.training.task import FileTask, Task

CIFAR = {"cifar10": (64, 10), "cifar10_resnet": (256, 15), "cifar10_resnet_bn": (256, 15)}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


def file_task(name: str, folder: Path) -> Task:
    entry = tasks()[name]
    assert isinstance(entry, FileTask)
    return entry.at(folder)


def made_cifar(folder: Path, *, images: int = 20) -> None:
    random = np.random.default_rng(0)
    for file in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = random.integers(0, 256, (images, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(images) % 10
        (folder / file).write_bytes(records.tobytes())


def made_fashion(folder: Path) -> None:
    random = np.random.default_rng(0)
    for prefix, images in (("train", 120), ("t10k", 20)):
        arrays = {
            "images-idx3": random.integers(0, 256, (images, 28, 28), dtype=np.uint8),
            "labels-idx1": (np.arange(images) % 10).astype(np.uint8),
        }
        for kind, array in arrays.items():
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())


# Named models


@pytest.mark.parametrize("name", ["cnn", "resnet", "resnet_bn", "resnet:8,16"])
def test_a_model_for_images_is_refused_for_other_data(name: str) -> None:
    task = resolve(Source("digits", model=name))
    with pytest.raises(InvalidOptionError, match=r"needs inputs \[C, H, W\], one input here has the shape \[64\]"):
        task.model(task.load(0).shape)


@pytest.mark.parametrize("name", ["resnet:0", "resnet_bn:8,x", "resnet:8,,8"])
def test_widths_that_are_no_numbers_are_refused(name: str) -> None:
    with pytest.raises(InvalidOptionError, match="give whole numbers above 0"):
        resolve(Source("digits", model=name))


@pytest.mark.parametrize("inputs", [(1, 28, 28), (3, 32, 32), (2, 9, 9)])
@pytest.mark.parametrize("name", ["cnn", "resnet", "resnet_bn"])
def test_a_model_for_images_takes_any_size(name: str, inputs: tuple[int, ...]) -> None:
    assert MODELS[name]()(Shape(inputs, 5))(torch.randn(3, *inputs)).shape == (3, 5)


def test_the_numbers_of_a_residual_network_are_the_widths_of_its_stages() -> None:
    shape = Shape((3, 32, 32), 10)
    three, two = (resolve(Source("digits", model=name)).model(shape) for name in ("resnet", "resnet:16,32"))
    assert count(three) == 78_042
    assert [p.shape[0] for p in two.parameters() if p.ndim == 4] == [16, 16, 16, 32, 32, 32]
    assert two.head.in_features == 32


def test_the_two_residual_networks_differ_in_their_normalisation_alone() -> None:
    shape = Shape((1, 28, 28), 10)
    group, batch = MODELS["resnet"]()(shape), MODELS["resnet_bn"]()(shape)
    assert kinds(group) ^ kinds(batch) == {nn.GroupNorm, nn.BatchNorm2d}
    assert [p.shape for p in group.parameters()] == [p.shape for p in batch.parameters()]


# The tasks that use them


@pytest.mark.parametrize("name", CIFAR)
def test_the_cifar_tasks_differ_in_model_and_batches_alone(name: str, tmp_path: Path) -> None:
    made_cifar(tmp_path)
    task, plain = file_task(name, tmp_path), file_task("cifar10", tmp_path)
    assert (task.name, task.batch_size, task.epochs) == (name, *CIFAR[name])
    assert task.description == tasks()[name].description
    assert task.files == plain.files
    first, again = task.load(3), plain.load(3)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(first, part).inputs, getattr(again, part).inputs)
        assert torch.equal(getattr(first, part).targets, getattr(again, part).targets)
    wanted = {"cifar10": cnn(16, 32, 64), "cifar10_resnet": resnet(16, 32, 64)}.get(
        name, resnet(16, 32, 64, norm="batch")
    )
    model = task.model(first.shape)
    assert str(model) == str(wanted(Shape((3, 32, 32), 10)))
    assert evaluate(task, model, first.val).loss < 10


def test_the_convolutional_network_on_clothes_has_the_data_of_the_other_task(tmp_path: Path) -> None:
    made_fashion(tmp_path)
    task, plain = file_task("fashion_mnist_cnn", tmp_path), file_task("fashion_mnist", tmp_path)
    assert (task.batch_size, task.epochs, plain.batch_size, plain.epochs) == (256, 10, 64, 10)
    assert task.options_source is None
    assert plain.options_source
    splits = task.load(1)
    assert torch.equal(splits.train.inputs, plain.load(1).train.inputs)
    # 28, 14, 7 and 4 pixels along each side
    model = task.model(splits.shape)
    assert count(model) == (9 + 1) * 16 + (9 * 16 + 1) * 32 + (9 * 32 + 1) * 64 + (64 * 4 * 4 + 1) * 10
    assert model(splits.test.inputs).shape == (20, 10)


@pytest.mark.parametrize("name", ["fashion_mnist_cnn", "cifar10_resnet", "cifar10_resnet_bn"])
def test_missing_files_are_told_with_place_and_origin(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found in .*https://") as caught:
        file_task(name, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["fashion_mnist_cnn", "cifar10_resnet"])
def test_the_real_images_fit_their_model(name: str, steepest_data: Path) -> None:
    task = file_task(name, steepest_data)
    splits = task.load(0)
    outputs = task.model(splits.shape)(splits.train.inputs[:4])
    assert outputs.shape == (4, 10)
    assert torch.isfinite(outputs).all()
    assert len(splits.train) >= task.batch_size

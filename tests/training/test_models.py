"""Named models, and the tasks that bring a convolutional or a residual network along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from made_images import made_cifar, made_fashion
from steepest.errors import InvalidOptionError
from steepest.nn.attention import SoftmaxFreeAttention
from steepest.nn.softmax import SoftmaxAttention
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


# Named models


@pytest.mark.parametrize("name", ["cnn", "resnet", "resnet_bn", "resnet:8,16", "soft_vit", "vit", "vit:16,1"])
def test_a_model_for_images_is_refused_for_other_data(name: str) -> None:
    task = resolve(Source("digits", model=name))
    with pytest.raises(InvalidOptionError, match=r"needs inputs \[C, H, W\], one input here has the shape \[64\]"):
        task.model(task.load(0).shape)


@pytest.mark.parametrize("name", ["resnet:0", "resnet_bn:8,x", "resnet:8,,8", "vit:0", "soft_pixels:8,0"])
def test_widths_that_are_no_numbers_are_refused(name: str) -> None:
    with pytest.raises(InvalidOptionError, match="give whole numbers above 0"):
        resolve(Source("digits", model=name))


@pytest.mark.parametrize("inputs", [(1, 28, 28), (3, 32, 32), (2, 9, 9)])
@pytest.mark.parametrize("name", ["cnn", "resnet", "resnet_bn", "soft_vit", "vit", "soft_pixels", "pixels"])
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


TRANSFORMERS = {"soft_vit": "vit", "soft_pixels": "pixels"}


@pytest.mark.parametrize(("soft", "plain"), TRANSFORMERS.items())
def test_the_numbers_of_a_transformer_are_width_and_depth(soft: str, plain: str) -> None:
    shape = Shape((1, 28, 28), 10)
    for name in (soft, plain):
        encoder = next(m for m in MODELS[name](40, 3)(shape).modules() if hasattr(m, "position"))
        tokens = 49 if name.endswith("vit") else 784
        assert (len(encoder.blocks), encoder.position.shape) == (3, (tokens, 40))
        assert encoder.blocks[0].attention.num_heads == 2  # the largest number up to 40 / 16 that divides 40
        width, depth = (64, 4) if name.endswith("vit") else (32, 2)
        assert (
            count(MODELS[name]()(shape))
            == count(MODELS[name](width)(shape))
            == count(MODELS[name](width, depth)(shape))
        )
    with pytest.raises(
        InvalidOptionError, match=f"model {soft} got 3 numbers: it takes width and depth, as in {soft}:"
    ):
        resolve(Source("digits", model=f"{soft}:8,2,2"))


@pytest.mark.parametrize(("soft", "plain"), TRANSFORMERS.items())
def test_the_two_transformers_differ_in_their_attention_alone(soft: str, plain: str) -> None:
    shape = Shape((1, 9, 7), 3)
    first, second = (MODELS[name](32, 2)(shape) for name in (soft, plain))
    assert kinds(first) ^ kinds(second) == {SoftmaxFreeAttention, SoftmaxAttention}
    assert count(second) - count(first) == 2 * (32 * 32 + 32) - 2 * 2  # keys of every block, widths of every head


@pytest.mark.parametrize("name", ["soft_pixels", "pixels"])
def test_every_number_of_an_input_is_a_token_in_the_order_of_its_memory(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 5)
    model = MODELS[name](8, 1)(Shape((3, 4, 5), 2))
    tokens = torch.stack([images[:, c, i, j] for c in range(3) for i in range(4) for j in range(5)], dim=1)
    torch.testing.assert_close(model(images), model[-1](tokens.unsqueeze(2)))
    task = resolve(Source("digits", model=name))
    splits = task.load(0)
    assert task.model(splits.shape)(splits.val.inputs[:3]).shape == (3, 10)


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

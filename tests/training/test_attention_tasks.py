"""Tasks for transformers: the data are those of other tasks, and the twins differ in their attention alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from made_images import made_cifar, made_fashion
from steepest.nn.attention import SoftmaxFreeAttention
from steepest.nn.softmax import SoftmaxAttention
from steepest.nn.transformer import SequenceTransformer, VisionTransformer
from steepest.training.data import Splits
from steepest.training.registry import tasks
from steepest.training.source import Source, resolve
from steepest.training.task import FileTask, Task

TWINS = {
    "digits_soft": "digits_vit",
    "fashion_mnist_soft": "fashion_mnist_vit",
    "cifar10_soft": "cifar10_vit",
    "fashion_mnist_pixels_soft": "fashion_mnist_pixels",
    "cifar10_pixels_soft": "cifar10_pixels",
}
DIGITS_TUNED = {"adamw", "lpsgdm", "kfac", "fop", "sven"}
NAMES = [*TWINS, *TWINS.values()]
# Batch size, epochs, tokens, width, parameters with softmax-free attention and with softmax.
SIZES = {
    "digits": (64, 20, 16, 32, 16_046, 18_154),
    "fashion_mnist": (128, 10, 49, 48, 36_976, 41_674),
    "cifar10": (128, 10, 64, 48, 39_232, 43_930),
    "fashion_mnist_pixels": (32, 4, 784, 32, 40_526, 42_634),
    "cifar10_pixels": (32, 4, 3_072, 16, 53_292, 53_834),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both image sets, made by hand."""
    path = tmp_path_factory.mktemp("data")
    for name, make in (("fashion_mnist", made_fashion), ("cifar10", made_cifar)):
        (path / name).mkdir()
        make(path / name)
    return path


def data_of(name: str) -> str:
    return name.removesuffix("_soft").removesuffix("_vit")


def task_of(name: str, folder: Path) -> Task:
    entry = tasks()[name]
    return entry.at(folder / data_of(name).removesuffix("_pixels")) if isinstance(entry, FileTask) else entry


def same(first: Splits, second: Splits) -> bool:
    return all(
        torch.equal(getattr(getattr(first, part), what), getattr(getattr(second, part), what))
        for part in ("train", "val", "test")
        for what in ("inputs", "targets")
    )


def test_all_ten_are_in_the_registry() -> None:
    assert set(NAMES) <= tasks().keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_what_its_entry_says(name: str, folder: Path) -> None:
    entry, task = tasks()[name], task_of(name, folder)
    assert (task.name, task.description, task.kind) == (name, entry.description, "classification")
    batch_size, epochs, tokens, width, soft, plain = SIZES[data_of(name)]
    assert (task.batch_size, task.epochs) == (batch_size, epochs)
    splits = task.load(0)
    model = task.model(splits.shape)
    assert sum(p.numel() for p in model.parameters()) == (soft if name in TWINS else plain)
    inner = model[-1] if "pixels" in name else model
    assert type(inner) is (SequenceTransformer if "pixels" in name else VisionTransformer)
    assert inner.encoder.position.shape == (tokens, width)
    attention = SoftmaxFreeAttention if name in TWINS else SoftmaxAttention
    assert [type(block.attention) for block in inner.encoder.blocks] == [attention, attention]
    losses = task.loss.per_sample(model(splits.train.inputs[:2]), splits.train.targets[:2])
    assert torch.isfinite(losses).all()


@pytest.mark.parametrize(("soft", "plain"), TWINS.items())
def test_twins_have_the_same_data_and_budget(soft: str, plain: str, folder: Path) -> None:
    first, second = task_of(soft, folder), task_of(plain, folder)
    assert same(first.load(3), second.load(3))
    assert first.description == second.description.replace("softmax attention", "softmax-free attention")
    for what in ("batch_size", "epochs", "metrics", "files", "options_source"):
        assert getattr(first, what) == getattr(second, what)
    assert first.loss.name == second.loss.name
    # Learning rates were chosen for each of the two.
    assert first.options.keys() == second.options.keys() == (DIGITS_TUNED if soft == "digits_soft" else set())


def test_the_digits_are_those_of_the_other_task_as_images() -> None:
    images, rows = resolve(Source("digits_soft")).load(2), resolve(Source("digits")).load(2)
    for part in ("train", "val", "test"):
        found, known = getattr(images, part), getattr(rows, part)
        assert found.inputs.shape == (len(known), 1, 8, 8)
        assert torch.equal(found.inputs[:, 0, 3, 5], known.inputs[:, 8 * 3 + 5])
        assert torch.equal(found.targets, known.targets)


@pytest.mark.parametrize(
    ("name", "other"), [("fashion_mnist_soft", "fashion_mnist"), ("cifar10_vit", "cifar10_resnet")]
)
def test_images_in_patches_are_those_of_the_other_task(name: str, other: str, folder: Path) -> None:
    whole = tasks()[other]
    assert isinstance(whole, FileTask)
    task = whole.at(folder / data_of(name))
    found = task_of(name, folder)
    assert same(found.load(1), task.load(1))
    assert found.files == task.files
    assert found.load(1).scaling.keys() == {"input_mean", "input_scale"}
    assert found.description.partition(";")[0] == whole.description.partition(";")[0]


@pytest.mark.parametrize("name", ["fashion_mnist_pixels_soft", "cifar10_pixels"])
def test_sequences_are_the_first_images_of_every_part(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steepest.training.tasks import transformers

    assert (transformers._TRAINED, transformers._HELD_OUT) == (5_000, 1_000)
    whole = task_of(name.partition("_pixels")[0] + "_soft", folder).load(1)
    assert same(task_of(name, folder).load(1), whole)  # there are fewer than that
    monkeypatch.setattr(transformers, "_TRAINED", 13)
    monkeypatch.setattr(transformers, "_HELD_OUT", 7)
    few = task_of(name, folder).load(1)
    for part, size in (("train", 13), ("val", 7), ("test", 7)):
        found, known = getattr(few, part), getattr(whole, part)
        assert torch.equal(found.inputs, known.inputs[:size])
        assert torch.equal(found.targets, known.targets[:size])
        # No view that keeps all images in memory.
        assert found.inputs.untyped_storage().nbytes() == found.inputs.nbytes
    assert all(torch.equal(few.scaling[key], whole.scaling[key]) for key in ("input_mean", "input_scale"))


@pytest.mark.parametrize("name", ["fashion_mnist_pixels", "cifar10_pixels_soft"])
def test_the_real_sequences_are_as_many_as_the_description_says(name: str, steepest_data: Path) -> None:
    entry = tasks()[name]
    assert isinstance(entry, FileTask)
    splits = entry.at(steepest_data).load(0)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [5_000, 1_000, 1_000]
    assert entry.description.startswith("5,000 training images as sequences of")
    for part in (splits.train, splits.val, splits.test):
        assert part.targets.bincount(minlength=10).min() > 0.07 * len(part)

"""The definitions of the two problems of the Sven paper, written out a second time."""

from __future__ import annotations

from itertools import product
from math import prod

import torch

from steepest.training.models import mlp
from steepest.training.source import Source, resolve
from steepest.training.task import Task
from steepest.training.tasks.synthetic import exponents


def get_task(name: str) -> Task:
    return resolve(Source(name))


def test_toy_1d_is_the_published_problem() -> None:
    task = get_task("toy_1d")
    splits = task.load(0)
    pool, val, test = (
        2 * torch.rand(10_000, 1, generator=torch.Generator().manual_seed(seed)) - 1 for seed in range(3)
    )

    def raw(x: torch.Tensor) -> torch.Tensor:
        return (-10 * x.pow(2)).exp() * (2 * x).sin()

    mean, std = raw(pool).mean(), raw(pool).std()
    for part, x in ((splits.train, pool), (splits.val, val), (splits.test, test)):
        assert torch.equal(part.inputs, x)
        torch.testing.assert_close(part.targets, (raw(x) - mean) / std)
    assert (task.batch_size, task.epochs, task.loss.name) == (32, 20, "squared error")
    model = task.model(splits.shape)
    assert [type(layer).__name__ for layer in model.children()] == ["Linear", "GELU"] * 3 + ["Linear"]
    assert sum(p.numel() for p in model.parameters()) == 593


def test_polynomial_has_all_monomials_of_degree_four_in_six_variables() -> None:
    expected = {power for power in product(range(5), repeat=6) if sum(power) <= 4}
    found = exponents(6, 4)
    assert set(found) == expected
    assert len(found) == 210


def test_polynomial_is_the_published_problem() -> None:
    task = get_task("polynomial")
    splits = task.load(0)
    x = torch.randn(10_000, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(splits.train.inputs, x)
    double_factorials = {0: 1, 1: 1, 2: 3, 3: 15, 4: 105}
    powers = exponents(6, 4)
    draws = torch.randn(210, generator=torch.Generator().manual_seed(3))
    y = torch.zeros(10_000, dtype=torch.float64)
    for draw, power in zip(draws, powers, strict=True):
        scale = prod(double_factorials[p] for p in power) ** -0.5
        y += draw.double() * scale * (x.double() ** torch.tensor(power)).prod(dim=1)
    torch.testing.assert_close(splits.train.targets.squeeze(1).double(), (y - y.mean()) / y.std(), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in task.model(splits.shape).parameters()) == 673


def test_the_data_seed_changes_the_data() -> None:
    first, second = get_task("toy_1d").load(0), get_task("toy_1d").load(1)
    assert not torch.equal(first.train.inputs, second.train.inputs)


def test_digits_and_diabetes_are_what_scikit_learn_has() -> None:
    digits, diabetes = get_task("digits").load(0), get_task("diabetes").load(0)
    assert sum(map(len, (digits.train, digits.val, digits.test))) == 1797
    assert sum(map(len, (diabetes.train, diabetes.val, diabetes.test))) == 442
    assert digits.train.inputs.max() == 1.0
    assert set(digits.train.targets.tolist()) == set(range(10))
    torch.testing.assert_close(diabetes.train.inputs.mean(dim=0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(diabetes.train.targets.std(correction=0), torch.tensor(1.0))


def test_an_mlp_ends_without_activation() -> None:
    assert [type(layer).__name__ for layer in mlp(3, 4, 2)] == ["Linear", "GELU", "Linear"]

"""Models with softmax-free attention in the engine, under every optimizer of the library, and in a selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from steepest.nn import CholeskyInverse, NewtonInverse, SoftmaxFreeAttention

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
SIZE = (3, 4)


class Net(nn.Module):
    """Tokens of three features: embedded, one block of attention, averaged, two classes."""

    def __init__(self, *, mask: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.mask = mask
        self.embed, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.attention = SoftmaxFreeAttention(8, 2, **{"num_landmarks": 4} | options)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        mask = None if self.mask is None else self.mask[: len(x)]
        size = SIZE if self.attention.dims == 2 else None
        tokens = tokens + self.attention(self.norm(tokens), key_padding_mask=mask, size=size)[0]
        return self.head(tokens.mean(1))


class Encoder(nn.Module):
    def __init__(self, *, mask: Tensor | None = None) -> None:
        super().__init__()
        self.mask = mask
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.block.self_attn = SoftmaxFreeAttention(8, 2, num_landmarks=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x), src_key_padding_mask=self.mask).mean(1))


def made(kind: Callable[..., nn.Module] = Net, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return kind(**options)


def data(rows: int, *, count: int = 12) -> tuple[Tensor, Tensor]:
    """Classes that differ in how far apart the tokens of a sample are."""
    x, y = torch.randn(rows, count, 3, generator=torch.Generator().manual_seed(2)), torch.arange(rows) % 2
    return x * (1 + y)[:, None, None], y


MASK = torch.zeros(5, 12, dtype=torch.bool)
MASK[1, 8:] = MASK[2, ::3] = MASK[4] = True
STRIDED: dict[str, Any] = {"num_landmarks": None, "landmark_stride": 5}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "averaged": made,
    "runs of unequal length": lambda: made(num_landmarks=5),
    "masked": lambda: made(mask=MASK, num_landmarks=5),
    "plain, no width, no bias": lambda: made(normalize=False, learn_bandwidth=False, bias=False),
    "strided": lambda: made(**STRIDED, value_kernel_size=3),
    "strided, masked": lambda: made(**STRIDED, value_kernel_size=3, mask=MASK),
    "cells": lambda: made(dims=2, value_kernel_size=5, inverse=CholeskyInverse(0.2)),
    "strided map": lambda: made(**STRIDED | {"landmark_stride": 2}, dims=2, value_kernel_size=3),
    "strided map, masked": lambda: made(**STRIDED | {"landmark_stride": 2}, dims=2, mask=MASK),
    "newton": lambda: made(inverse=NewtonInverse()),
    "newton, few steps": lambda: made(inverse=NewtonInverse(steps=3)),
    "torch encoder": lambda: made(Encoder),
    "torch encoder, masked": lambda: made(Encoder, mask=MASK),
    "torch encoder, eval": lambda: made(Encoder).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_gives_what_one_backward_per_row_gives(name: str) -> None:
    model, found = MODELS[name]().double(), []
    x, y = data(5)
    for capture in (st.Capture(model), st.ReferenceCapture(model)):
        with capture:
            rows = CROSS_ENTROPY(model(x.double()), y)
        found.append(capture.jacobian(rows))
    fast, slow = found
    assert fast.names == slow.names == tuple(key for key, _ in model.named_parameters())
    torch.testing.assert_close(fast.to_dense(), slow.to_dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast.gram(), slow.gram(), rtol=1e-10, atol=1e-12)
    assert all(grads.any() for grads in slow.per_sample_grads().values())


def test_the_engine_takes_images_of_many_sizes_in_turn() -> None:
    model = made(num_landmarks=5).double()
    capture = st.Capture(model)
    for count in (12, 7, 3):
        x, y = data(4, count=count)
        with capture:
            rows = CROSS_ENTROPY(model(x.double()), y)
        fast = capture.jacobian(rows).to_dense()
        reference = st.ReferenceCapture(model)
        with reference:
            rows = CROSS_ENTROPY(model(x.double()), y)
        torch.testing.assert_close(fast, reference.jacobian(rows).to_dense(), rtol=1e-10, atol=1e-12)


def gradient_closure(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss = CROSS_ENTROPY(model(x), y).mean()
        loss.backward()
        return loss.detach()

    return closure


def row_closure(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: CROSS_ENTROPY(model(x), y)


OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], Any]] = {
    "sven": (lambda model: st.Sven(model, lr=0.1, metric=st.KroneckerMetric()), row_closure),
    "kfac": (lambda model: st.KFAC(model, lr=0.003), gradient_closure),
    "fop": (lambda model: st.FOP(model, lr=0.003), gradient_closure),
    "lpsgdm": (lambda model: st.LPSGDM(model.named_parameters(), lr=0.003), gradient_closure),
}


@pytest.mark.parametrize("options", [{}, STRIDED | {"value_kernel_size": 3}], ids=["averaged", "strided"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_few_steps_lower_the_loss_and_move_every_parameter(name: str, options: dict[str, Any]) -> None:
    model, (x, y) = made(**options), data(24)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    make, closure = OPTIMIZERS[name]
    optimizer = make(model)
    losses = [optimizer.step(closure(model, x, y)) for _ in range(6)]
    means = [loss.mean().item() for loss in losses if loss is not None]
    with torch.no_grad():
        after = CROSS_ENTROPY(model(x), y).mean().item()
    assert after < means[0] - 0.01
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_a_selection_scores_its_samples() -> None:
    x, y = data(24)
    chosen = st.select_subset(
        made(), torch.utils.data.TensorDataset(x, y), CROSS_ENTROPY, fraction=0.25, method=st.SAGE(), batch_size=8
    )
    assert len(chosen.indices) == 6
    assert chosen.scores.isfinite().all()
    assert len(chosen.scores.unique()) > 12

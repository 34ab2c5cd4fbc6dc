"""KFAC in training loops as they are written: micro-batches, validation, unused layers, mixed precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from optim.kfac_runs import DOUBLE, EVERY, FISHERS, STILL, assert_same, both, data, factors, mlp, snapshot, train
from steepest.optim.fisher import Fisher

L, S = nn.Linear, nn.Sequential


@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_micro_batches_make_the_step_of_the_batch(fisher: Fisher, reduction: Any) -> None:
    x, y = data(8)
    results, sizes = [], {}
    for parts in (1, 4):
        model = mlp()
        opt = st.KFAC(model, lr=0.1, fisher=fisher, reduction=reduction, kl_clip=None)
        for step in range(3):
            opt.zero_grad()
            for xs, ys in zip((x + step).chunk(parts), y.chunk(parts), strict=True):
                divisor = parts if reduction == "mean" else 1
                (F.cross_entropy(model(xs), ys, reduction=reduction) / divisor).backward()
            opt.step()
        results.append(snapshot(model))
        sizes[parts] = factors(opt)
    assert_same(sizes[1], sizes[4])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fisher", FISHERS.values(), ids=FISHERS)
def test_clearing_between_forward_and_backward_is_as_good_as_before(fisher: Fisher) -> None:
    results = []
    for early in (True, False):
        model, (x, y) = mlp(), data()
        opt = st.KFAC(model, fisher=fisher)
        for _ in range(3):
            if early:
                opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if not early:
                opt.zero_grad()
            loss.backward()
            opt.step()
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fisher", FISHERS.values(), ids=FISHERS)
def test_a_forward_without_a_backward_changes_nothing(fisher: Fisher) -> None:
    results = []
    for validate in (False, True):
        model, (x, y) = mlp(), data()
        opt = st.KFAC(model, fisher=fisher)
        for _ in range(3):
            train(model, opt, x, y, F.cross_entropy)
            if validate:
                kept = F.cross_entropy(model(2 * x), y)  # with gradients, as careless validation has it
                with torch.no_grad():
                    model(x)
                assert kept.requires_grad
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_is_unused_in_a_step_stays_and_is_trained_later() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.with_b = L(4, 3), L(3, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if self.with_b else self.a(x)

    model = Switch().double()
    opt = st.KFAC(model)
    start = model.b.weight.detach().clone()
    train(model, opt, *data(), F.cross_entropy)
    assert torch.equal(start, model.b.weight)
    model.with_b = True
    train(model, opt, *data(), F.cross_entropy)
    assert not torch.equal(start, model.b.weight)


def test_layers_used_twice_and_attention_are_trained() -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double()
    head = L(4, 3).double()
    model = S(encoder, head, nn.Flatten(1), L(9, 3).double())
    opt = st.KFAC(model, **EVERY)
    x, y = torch.randn(5, 3, 4, dtype=DOUBLE), torch.arange(5) % 3
    history = [train(model, opt, x, y, F.cross_entropy) for _ in range(30)]
    assert history[-1] < 0.5 * history[0]
    assert "0.self_attn" in {block.name for block in opt._blocks.values()}


# -- mixed precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("how", ["plain", "unscaled", "clipped"])
@pytest.mark.parametrize("kind", [st.KFAC, st.FOP])
def test_a_grad_scaler_leaves_the_step(kind: type[st.KFAC], how: str, fisher: str) -> None:
    results, found = [], []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = S(L(4, 5), nn.LayerNorm(5), L(5, 3))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
        opt = kind(model, kl_clip=None, lr=0.05, grad_scaler=scaler, fisher=FISHERS[fisher], **EVERY)
        for step in range(4):
            x, y = data(8, seed=step)
            opt.zero_grad()
            scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
            if how != "plain":
                scaler.unscale_(opt)
            if how == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
        results.append(snapshot(model))
        found.append(factors(opt))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
    assert_same(*found, rtol=2e-3)


def test_infinite_scaled_gradients_skip_the_step_and_lower_the_scale() -> None:
    model, (x, y) = mlp().float(), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = st.KFAC(model)
    before = snapshot(model)
    scaler.scale(F.cross_entropy(model(x.float() * torch.inf), y)).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    assert opt.diagnostics is None
    opt.zero_grad()
    scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
    scaler.step(opt)
    assert opt.diagnostics is not None


@pytest.mark.parametrize("fisher", FISHERS)
def test_bfloat16_autocast_is_close_to_float32(fisher: str) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = S(L(4, 16), nn.ReLU(), L(16, 3))
        opt = st.KFAC(model, **{**STILL, "damping": 0.1}, fisher=FISHERS[fisher])
        x, y = data(64)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        opt.step()
        results.append(factors(opt))
    for name in ("0", "2"):
        for a, b in zip(results[0][name], results[1][name], strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert (a - b).norm() < 0.02 * a.norm()

"""Parameter groups of KFAC: who trains what, with which options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import steepest as st
from optim.kfac_runs import data, factors, mlp, snapshot, train

L, S = nn.Linear, nn.Sequential


def test_groups_have_their_own_options() -> None:
    model, (x, y) = mlp(), data()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    opt = st.KFAC(model, params=[{"params": first, "lr": 0.0}, {"params": last, "weight_decay": 0.5}], lr=0.1)
    assert [group["lr"] for group in opt.param_groups] == [0.0, 0.1]
    before = snapshot(model)
    train(model, opt, x, y, F.cross_entropy)
    after = snapshot(model)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]


def test_a_weight_and_a_bias_in_two_groups_are_trained_apart() -> None:
    model, (x, y) = mlp(), data()
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    opt = st.KFAC(model, params=[{"params": weights}, {"params": biases}])
    assert [group["method"] for group in opt.param_groups] == ["kfac", "adamw"]
    train(model, opt, x, y, F.cross_entropy)
    assert factors(opt)["0"][0].shape == (4, 4)
    assert "its weight is in another group" in repr(opt)


def test_parameters_can_be_named_and_added_later() -> None:
    model, (x, y) = mlp(), data()
    opt = st.KFAC(model, params=model[2].named_parameters(prefix="last"))
    assert opt.param_groups[0]["param_names"] == ["last.weight", "last.bias"]
    before = snapshot(model)
    train(model, opt, x, y, F.cross_entropy)
    assert torch.equal(before[0], model[0].weight)
    opt.add_param_group({"params": list(model[0].named_parameters()), "lr": 0.02})
    train(model, opt, x, y, F.cross_entropy)
    assert not torch.equal(before[0], model[0].weight)


def test_printing_tells_who_trains_what() -> None:
    model = S(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, groups=2), nn.Flatten(), L(4, 3))
    model.add_module("head", L(3, 3, bias=False))
    text = repr(st.KFAC(model, skip=["head"]))
    assert "Kronecker factors, 2 layers:\n    0: 4 x 2 x 3, 4\n    4: 3 x 4, 3\n" in text
    assert "AdamW, 5 parameters:" in text
    for line in (
        "1.weight: BatchNorm1d has no Kronecker factors",
        "2.bias: a convolution with groups has no Kronecker factors",
        "head.weight: skip='head'",
    ):
        assert line in text


def test_who_gets_factors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 4), nn.utils.parametrizations.weight_norm(L(4, 4))
            self.frozen, self.head = L(4, 4), L(4, 7, bias=False)
            self.frozen.weight.requires_grad_(False)
            self.head.weight = self.embed.weight
            self.attn = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
            self.plain = L(4, 4)

    text = repr(st.KFAC(Tied()))
    assert "Kronecker factors, 2 layers:\n    attn.out_proj: 4 x 4, 4\n    plain: 4 x 4, 4" in text
    for line in (
        "embed.weight: an embedding, which embeddings='kronecker' would give a factor",
        "norm.bias: its weight is parametrized",
        "frozen.bias: its weight is not trained",
        "attn.k_proj_weight:",
    ):
        assert line in text


def test_schedulers_scale_the_rate_of_every_group() -> None:
    model, (x, y) = S(L(4, 5), nn.LayerNorm(5), L(5, 3)).double(), data()
    opt = st.KFAC(model, lr=0.4, adamw_lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    train(model, opt, x, y, F.cross_entropy)
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.2, 0.01]

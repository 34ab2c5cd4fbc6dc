"""KFAC's Kronecker factors against autograd, dense Hessians and patches cut out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from optim.kfac_runs import DOUBLE, STILL, assert_same, both, data, factors, factors_after, mlp, train
from steepest.optim.fisher import Exact, Fisher, MonteCarlo, OutputFisher

L, S = nn.Linear, nn.Sequential


def test_one_datum_has_the_outer_product_of_its_gradient() -> None:
    model = S(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Tanh(), L(3, 4)).double()
    x, y = torch.randn(1, 2, 3, 3, dtype=DOUBLE), torch.tensor([1])
    opt = st.KFAC(model, **STILL)
    train(model, opt, x, y, F.cross_entropy)
    for block in opt._blocks.values():
        a, s = factors(opt)[block.name]
        flat = block.join([p.grad for p in block.params]).flatten()
        torch.testing.assert_close(torch.kron(s, a), torch.outer(flat, flat))


@pytest.mark.parametrize("scale", [2.0 / 3, 0.7])
def test_the_exact_fisher_of_a_deep_linear_net_is_the_gauss_newton_matrix(scale: float) -> None:
    """There the gradients at every layer are the same for all data, so that nothing is lost by the factors."""
    torch.manual_seed(0)
    model = S(L(4, 5), L(5, 6, bias=False), L(6, 3)).double()
    x, _ = data(7)
    found = factors_after(
        model, lambda out, y: scale / 2 * (out - y).square().sum(1).mean(), (x, torch.zeros(7, 3, dtype=DOUBLE)),
        fisher=Exact("gaussian", scale=scale),
    )  # fmt: skip
    for name, layer in model.named_children():
        out = model(x)
        params = list(layer.parameters())
        rows = []
        for n in range(7):
            for c in range(3):
                grads = torch.autograd.grad(out[n, c], params, retain_graph=True)
                rows.append(torch.cat([g if g.ndim == 2 else g.unsqueeze(1) for g in grads], 1).flatten())
        J = torch.stack(rows)
        a, s = found[name]
        torch.testing.assert_close(torch.kron(s, a), scale * J.T @ J / 7)


OUTPUTS: dict[str, tuple[OutputFisher, Callable[[Tensor], Tensor]]] = {
    "categorical": (Exact("categorical"), lambda f: F.cross_entropy(f, torch.tensor([0, 2, 1]), reduction="sum")),
    "bernoulli": (
        Exact("bernoulli"),
        lambda f: F.binary_cross_entropy_with_logits(f, torch.eye(3, 4, dtype=DOUBLE), reduction="sum"),
    ),
    "gaussian": (Exact("gaussian", scale=0.5), lambda f: 0.25 * (f - 1).square().sum()),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_exact_roots_are_those_of_the_dense_hessian_in_the_output(kind: str) -> None:
    fisher, loss = OUTPUTS[kind]
    f = torch.randn(3, 4, dtype=DOUBLE)
    hessian = torch.autograd.functional.hessian(loss, f).reshape(12, 12)
    total = torch.zeros(3, 4, 4, dtype=DOUBLE)
    for root, weight in fisher.roots(f, (0, 0)):
        total += weight * torch.einsum("na,nb->nab", root, root)
    torch.testing.assert_close(torch.block_diag(*total), hessian)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_exact_fisher_is_the_mean_of_many_draws(kind: str) -> None:
    model, (x, y) = mlp(), data()
    exact = OUTPUTS[kind][0]
    assert isinstance(exact, Exact)
    drawn = MonteCarlo(exact.output, exact.scale, draws=3000, seed=5)
    one, many = (factors_after(model, F.cross_entropy, (x, y), fisher=fisher) for fisher in (exact, drawn))
    for name in one:
        torch.testing.assert_close(one[name][0], many[name][0])
        assert (one[name][1] - many[name][1]).norm() < 0.05 * one[name][1].norm()


def test_draws_follow_from_seed_and_step_alone() -> None:
    model, (x, y) = mlp(), data()
    found = {}
    for name, seed, burn in (("a", 1, 0), ("b", 1, 99), ("c", 2, 0)):
        torch.rand(burn + 1)
        found[name] = factors_after(model, F.cross_entropy, (x, y), fisher=MonteCarlo(seed=seed))["0"][1]
    assert torch.equal(found["a"], found["b"])
    assert not torch.allclose(found["a"], found["c"])
    opt = st.KFAC(model, **STILL, fisher=MonteCarlo(), factor_decay=0.0)
    seen = []
    for _ in range(2):
        train(model, opt, x, y, F.cross_entropy)
        seen.append(factors(opt)["0"][1])
    assert not torch.allclose(*seen)


def test_every_backward_of_an_accumulated_step_has_draws_of_its_own() -> None:
    fisher = {"fisher": MonteCarlo()}
    once = factors_after(mlp(), F.cross_entropy, data(), **fisher)
    twice = factors_after(mlp(), F.cross_entropy, data(), data(), **fisher)
    again = factors_after(mlp(), F.cross_entropy, data(), data(), **fisher)
    assert_same(twice, again, rtol=0)
    for name, (_, grad_factor) in once.items():
        assert not torch.allclose(grad_factor, twice[name][1])


@both
def test_a_batch_given_twice_has_the_factors_of_the_batch(fisher: Fisher) -> None:
    model, (x, y) = mlp(), data()
    once = factors_after(model, F.cross_entropy, (x, y), fisher=fisher)
    assert_same(once, factors_after(model, F.cross_entropy, (x.repeat(3, 1), y.repeat(3)), fisher=fisher))


@both
def test_a_sum_has_the_factors_of_a_mean(fisher: Fisher) -> None:
    model, (x, y) = mlp(), data()

    def summed(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target, reduction="sum")

    mean = factors_after(model, F.cross_entropy, (x, y), fisher=fisher)
    assert_same(mean, factors_after(model, summed, (x, y), fisher=fisher, reduction="sum"))


@both
def test_the_factors_do_not_depend_on_the_length_of_a_sequence(fisher: Fisher) -> None:
    model = S(L(4, 5), nn.Tanh(), L(5, 3)).double()
    x, y = torch.randn(5, 3, 4, dtype=DOUBLE), torch.arange(15).view(5, 3) % 3

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), target.flatten())

    once = factors_after(model, loss, (x, y), fisher=fisher, loss_terms="positions")
    more = factors_after(model, loss, (x.repeat(1, 4, 1), y.repeat(1, 4)), fisher=fisher, loss_terms="positions")
    assert_same(once, more)
    flat = factors_after(model, F.cross_entropy, (x.flatten(0, 1), y.flatten()), fisher=fisher)
    assert_same(once, flat)
    given = factors_after(model, loss, (x, y), fisher=fisher, loss_terms=lambda out: out.shape[:2].numel())
    assert_same(once, given)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_factors_do_not_depend_on_the_resolution_of_an_image(pooled: bool) -> None:
    """Pictures tiled with themselves: a loss at every position with "expand", one of the mean with "reduce"."""
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    model = S(conv, nn.Tanh()).double()
    x, y = torch.randn(4, 2, 5, 5, dtype=DOUBLE), torch.randn(4, 3, 1, 1, dtype=DOUBLE)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        out = out.mean((2, 3), keepdim=True) if pooled else out
        return (out - target).square().sum(1).mean()

    options = (
        {"sharing": "reduce", "loss_terms": "samples"} if pooled else {"loss_terms": lambda out: out[:, 0].numel()}
    )
    small = factors_after(model, loss, (x, y), **options)
    assert_same(small, factors_after(model, loss, (x.repeat(1, 1, 3, 2), y), **options))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_factors_of_a_convolution_are_those_of_its_patches(sharing: Any) -> None:
    conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    model = S(conv, nn.Tanh(), nn.Flatten(), L(54, 4)).double()
    x, y = torch.randn(5, 2, 6, 4, dtype=DOUBLE), torch.arange(5) % 4
    a, s = factors_after(model, F.cross_entropy, (x, y), sharing=sharing)["0"]
    z = conv(x)
    out = model[3](z.tanh().flatten(1))
    (g,) = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), z)
    patches = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1)).transpose(1, 2)
    patches = torch.cat([patches, torch.ones_like(patches[..., :1])], 2)
    grads = g.flatten(2).transpose(1, 2)
    if sharing == "reduce":
        patches, grads = patches.mean(1, keepdim=True), grads.sum(1, keepdim=True)
    torch.testing.assert_close(a, torch.einsum("nti,ntj->ij", patches, patches) / patches.shape[:2].numel())
    torch.testing.assert_close(s, torch.einsum("nti,ntj->ij", grads, grads) / 5)

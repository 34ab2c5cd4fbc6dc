"""The steps of KFAC against dense linear algebra, and those of AdamW for what has no factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from optim.kfac_runs import DOUBLE, EVERY, SOLVERS, data, mlp, train

L, S = nn.Linear, nn.Sequential


def layer_records(model: nn.Module, losses: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs with a 1 joined and output gradients of every sample's loss, of linear layers, by autograd alone."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, layer in model.named_modules()
        if isinstance(layer, L)
    ]
    rows = losses(model(x))
    for handle in handles:
        handle.remove()
    found = {}
    for name, (inputs, out) in seen.items():
        g = torch.stack([torch.autograd.grad(row, out, retain_graph=True)[0][n] for n, row in enumerate(rows)])
        found[name] = (torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1).detach(), g)
    return found


class Slow:
    """KFAC of linear layers with biases, dense and row by row, that decomposes in every step."""

    def __init__(self, model: nn.Module, solver: str, **options: float) -> None:
        self.model, self.solver, self.o = model, solver, options
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, L)}
        self.past: dict[str, Any] = {}
        self.steps, self.clip = 0, 1.0

    def step(self, x: Tensor, y: Tensor) -> None:
        self.steps += 1
        records = layer_records(self.model, lambda out: F.cross_entropy(out, y, reduction="none"), x)
        pairs = {name: self.direction(name, *record) for name, record in records.items()}
        o = self.o
        if o["kl_clip"]:
            change = sum((gradient * update).sum() for gradient, update in pairs.values())
            self.clip = min(1.0, float((o["kl_clip"] / (o["lr"] ** 2 * change)) ** 0.5))
        for name, layer in self.layers.items():
            past = self.past[name]
            past["v"] = o["momentum"] * past["v"] + self.clip * pairs[name][1]
            with torch.no_grad():
                for param, move in ((layer.weight, past["v"][:, :-1]), (layer.bias, past["v"][:, -1])):
                    param.mul_(1 - o["lr"] * o["weight_decay"]).sub_(o["lr"] * move)

    def direction(self, name: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.einsum("no,ni->oi", g, x) / len(x)
        past = self.past.setdefault(name, {"A": 0.0, "S": 0.0, "w": 0.0, "v": torch.zeros_like(gradient)})
        decay, damping = self.o["factor_decay"], self.o["damping"]
        for key, new in (("A", x.T @ x / len(x)), ("S", g.T @ g / len(x)), ("w", 1.0)):
            past[key] = decay * past[key] + (1 - decay) * new
        a, s = past["A"] / past["w"], past["S"] / past["w"]
        if self.solver == "corrected":
            return gradient, self.corrected(past, a, s, x, g, gradient)
        if self.solver == "cholesky":
            pi = ((a.trace() / len(a)) / (s.trace() / len(s))) ** 0.5
            M = torch.kron(
                s + damping**0.5 / pi * torch.eye(len(s), dtype=DOUBLE),
                a + damping**0.5 * pi * torch.eye(len(a), dtype=DOUBLE),
            )
        else:
            M = torch.kron(s, a) + damping * torch.eye(len(a) * len(s), dtype=DOUBLE)
        return gradient, torch.linalg.solve(M, gradient.flatten()).view_as(gradient)

    def corrected(self, past: Any, a: Tensor, s: Tensor, x: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
        """EKFAC as a full matrix Q diag(d) Q^T over flat gradients, Q the Kronecker product of the eigenvectors."""
        (sv, su), (av, au) = torch.linalg.eigh(s), torch.linalg.eigh(a)
        Q = torch.kron(su, au)
        if "Q" in past:
            per_sample = torch.einsum("no,ni->noi", g, x).flatten(1)
            seen = (per_sample @ past["Q"]).square().mean(0)
            d = self.o["factor_decay"] * past["d"] + (1 - self.o["factor_decay"]) * seen
            d = (Q.T @ past["Q"]).square() @ d  # the diagonal of the same matrix in the new basis
        else:
            d = torch.kron(sv, av)
        past["Q"], past["d"] = Q, d
        return (Q @ ((Q.T @ gradient.flatten()) / (d + self.o["damping"]))).view_as(gradient)


OPTIONS: dict[str, dict[str, float]] = {
    "plain": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "kl_clip": 0.0},
    "momentum_and_decay": {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3, "kl_clip": 0.0},
    "clipped": {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.1, "kl_clip": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_steps_are_those_of_dense_linear_algebra(solver: str, options: dict[str, float]) -> None:
    options = {**options, "damping": 0.03, "factor_decay": 0.7}
    fast, slow = mlp(), mlp()
    opt = st.KFAC(fast, solver=SOLVERS[solver], **EVERY, **{**options, "kl_clip": options["kl_clip"] or None})
    reference = Slow(slow, solver, **options)
    for step in range(4):
        x, y = data(9, seed=step)
        train(fast, opt, x, y, F.cross_entropy)
        reference.step(x, y)
        assert opt.diagnostics is not None
        assert opt.diagnostics.clip == pytest.approx(reference.clip)
        for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert (reference.clip < 1) == bool(options["kl_clip"])


def test_what_has_no_factors_is_trained_by_adamw_to_the_bit() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return S(L(4, 5), nn.LayerNorm(5), nn.PReLU(), L(5, 3))

    mine, theirs = model(), model()
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    opt = st.KFAC(mine, skip=["."], **{f"adamw_{name}": value for name, value in settings.items()})
    reference = torch.optim.AdamW(theirs.parameters(), **settings)
    for step in range(5):
        x, y = data(seed=step)
        train(mine, opt, x.float(), y, F.cross_entropy)
        train(theirs, reference, x.float(), y, F.cross_entropy)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)

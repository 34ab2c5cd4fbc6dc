"""When KFAC updates its factors and decompositions, and what changes from step to step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steepest as st
from optim.kfac_runs import DOUBLE, EVERY, STILL, data, factors, factors_after, mlp, train
from steepest.errors import InvalidOptionError


@pytest.mark.parametrize("steps", [1, 5])
def test_running_factors_are_unbiased_means(steps: int) -> None:
    model, decay = mlp(), 0.8
    opt = st.KFAC(model, **{**STILL, **EVERY}, factor_decay=decay)
    single = []
    for step in range(steps):
        x, y = data(seed=step)
        single.append(factors_after(mlp(), F.cross_entropy, (x, y)))
        train(model, opt, x, y, F.cross_entropy)
    weights = [decay ** (steps - 1 - step) for step in range(steps)]
    for name, found in factors(opt).items():
        for which in (0, 1):
            mean = sum(w * part[name][which] for w, part in zip(weights, single, strict=True)) / sum(weights)
            torch.testing.assert_close(found[which], mean)


def test_factors_and_decompositions_keep_their_periods() -> None:
    model = mlp()
    opt = st.KFAC(model, factor_update_steps=3, inverse_update_steps=6)
    updated, decomposed = [], []
    for step in range(20):
        before = factors(opt)["0"][0] if step else torch.zeros(())
        train(model, opt, *data(seed=step), F.cross_entropy)
        if not torch.equal(before, factors(opt)["0"][0]):
            updated.append(step)
        assert opt.diagnostics is not None
        assert opt.diagnostics.num_decompositions in {0, 2}
        if opt.diagnostics.num_decompositions:
            decomposed.append(step)
    assert updated == [0, 1, 2, 3, 6, 9, 12, 15, 18]  # the first three are all looked at
    assert decomposed == [0, 1, 3, 9, 15]  # the first soon: at update 1, 2, 4; then every second


def test_the_first_decompositions_come_at_updates_1_2_4_8() -> None:
    model = mlp()
    opt = st.KFAC(model, factor_update_steps=1, inverse_update_steps=100)
    decomposed = []
    for step in range(20):
        train(model, opt, *data(seed=step), F.cross_entropy)
        assert opt.diagnostics is not None
        if opt.diagnostics.num_decompositions:
            decomposed.append(step + 1)
    assert decomposed == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("how", ["group", "schedule"])
def test_damping_acts_at_once_and_without_a_decomposition(how: str) -> None:
    model, (x, y) = mlp(), data()
    damping = (lambda step: 0.1 if step < 5 else 7.0) if how == "schedule" else 0.1
    opt = st.KFAC(model, lr=0.1, momentum=0.0, kl_clip=None, damping=damping, factor_update_steps=4, factor_decay=0.0)
    for _ in range(5):
        train(model, opt, x, y, F.cross_entropy)
    if how == "group":
        opt.param_groups[0]["damping"] = 7.0
    a, s = (torch.stack([f]) for f in factors(opt)["0"])
    basis = opt._curvature(next(iter(opt._blocks.values()))).basis.tensors()
    before = model[0].weight.detach().clone()
    train(model, opt, x, y, F.cross_entropy)
    assert opt.diagnostics is not None
    assert opt.diagnostics.num_decompositions == 0
    assert torch.equal(factors(opt)["0"][0], a[0])
    assert torch.equal(factors(opt)["0"][1], s[0])
    a, s = ((basis[f"{k}_basis"] * basis[f"{k}_values"]) @ basis[f"{k}_basis"].T for k in ("input", "grad"))
    flat = torch.cat([model[0].weight.grad, model[0].bias.grad.unsqueeze(1)], 1).flatten()
    M = torch.kron(s, a) + 7.0 * torch.eye(len(flat), dtype=DOUBLE)
    moved = torch.linalg.solve(M, flat).view(5, 5)[:, :-1]
    torch.testing.assert_close(before - 0.1 * moved, model[0].weight.detach())


def test_all_schedules_are_asked_for_the_step() -> None:
    model, (x, y) = mlp(), data()
    names = ("lr", "weight_decay", "damping", "momentum", "factor_decay", "kl_clip")
    asked: dict[str, list[int]] = {name: [] for name in names}

    def schedule(name: str, value: float) -> Callable[[int], float]:
        def at(step: int) -> float:
            asked[name].append(step)
            return value / (step + 1)

        return at

    opt = st.KFAC(model, **{name: schedule(name, 0.5) for name in asked})
    for step in range(3):
        train(model, opt, x, y, F.cross_entropy)
        assert all(opt.param_groups[0][name] == 0.5 / (step + 1) for name in asked)
    assert all(set(steps) == {0, 1, 2} for steps in asked.values())


def test_the_others_have_schedules_of_their_own() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double(), data()
    falling = {"lr": 0.4, "weight_decay": 0.2, "adamw_lr": 0.02, "adamw_weight_decay": 0.1}
    opt = st.KFAC(model, **{name: lambda step, value=value: value / (step + 1) for name, value in falling.items()})
    for step in range(3):
        train(model, opt, x, y, F.cross_entropy)
        layers, others = opt.param_groups
        assert (layers["lr"], layers["weight_decay"]) == (0.4 / (step + 1), 0.2 / (step + 1))
        assert (others["lr"], others["weight_decay"]) == (0.02 / (step + 1), 0.1 / (step + 1))


def test_the_periods_may_change_with_the_step() -> None:
    model, (x, y) = mlp(), data()
    opt = st.KFAC(model, factor_update_steps=lambda step: 2 if step < 20 else 5, inverse_update_steps=lambda _: 1)
    updated = []
    for step in range(40):
        before = opt.state[model[0].weight].get("updates", 0)
        train(model, opt, x, y, F.cross_entropy)
        if opt.state[model[0].weight]["updates"] > before:
            updated.append(step)
    assert updated == [0, 1, *range(2, 20, 2), 20, 25, 30, 35]
    with pytest.raises(InvalidOptionError, match="factor_update_steps=0"):
        st.KFAC(mlp(), factor_update_steps=lambda step: step)

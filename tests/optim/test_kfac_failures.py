"""KFAC where a decomposition fails: the last good one is kept, and three failures in a row raise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import steepest as st
from optim.kfac_runs import EVERY, data, mlp, snapshot, train
from steepest.linalg.kronecker import DecompositionError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the matrices whose decomposition fails from now on."""
    sizes: list[int] = []
    eigh = torch.linalg.eigh

    def broken(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(matrix) in sizes:
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    return sizes


def test_a_failed_decomposition_keeps_the_last_good_one_and_three_in_a_row_raise(failing: list[int]) -> None:
    model = mlp()
    opt = st.KFAC(model, **EVERY)
    train(model, opt, *data(seed=0), F.cross_entropy)
    good = {k: v.clone() for k, v in opt.state[model[2].weight]["decomposition"].items()}
    failing.append(6)  # the inputs of the last layer, its bias joined
    for count in (1, 2):
        train(model, opt, *data(seed=count), F.cross_entropy)
        assert opt.diagnostics is not None
        assert opt.diagnostics.num_failures == count
        assert opt.diagnostics.num_decompositions == 1
        kept = opt.state[model[2].weight]["decomposition"]
        assert all(torch.equal(kept[name], good[name]) for name in good)
    before, state = snapshot(model), copy.deepcopy(opt.state[model[2].weight]["input_factor"])
    with pytest.raises(DecompositionError, match="Layer '2'"):
        train(model, opt, *data(seed=3), F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    assert torch.equal(state, opt.state[model[2].weight]["input_factor"])
    failing.clear()
    train(model, opt, *data(seed=3), F.cross_entropy)
    assert opt.diagnostics is not None
    assert opt.diagnostics.num_failures == 0


def test_two_failures_with_a_success_between_do_not_add_up(failing: list[int]) -> None:
    model = mlp()
    opt = st.KFAC(model, **EVERY)
    for step, fails in enumerate([False, True, True, False, True, True, False]):
        failing[:] = [6] if fails else []
        train(model, opt, *data(seed=step), F.cross_entropy)
    assert opt.diagnostics is not None
    assert opt.diagnostics.num_failures == 0


def test_a_first_decomposition_that_fails_raises_with_the_layer(failing: list[int]) -> None:
    model = mlp()
    opt = st.KFAC(model)
    before = snapshot(model)
    failing.append(6)
    with pytest.raises(DecompositionError, match=r"Layer '2'.*input factor A"):
        train(model, opt, *data(), F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    failing.clear()
    train(model, opt, *data(), F.cross_entropy)

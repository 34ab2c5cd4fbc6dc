"""The state of KFAC: saved, loaded, resumed from, and as large as documented."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from optim.kfac_runs import FISHERS, SOLVERS, data, factors, mlp, train
from steepest.linalg.kronecker import KroneckerSolver

L, S = nn.Linear, nn.Sequential
RESUMED = [(solver, fisher) for solver in SOLVERS for fisher in FISHERS]


@pytest.mark.parametrize(("solver", "fisher"), RESUMED, ids=["-".join(pair) for pair in RESUMED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_run_resumed_within_a_period_goes_on_to_the_bit(solver: str, fisher: str, dtype: torch.dtype) -> None:
    def make() -> tuple[nn.Module, st.KFAC]:
        torch.manual_seed(0)
        model = S(L(4, 5), nn.LayerNorm(5), L(5, 3)).to(dtype)
        options: dict[str, Any] = {"factor_update_steps": 3, "inverse_update_steps": 6}
        return model, st.KFAC(model, solver=SOLVERS[solver], fisher=FISHERS[fisher], **options)

    def run(model: nn.Module, opt: st.KFAC, start: int) -> list[float]:
        steps = range(start, start + 7)
        return [train(model, opt, data(seed=k)[0].to(dtype), data()[1], F.cross_entropy) for k in steps]

    model, opt = make()
    run(model, opt, 0)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other, resumed = make()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    for name, pair in factors(resumed).items():
        assert all(factor.dtype == torch.float32 for factor in pair)
        assert all(torch.equal(a, b) for a, b in zip(pair, factors(opt)[name], strict=True))
    assert run(model, opt, 7) == run(other, resumed, 7)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_state_is_the_optimizers_own() -> None:
    model, (x, y) = mlp(), data()
    opt = st.KFAC(model)
    train(model, opt, x, y, F.cross_entropy)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other = mlp()
    resumed = st.KFAC(other)
    resumed.load_state_dict(saved)
    for _ in range(3):
        train(other, resumed, x, y, F.cross_entropy)
    buffers = [saved["state"][0]["momentum_buffer"], kept["state"][0]["momentum_buffer"]]
    assert torch.equal(*buffers)


def numbers_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return sum(map(numbers_in, value.values())) if isinstance(value, dict) else 0


@pytest.mark.parametrize(
    ("solver", "decomposition"),
    [
        (st.Eigenbasis(), lambda m, n: m * m + n * n + m + n),
        (st.EigenbasisCorrected(), lambda m, n: m * m + n * n + m * n),
        (st.Cholesky(), lambda m, n: 2 * (m * m + n * n) + 2),
    ],
    ids=["eigenbasis", "corrected", "cholesky"],
)
def test_the_state_is_as_large_as_the_documentation_says(
    solver: KroneckerSolver, decomposition: Callable[[int, int], int]
) -> None:
    model, (x, y) = mlp(), data()
    opt = st.KFAC(model, solver=solver)
    train(model, opt, x, y, F.cross_entropy)
    expected = sum(m * m + n * n + decomposition(m, n) + m * n for m, n in ((5, 5), (6, 3)))
    assert sum(map(numbers_in, opt.state.values())) == expected

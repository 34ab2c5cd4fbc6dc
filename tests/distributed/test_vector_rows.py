"""Vector rows that lie on several processes: one Jacobian, and one step of Sven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steepest as st
from capturing import capture_rows
from ranks import run_ranks
from steepest.distributed import Ranks
from steepest.distributed.jacobian import SpreadJacobian
from steepest.distributed.records import align, layout

COUNTS, K = (3, 5), 4


def model() -> nn.Module:
    """A linear layer, convolutions, a norm and an embedding: every form of vector rows."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(40, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Conv1d(8, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(24, K),
    ).double()


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(40, (count, 8), generator=generator) for count in COUNTS]


def spread(rank: int, world: int) -> dict[str, Any]:
    ranks = Ranks.current()
    assert ranks is not None
    made, mine = model(), tokens()[rank]
    local = capture_rows(made, lambda: made(mine).tanh())
    jacobian = SpreadJacobian(local, ranks, [count * K for count in COUNTS])
    weights = torch.linspace(-1, 1, jacobian.num_rows, dtype=torch.float64)
    vjp = jacobian.vjp(weights)
    kept = jacobian.sample_outputs(0.5, torch.Generator().manual_seed(1))
    found = {
        "gram": jacobian.gram(),
        "cut": jacobian.restrict(kept).gram(),
        "dense": jacobian.to_dense(),
        "vjp": torch.cat([product.flatten() for product in vjp.values()]),
        "jvp": jacobian.jvp(vjp),
        "norms": jacobian.squared_norms(),
        "normal": jacobian.normal_equations(weights, torch.float64)[0],
    }
    # One rank with vectors and the other with scalars: groups that differ become explicit gradients.
    mixed = local if rank == 0 else capture_rows(made, lambda: made(mine).tanh().sum(1))
    told = ranks.gather_objects((layout(mixed), mixed.num_rows))
    aligned = align(mixed, [one for one, _ in told])
    found["mixed"] = SpreadJacobian(aligned, ranks, [rows for _, rows in told]).gram()
    return found


def test_vector_rows_on_two_processes_are_one_jacobian(tmp_path: Path) -> None:
    made, parts = model(), tokens()
    truth = capture_rows(made, lambda: made(torch.cat(parts)).tanh())
    dense = truth.to_dense()
    weights = torch.linspace(-1, 1, truth.num_rows, dtype=torch.float64)
    flat = dense.T @ weights
    kept = truth.sample_outputs(0.5, torch.Generator().manual_seed(1))
    sums = dense[COUNTS[0] * K :].view(COUNTS[1], K, -1).sum(1)
    mixed = torch.cat([dense[: COUNTS[0] * K], sums])
    wanted = {
        "gram": dense @ dense.T,
        "cut": truth.restrict(kept).gram(),
        "dense": dense,
        "vjp": flat,
        "jvp": dense @ flat,
        "norms": dense.square().sum(1),
        "normal": dense.T @ dense,
        "mixed": mixed @ mixed.T,
    }
    for one in run_ranks(2, tmp_path, spread):
        for name, want in wanted.items():
            assert float((one[name] - want).abs().max()) <= 1e-11 * float(want.abs().max()), name


def step(rank: int, world: int) -> list[Tensor]:
    made, mine = model(), tokens()[rank]
    opt = st.Sven(made, lr=0.5, rows="residuals", solver=st.Damped(0.01))
    losses = []
    for _ in range(2):
        loss = opt.step(lambda: st.ggn_rows(made(mine), mine[:, 0] % K))
        assert loss is not None
        losses.append(loss)
    return [*losses, *(p.detach() for p in made.parameters())]


def test_two_processes_take_the_gauss_newton_step_of_one(tmp_path: Path) -> None:
    made, whole = model(), torch.cat(tokens())
    opt = st.Sven(made, lr=0.5, rows="residuals", solver=st.Damped(0.01))
    losses = [opt.step(lambda: st.ggn_rows(made(whole), whole[:, 0] % K)) for _ in range(2)]
    for one in run_ranks(2, tmp_path, step):
        for got, want in zip(one, [*losses, *made.parameters()], strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-9)

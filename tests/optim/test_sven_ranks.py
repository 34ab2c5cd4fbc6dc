"""Sven on several processes: the step of one process with the whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from optim.rank_runs import assert_identical
from optim.sven_cases import CASES, EQUAL, UNEQUAL, Case, Data, mlp, whole
from ranks import run_ranks

STEPS = 4


def train(case: Case, batches: list[list[Data]], own: int | None) -> dict[str, Any]:
    """Some steps with one rank's part of each batch, or with all of it."""
    model = case.fresh()
    opt = st.Sven(model, **case.options(model))
    returned, seen, calls = [], [], 0
    for parts in batches:
        data = whole(parts) if own is None else parts[own]
        before = (opt.traffic.sent, opt.traffic.gathered, opt.traffic.reduced, opt.traffic.broadcast)
        closure, called = counting(case, model, data)
        returned.append(opt.step(closure))
        calls = len(called)
        after = (opt.traffic.sent, opt.traffic.gathered, opt.traffic.reduced, opt.traffic.broadcast)
        assert opt.diagnostics is not None
        found = opt.diagnostics
        seen.append((found.rows, found.rank, found.update_norm, found.decay, found.clipped, found.accepted))
    return {
        "params": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "losses": torch.stack(returned),
        "seen": seen,
        "spectrum": opt.diagnostics.spectrum if opt.diagnostics else None,
        "state": [v for state in opt.state.values() for v in state.values()],
        "calls": calls,
        "traffic": tuple(b - a for a, b in zip(before, after, strict=True)),
        "buffers": [p.grad is None for p in model.parameters()],
    }


def counting(case: Case, model: nn.Module, data: Data) -> tuple[Callable[[], Any], list[None]]:
    called: list[None] = []

    def closure() -> Any:
        called.append(None)
        return case.rows(model, data)

    return closure, called


def all_cases(rank: int, world: int) -> list[dict[str, Any]]:
    return [train(case, [case.batches(world, step) for step in range(STEPS)], rank) for case in CASES]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_step_is_that_of_one_process_with_the_whole_batch(world: int, tmp_path: Path) -> None:
    found = run_ranks(world, tmp_path, all_cases)
    for number, case in enumerate(CASES):
        want = train(case, [case.batches(world, step) for step in range(STEPS)], None)
        assert want["traffic"] == (0, 0, 0, 0)
        first = found[0][number]
        for one in (rank[number] for rank in found):
            assert torch.equal(one["params"], first["params"]), case.name  # to the bit
            assert torch.equal(one["losses"], first["losses"]), case.name
            assert_identical(one["state"], first["state"], case.name)
            assert one["calls"] == want["calls"], case.name
            assert one["seen"] == first["seen"], case.name
            assert all(one["buffers"])
        if "decay" in case.name:
            assert all(decay > 0 for _, _, _, decay, _, _ in want["seen"]) == ("relative" in case.name), case.name
        moved = (want["params"] - torch.cat([p.detach().flatten() for p in case.fresh().parameters()])).norm()
        assert moved > 1e-3
        assert (first["params"] - want["params"]).norm() <= case.tolerance * want["params"].norm(), case.name
        torch.testing.assert_close(first["losses"], want["losses"], rtol=case.tolerance, atol=0)
        for mine, theirs in zip(first["seen"], want["seen"], strict=True):
            assert mine[:2] == theirs[:2], case.name
            assert mine[2:4] == pytest.approx(theirs[2:4], rel=max(1e-9, case.tolerance)), case.name
            assert mine[4:] == theirs[4:], case.name
        assert (first["spectrum"] is None) == (want["spectrum"] is None)
    _check_traffic(world, found)


def _check_traffic(world: int, found: list[list[dict[str, Any]]]) -> None:
    """The formula of the docstring, for the multilayer perceptrons of dual and primal form."""
    names = [case.name for case in CASES]
    for rank, one in enumerate(found):
        counts = EQUAL[:world]
        rows, most, size = sum(counts), max(counts), sum(p.numel() for p in mlp().parameters())
        # Of inputs and output gradients or of gradients, whichever is less.
        wire = [min(i + o, i * o + o) * 8 * counts[rank] for i, o in ((5, 12), (12, 9), (9, 1))]
        turns = [(world - 1) // 2 + (world % 2 == 0 and (rank < world // 2) != (n % 2 == 0)) for n in range(3)]
        assert one[names.index("losses")]["traffic"] == (
            sum(t * w for t, w in zip(turns, wire, strict=True)),
            most * (rows + 1) * 8 + most * 8,
            size * 8 + 8,
            96 + 8 * rows + 8 * rows,
        )
        _check_traffic_of_levenberg(one[names.index("levenberg")], one[names.index("levenberg of rows")], world, rank)
        tries = one[names.index("kalman")]["calls"] - 1
        size, most_of = sum(p.numel() for p in mlp().parameters()), max(UNEQUAL[:world])
        assert one[names.index("kalman")]["traffic"] == (
            0,
            8 * most_of * (size + 1),
            16 * tries,
            8 + tries * (8 * size + 8),
        )
        _check_traffic_of_trials(one[names.index("default")], counts, rank, momentum=False)
        _check_traffic_of_trials(one[names.index("residuals and momentum")], UNEQUAL[:world], rank, momentum=True)
        counts = UNEQUAL[:world]
        rows, most = sum(counts), max(counts)
        assert one[names.index("a relative decay")]["traffic"][1:] == (
            most * (rows + 1) * 8 + most * 8 + most * 8,
            size * 8 + 8,
            96 + 8 * rows,  # no singular values
        )
        assert one[names.index("primal")]["traffic"] == (
            0,
            max(counts) * 8,
            (size * size + size) * 8,
            96 + 8 * size + 8 * size,
        )


def _check_traffic_of_trials(found: dict[str, Any], counts: tuple[int, ...], rank: int, *, momentum: bool) -> None:
    """With a metric, leave-one-out, a relative decay and momentum."""
    rows, most, world, layers = sum(counts), max(counts), len(counts), ((5, 12), (12, 9), (9, 1))
    size = sum(i * o + o for i, o in layers)
    # A 1 is joined to the inputs; the ranks choose by what all of them send.
    wire = [min((i + 1) + o, i * o + o) * 8 * counts[rank] for i, o in layers]
    turns = [(world - 1) // 2 + (world % 2 == 0 and (rank < world // 2) != (n % 2 == 0)) for n in range(3)]
    factors = sum((i + 1) ** 2 + o**2 for i, o in layers) * 8 + 16 * len(layers)
    trials = found["calls"] - 1
    memory = len(next(value for value in found["state"] if isinstance(value, Tensor) and value.ndim == 1))
    assert trials >= 1
    assert found["traffic"] == (
        sum(t * w for t, w in zip(turns, wire, strict=True)),
        most * (rows + 1) * 8 + most * 8 * (3 if momentum else 2),
        factors + (size * 8 + 8) + trials * 16,
        96 + 8 * rows + 8 * rows + 8 * memory,
    )


def _check_traffic_of_levenberg(primal: dict[str, Any], dual: dict[str, Any], world: int, rank: int) -> None:
    """The formulas of `LevenbergMarquardt`, with acceleration."""
    counts = UNEQUAL[:world]
    rows, most, layers = sum(counts), max(counts), ((5, 12), (12, 9), (9, 1))
    size = sum(i * o + o for i, o in layers)
    tries = (primal["calls"] - 1) // 2
    assert primal["traffic"] == (
        0,
        8 * most,
        8 * (size**2 + size) + 8 + tries * (16 + 8 * size + 8),
        tries * 2 * (8 * size + 8),
    )
    tries = (dual["calls"] - 1) // 2
    assert dual["traffic"][1:] == (
        8 * most + most * (rows + 1) * 8 + 8 * most + tries * 8 * most,
        tries * (size * 8 + 24 + size * 8 + 16),
        tries * 2 * (8 * rows + 8),
    )


def test_one_process_alone_sends_nothing() -> None:
    model = mlp()
    opt = st.Sven(model)
    opt.step(lambda: model(torch.ones(3, 5)).square().sum(1))
    assert dataclasses.asdict(opt.traffic) == dict.fromkeys(dataclasses.asdict(opt.traffic), 0)
    assert isinstance(opt.state_dict()["state"][0], Mapping)

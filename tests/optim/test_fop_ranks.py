"""FOP on two, three and four processes: its halves are those of all their samples, as in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import steepest as st
from optim.kfac_runs import SOLVERS, snapshot
from optim.rank_runs import (
    BASES,
    COMMON,
    MATRICES,
    MODES,
    NUMBERS,
    SIDES,
    TRIANGLES,
    Case,
    alone,
    assert_close,
    assert_identical,
    batch,
    build,
    counts_bytes,
    mean_gradients,
    named,
    outcome,
    run_all,
    running,
    told,
    words,
)
from optim.test_fop import DAMPING, LR, PLAIN, dense_step


def cases(world: int) -> dict[str, Case]:
    plain = Case((24 // world,) * world, kind="FOP", steps=5)
    found = {
        "replicated": plain,
        "sharded": replace(plain, options=MODES["sharded"]),
        "hybrid": replace(plain, options=MODES["hybrid"]),
        "half": replace(plain, options=MODES["half"]),
        "corrected": replace(plain, options={"solver": SOLVERS["corrected"], "distribution": "sharded"}),
        "ddp": replace(plain, wrap="ddp", options={"distribution": "sharded"}),
        "passes": replace(plain, passes=True),
        "passes-ddp": replace(plain, passes=True, wrap="ddp"),
        "uneven": replace(plain, sizes=(9, 4, 6, 5)[:world]) if world % 2 == 0 else plain,
        "accumulated": replace(plain, micro=2, wrap="ddp"),
    }
    if world == 2:
        found |= {
            "odd": replace(plain, sizes=(7, 7)),
            "ones": replace(plain, sizes=(1, 1), options={"damping": 0.3}),
            "cholesky": replace(plain, options={"solver": SOLVERS["cholesky"], "fisher": st.Exact()}),
            "undamped": replace(plain, options={"metric": "undamped", "total": "sum", "distribution": "sharded"}),
            "inner": replace(plain, wrap="inner"),
            "float32": replace(plain, dtype=torch.float32, options={"distribution": "sharded"}),
        }
    if world == 3:
        found["odd"] = replace(plain, sizes=(7, 7, 7))
    return found


def everything(rank: int, world: int) -> dict[str, Any]:
    found = {"cases": run_all(rank, world, cases(world))}
    if world % 2 == 0:
        found["groups"] = groups(rank, world)
    if world == 2:
        found["misuse"] = misuse(rank, world)
    return found


ran = running(everything)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_ranks_take_the_steps_of_one_process_with_their_batches_together(
    world: int, ran: Callable[[int], list[Any]]
) -> None:
    runs = cases(world)
    found = [of["cases"] for of in ran(world)]
    for name, case in runs.items():
        first, truth = found[0][name], alone(case)
        single = case.dtype == torch.float32
        assert_close(first["params"], truth["params"], 1e-3 if single else 1e-9, 1e-4 if single else 1e-11, name)
        for rank in range(world):
            own = {"held": 0, "traffic": 0} if name == "half" else {"held": 0}
            assert_identical({**first, **own}, {**found[rank][name], **own}, f"{name} on rank {rank}")
        assert first["layers"].keys() == truth["layers"].keys() == {"table", "conv", "out"}
        for key, layer in truth["layers"].items():
            assert layer.gate
            assert first["layers"][key].r == pytest.approx(layer.r, rel=1e-2 if single else 1e-7)
            assert first["layers"][key].eta == pytest.approx(layer.eta, rel=1e-3 if single else 1e-7)
    for mode in MODES:
        assert_identical(found[0]["replicated"]["params"], found[0][mode]["params"], mode)
    plain = alone(replace(runs["replicated"], kind="KFAC"))
    assert any((plain["params"][k] - p).norm() > 1e-3 * p.norm() for k, p in found[0]["replicated"]["params"].items())
    count, steps, updates = len(SIDES), 5, 4  # factors are updated in steps 0, 1, 2 and 4
    more = 8 * (2 + count) + 8 * MATRICES  # counts, and the gradients of the halves
    assert found[0]["sharded"]["traffic"].broadcast == steps * 8 * (MATRICES + 4 * count)
    assert found[0]["sharded"]["traffic"].calls == found[0]["replicated"]["traffic"].calls + steps * min(world, 3)
    expected = steps * (counts_bytes(world) + 8 * NUMBERS + more) + updates * 8 * TRIANGLES
    assert found[0]["replicated"]["traffic"].reduced == expected
    if world == 4:  # of each team, what its layers' decompositions hold; they are renewed in steps 0, 1 and 4
        teams = sum(found[rank]["half"]["traffic"].broadcast for rank in (0, 2))
        assert teams == 2 * steps * 8 * (MATRICES + 4 * count) + 3 * 8 * sum(BASES)


def groups(rank: int, world: int) -> dict[str, Any]:
    """One step, and the two gradients as the paper has them: each from one half of the ranks."""
    x, y = batch(12, 0)
    local = slice(rank * (12 // world), (rank + 1) * (12 // world))
    model = words().double()
    own = torch.cat([g.flatten() for g in mean_gradients(model, x[local], y[local])])
    halves = [torch.distributed.new_group(range(world // 2)), torch.distributed.new_group(range(world // 2, world))]
    mine = int(rank >= world // 2)
    torch.distributed.all_reduce(own, group=halves[mine])
    own /= world // 2
    both = []
    for group in (0, 1):
        gradient = own.clone()
        torch.distributed.broadcast(gradient, src=group * (world // 2))
        both.append(gradient)
    results = {}
    for mode, chosen in MODES.items():
        model = words().double()
        opt = st.FOP(model, **{**PLAIN, "embeddings": "kronecker", **chosen})
        F.cross_entropy(model(x[local]), y[local]).backward()
        opt.step()
        results[mode] = outcome(model, opt)
    return {"gradients": both, **results}


@pytest.mark.parametrize("world", [2, 4])
def test_the_halves_are_the_two_groups_of_the_paper(world: int, ran: Callable[[int], list[Any]]) -> None:
    found = [of["groups"] for of in ran(world)]
    x, y = batch(12, 0)
    model = words().double()
    opt = st.FOP(model, **{**PLAIN, "embeddings": "kronecker"})
    F.cross_entropy(model(x), y).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step()
    sizes = [p.numel() for p in model.parameters()]
    primary, secondary = (
        named(model, [[t.view_as(p) for t, p in zip(g.split(sizes), model.parameters(), strict=True)]])[0]
        for g in found[0]["gradients"]
    )
    mean = {name: (primary[name] + secondary[name]) / 2 for name in primary}
    moves = dense(opt, primary, secondary, mean)
    for of in found:
        for mode in MODES:
            for name, move in moves.items():
                torch.testing.assert_close(of[mode]["params"][name], before[name] - LR * move, rtol=1e-6, atol=1e-9)


def dense(opt: st.FOP, *gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """`dense_step` for layers whose input factor may be a diagonal."""
    for block in opt._blocks.values():
        state = opt.state[block.weight]
        if state["input_factor"].ndim == 1:
            state["input_factor"] = torch.diag(state["input_factor"])
    assert PLAIN["damping"] == DAMPING
    return dense_step(opt, *gradients)[0]


def misuse(rank: int, world: int) -> dict[str, Any]:
    case = Case((4,) * world, kind="FOP", options=COMMON)
    model, opt, _ = build(case)
    x, y = batch(4, rank)
    before, found = snapshot(model), {}

    def attempt(name: str) -> None:
        found[name] = told(opt.step)
        opt.zero_grad()
        assert_identical(before, snapshot(model))

    for name, indices in (("one pass", (0,)), ("one rank", (0, 1) if rank else ()), ("uneven", (0, 1 - rank))):
        for index in indices:
            with opt.sub_batch(index):
                F.cross_entropy(model(x), y).backward()
        if not indices:
            F.cross_entropy(model(x), y).backward()
        attempt(name)
    model.out(torch.ones(4, 15).double()).sum().backward()  # a part of the model, which nobody watches
    attempt("unseen")
    F.cross_entropy(model(x * 0 + rank), y).backward()
    if rank:
        model.out.weight.grad.fill_(torch.inf)
    attempt("infinite")
    F.cross_entropy(model(x), y).backward()
    opt.step()
    return {"found": found, **outcome(model, opt)}


def test_what_one_rank_does_wrong_is_told_on_all(ran: Callable[[int], list[Any]]) -> None:
    found = [of["misuse"] for of in ran(2)]
    for of in found:
        assert list(of["found"]) == ["one pass", "one rank", "uneven", "unseen", "infinite"]
        for name in ("one pass", "one rank", "uneven"):
            assert "on every rank" in of["found"][name]
        assert "its forward was not seen in this step" in of["found"]["unseen"]
        assert "on rank 1 of 2" in of["found"]["infinite"]
    assert_identical(found[0]["state"], found[1]["state"])
    assert_identical(found[0]["params"], found[1]["params"])

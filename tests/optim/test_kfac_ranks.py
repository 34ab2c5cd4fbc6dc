"""KFAC on two, three and four processes against one process with their batches put together."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import steepest as st
from optim.kfac_runs import DOUBLE, EVERY, SOLVERS, factors
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
    broken,
    build,
    counts_bytes,
    load,
    outcome,
    replaced,
    run_all,
    running,
    saved,
    told,
    words,
)
from optim.rank_troubles import check_troubles, troubles
from steepest.distributed.ranks import LostRankError
from steepest.optim.crew import Crew
from steepest.optim.shards import Shards
from steepest.optim.triangles import pack, packed_size, unpack
from zoo_parts import Net

# Of every run: steps, those that update factors, and those that decompose them
STEPS, UPDATES, REFRESHES = 6, 4, 3
TEAMS = {2: 1, 3: 1, 4: 2}  # how many ranks "half" of them are


def cases(world: int) -> dict[str, Case]:
    equal, uneven = (24 // world,) * world, (9, 4, 6, 5)[:world]
    found = {}
    for solver, made in SOLVERS.items():
        fisher = st.Exact() if solver == "cholesky" else st.Empirical()
        for mode, chosen in MODES.items():
            found[f"{solver}-{mode}"] = Case(equal, options={"solver": made, "fisher": fisher, **chosen})
    plain = Case(equal)
    found |= {
        "ddp": replace(plain, wrap="ddp"),
        "ddp-half": replace(plain, wrap="ddp", options=MODES["half"]),
        "inner": replace(plain, wrap="inner", options={"distribution": "hybrid"}),
        "accumulated": replace(plain, micro=2),
        "accumulated-ddp": replace(plain, micro=2, wrap="ddp"),
        "reduce": replace(plain, options={"sharing": "reduce", "fisher": st.Exact(), "distribution": "sharded"}),
        "uneven": replace(plain, sizes=uneven),
        "uneven-exact-ddp": replace(plain, sizes=uneven, wrap="ddp", options={"fisher": st.Exact()}),
        "float32": replace(plain, dtype=torch.float32, options={"distribution": "sharded"}),
    }
    return found


TROUBLED = {2: ("replicated", "hybrid"), 3: ("sharded",), 4: ("half",)}


def everything(rank: int, world: int, old: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {"cases": run_all(rank, world, cases(world))}
    found["troubles"] = {mode: troubles(rank, world, mode) for mode in TROUBLED[world]}
    if world == 2:
        found["unlike"] = unlike(rank, world)
    if world == 4:
        found["resumed"] = resumed(rank, world, old)
        found["groups"] = groups()
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_ranks_take_the_steps_of_one_process_with_their_batches_together(
    world: int, ran: Callable[[int], list[Any]]
) -> None:
    runs = cases(world)
    found = [of["cases"] for of in ran(world)]
    for name, case in runs.items():
        first, truth = found[0][name], alone(case)
        single = case.dtype == torch.float32
        assert_close(first["params"], truth["params"], 2e-4 if single else 1e-10, 1e-5 if single else 1e-12, name)
        for rank in range(world):
            # parameters, diagnostics, and all that a checkpoint holds, to the bit
            own = {"held": 0, "traffic": 0} if "half" in name else {"held": 0}
            assert_identical({**first, **own}, {**found[rank][name], **own}, f"{name} on rank {rank}")
        assert first["diagnostics"].update_norm == pytest.approx(truth["diagnostics"].update_norm, rel=1e-3)
        assert first["diagnostics"].num_decompositions == truth["diagnostics"].num_decompositions
    for solver in SOLVERS:
        first = found[0][f"{solver}-replicated"]
        for mode in MODES:
            other = found[0][f"{solver}-{mode}"]
            assert_identical(first["params"], other["params"], f"{solver}-{mode}")
            assert_identical(first["state"]["state"], other["state"]["state"], f"{solver}-{mode}")
    check_shares(world, found)


def check_shares(world: int, found: list[dict[str, Any]]) -> None:
    """Every rank holds and gives what the documentation says, in numbers of 8 bytes."""
    expected = STEPS * (counts_bytes(world) + 8 * NUMBERS) + UPDATES * 8 * TRIANGLES
    moments = (UPDATES - 1) * 8 * MATRICES
    team, every, directions = TEAMS[world], REFRESHES * 8 * sum(BASES), STEPS * 8 * MATRICES
    corrected = every + 8 * sum((REFRESHES * (n * m - n - m) for n, m in SIDES))
    for rank, of in enumerate(found):
        mine = [i for i, owner in enumerate(owners(world, team)) if owner // team == rank // team]
        shared = REFRESHES * 8 * sum(BASES[i] for i in mine) if team > 1 else 0
        for name, held, reduced, broadcast in (
            ("eigenbasis-replicated", 3, expected, 0),
            ("ddp", 3, expected - STEPS * 8 * NUMBERS, 0),
            ("eigenbasis-sharded", owners(world, 1).count(rank), expected, directions),
            ("eigenbasis-hybrid", 3, expected, every),
            ("eigenbasis-half", len(mine), expected, shared + directions),
            ("ddp-half", len(mine), expected - STEPS * 8 * NUMBERS, shared + directions),
            ("corrected-replicated", 3, expected + moments, 0),
            ("corrected-half", 3, expected + moments, corrected + directions),
        ):
            traffic = of[name]["traffic"]
            given = (of[name]["held"], traffic.reduced, traffic.broadcast, traffic.gathered)
            assert given == (held, reduced, broadcast, 0), f"{name} on rank {rank} of {world}"


def owners(world: int, team: int) -> list[int]:
    """Of the table, the convolution and the last layer, whose decompositions cost 71, 2322 and 4123."""
    return {(2, 1): [1, 1, 0], (3, 1): [2, 1, 0], (4, 1): [2, 1, 0], (4, 2): [3, 2, 0]}[world, team]


@pytest.mark.parametrize("size", range(1, 8))
def test_a_triangle_holds_a_symmetric_matrix(size: int) -> None:
    matrix = torch.randn(size, size)
    matrix += matrix.T.clone()
    packed = pack(matrix)
    assert len(packed) == packed_size(size)
    assert torch.equal(unpack(packed, size), matrix)


# -- what goes wrong on one rank ---------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(world: int, ran: Callable[[int], list[Any]]) -> None:
    for mode in TROUBLED[world]:
        check_troubles(world, mode, [of["troubles"][mode] for of in ran(world)])


# -- what differs between ranks -----------------------------------------------------------------------


def branching() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda n, x: n.out(n.a(x) + n.b(x) if n.both else n.a(x)), a=nn.Linear(4, 5), b=nn.Linear(4, 5),
        out=nn.Linear(5, 3), both=True,
    ).double()  # fmt: skip


def inputs(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(6, 4, generator=generator, dtype=DOUBLE), torch.arange(6) % 3


def unlike(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for wrap in ("plain", "ddp"):
        for mode in MODES:  # a layer that the first rank does not use, and in the first step nobody
            model = branching()
            called = DistributedDataParallel(model, find_unused_parameters=True) if wrap == "ddp" else model
            opt = st.KFAC(called, **{**COMMON, **EVERY, **MODES[mode], "fisher": st.Exact()})
            for step in range(4):
                x, y = inputs(step, rank)
                model.both = rank > 0 and step > 0
                opt.zero_grad()
                F.cross_entropy(called(x), y).backward()
                opt.step()
            found[f"{wrap}-{mode}"] = outcome(model, opt)
    # labels that the ranks draw for the same samples
    x, y = batch(6, 0)
    model = words().double()
    opt = st.KFAC(model, fisher=st.MonteCarlo(), lr=0.0)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    found["drawn"] = factors(opt)
    # ranks that do not belong together
    torch.manual_seed(rank)
    model = nn.Linear(4, 3)
    F.cross_entropy(model(x[:, :4].float()), y).backward()
    found["starts"] = told(st.KFAC(model).step)
    case = Case((4,) * world)
    model, opt, _ = build(case)
    x, y = batch(4, rank)
    if rank:
        opt.load_state_dict({**opt.state_dict(), "state": {0: {"steps": 7, "num_skipped": 0}}})
    F.cross_entropy(model(x), y).backward()
    found["steps"] = told(opt.step)
    # a loss scale of each rank's own
    model, opt, _ = build(case)
    for step in range(3):
        scale = 2.0 ** (8 - rank)
        opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(float(rank == 0 and step == 1))
        x, y = batch(4 * world, step)
        opt.zero_grad()
        local = slice(4 * rank, 4 * rank + 4)
        (F.cross_entropy(model(x[local]), y[local]) * scale).backward()
        opt.step()
    del opt.grad_scale, opt.found_inf
    found["scaled"] = outcome(model, opt)
    return found


def test_ranks_may_use_different_layers_and_must_start_alike(ran: Callable[[int], list[Any]]) -> None:
    world = 2
    found = [of["unlike"] for of in ran(world)]
    model = branching()
    opt = st.KFAC(model, **{**COMMON, **EVERY, "fisher": st.Exact()})
    for step in range(4):
        opt.zero_grad()
        for rank in range(world):
            x, y = inputs(step, rank)
            model.both = rank > 0 and step > 0
            (F.cross_entropy(model(x), y) / world).backward()
        opt.step()
    truth = {name: p.detach() for name, p in model.named_parameters()}
    for name in [f"{wrap}-{mode}" for wrap in ("plain", "ddp") for mode in MODES]:
        assert_close(found[0][name]["params"], truth, 1e-10, 1e-12, name)
        assert_identical(found[0][name]["params"], found[1][name]["params"], name)
    x, y = batch(6, 0)
    model = words().double()
    lone = st.KFAC(model, fisher=st.MonteCarlo(), lr=0.0)
    F.cross_entropy(model(x), y).backward()
    lone.step()
    for layer, (a, s) in factors(lone).items():
        torch.testing.assert_close(found[0]["drawn"][layer][0], a, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(found[0]["drawn"][layer][1], s, rtol=1e-2)
        assert_identical(found[0]["drawn"][layer], found[1]["drawn"][layer])
    for of in found:
        assert "do not begin with the same parameters" in of["starts"]
        assert of["steps"].startswith("InvalidOptionError: The ranks do not train together: their step is 0, 7.")
    plain = Case((4,) * world, steps=3)
    model, opt, _ = build(plain)
    for step in (0, 2):  # rank 0's scaler has skipped step 1, and so have all
        x, y = batch(8, step)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    assert_close(found[1]["scaled"]["params"], outcome(model, opt)["params"], 1e-10, 1e-12, "scaled")
    assert_identical(found[0]["scaled"]["params"], found[1]["scaled"]["params"])


# -- checkpoints ----------------------------------------------------------------------------------------

SAVED = [(solver, mode) for solver in SOLVERS for mode in MODES]


def go_on(case: Case, model: nn.Module, opt: Any, rank: int, steps: range) -> dict[str, Any]:
    local = list(case.offsets)[rank]
    for step in steps:
        x, y = batch(sum(case.sizes), step)
        opt.zero_grad()
        F.cross_entropy(model(x[local]), y[local]).backward()
        opt.step()
    return outcome(model, opt)


def resumed(rank: int, world: int, old: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for solver, mode in SAVED:
        case = Case((24 // world,) * world, options={"solver": SOLVERS[solver], **MODES[mode]})
        model, opt, _ = build(case)
        go_on(case, model, opt, rank, range(4))  # within a period
        data = saved(model, opt)
        whole = go_on(case, model, opt, rank, range(4, 8))
        other, again, _ = build(case)
        load(other, again, data)
        assert_identical(whole["params"], go_on(case, other, again, rank, range(4, 8))["params"], f"{solver}-{mode}")
        smaller, from_one, _ = build(case)
        load(smaller, from_one, old[solver])
        found[f"{solver}-{mode}"] = {
            "saved": data,
            "from one": go_on(case, smaller, from_one, rank, range(4, 8))["params"],
            "twin": outcome(model, copy.deepcopy((model, opt))[1])["state"]["state"],
            "params": whole["params"],
            "state": whole["state"]["state"],
        }
    return found


@functools.cache
def one_process() -> dict[str, bytes]:
    """A checkpoint of one process for every solver."""
    old = {}
    for solver in SOLVERS:
        case = Case((24,), options={"solver": SOLVERS[solver]})
        model, opt, _ = build(case)
        go_on(case, model, opt, 0, range(4))
        old[solver] = saved(model, opt)
    return old


def groups() -> list[float]:
    """Seconds that the process groups of this rank wait for others."""
    return [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group in dist.distributed_c10d._world.pg_map
    ]


ran = running(everything, one_process)


def test_a_checkpoint_goes_on_to_the_bit_and_serves_any_number_of_ranks(ran: Callable[[int], list[Any]]) -> None:
    found, truth = [of["resumed"] for of in ran(4)], {}
    for solver in SOLVERS:
        case = Case((24,), options={"solver": SOLVERS[solver]})
        model, opt, _ = build(case)
        load(model, opt, one_process()[solver])
        truth[solver] = go_on(case, model, opt, 0, range(4, 8))["params"]
    for solver, mode in SAVED:
        name = f"{solver}-{mode}"
        for of in found:
            assert_identical(of[name]["params"], found[0][name]["params"], name)
            assert_identical(of[name]["twin"], of[name]["state"], name)
            assert_close(of[name]["from one"], truth[solver], 1e-9, 1e-11, f"{name} from one")
        case = Case((24,), options={"solver": SOLVERS[solver], **MODES[mode]})
        model, opt, _ = build(case)
        load(model, opt, found[1][name]["saved"])
        assert_close(go_on(case, model, opt, 0, range(4, 8))["params"], truth[solver], 1e-9, 1e-11, f"{name} to one")


def test_teams_found_two_groups_that_wait_no_longer_than_the_ranks_do(ran: Callable[[int], list[Any]]) -> None:
    for of in ran(4):
        assert of["groups"] == [60.0] * 3  # all ranks, a team, and its like in the other; for all optimizers of the run


def test_the_work_is_divided_by_its_cost() -> None:
    model = words()
    opt = st.KFAC(model, embeddings="kronecker")
    for (world, team), mode in {(2, 1): "sharded", (3, 1): "half", (4, 1): "sharded", (4, 2): "half"}.items():
        crew = Crew(model, **dict(zip(("distribution", "fraction"), MODES[mode].values(), strict=False)))
        shards = Shards(crew, st.Eigenbasis(), opt._blocks)
        with replaced(Crew, "place", property(lambda _, world=world: (0, world))):
            assert [shards.owner(block) for block in opt._blocks.values()] == owners(world, team)


def test_an_unknown_distribution_is_refused() -> None:
    for options, text in (
        ({"distribution": "split"}, "distribution='split'"),
        ({"distribution": "hybrid", "hybrid_fraction": 0.0}, "hybrid_fraction"),
        ({"distribution": "hybrid", "hybrid_fraction": 1.5}, "hybrid_fraction"),
        ({"distribution": "sharded", "hybrid_fraction": 0.5}, "hybrid_fraction=0.5 has no meaning with"),
    ):
        with pytest.raises(st.errors.InvalidOptionError, match=text):
            st.KFAC(words(), **options)


def test_ranks_that_never_come_to_save_are_told_of() -> None:
    crew = Crew(words(), "sharded")
    with (
        replaced(Crew, "tally", broken(LostRankError("[rank 0/2] lost contact"))),
        pytest.raises(LostRankError, match=r"lost contact. It was in state_dict\(\).*on every rank"),
    ):
        crew.meet_to_save({}, [])


def test_one_process_has_no_ranks_and_no_traffic() -> None:
    runs = [alone(Case((8,), options=chosen)) for chosen in MODES.values()]
    for run in runs:
        assert run["traffic"] is None
        assert run["held"] == 3
        assert_identical(run["params"], runs[0]["params"])

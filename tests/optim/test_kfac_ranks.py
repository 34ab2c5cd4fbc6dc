"""KFAC on two, three and four processes against one process with their batches put together."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import steepest as st
from optim.kfac_runs import DOUBLE, EVERY, SOLVERS, factors, snapshot
from optim.rank_runs import (
    COMMON,
    Case,
    alone,
    assert_close,
    assert_identical,
    batch,
    build,
    outcome,
    run_all,
    words,
)
from ranks import run_ranks
from steepest.optim.shards import Shards
from steepest.optim.triangles import pack, packed_size, unpack
from zoo_parts import Net

MODES = ("replicated", "sharded", "hybrid")
# Layers (n, m) of the model, and how long the input factor's message is; its parameters; steps that update factors
SIDES, TABLE, PARAMS, STEPS, UPDATES, REFRESHES = [(4, 7), (5, 13), (3, 16)], 0, 28 + 65 + 10 + 48, 6, 4, 3


def cases(world: int) -> dict[str, Case]:
    equal, uneven = (24 // world,) * world, (9, 4, 6, 5)[:world]
    found = {}
    for solver, made in SOLVERS.items():
        fisher = st.Exact() if solver == "cholesky" else st.Empirical()
        for mode in MODES:
            found[f"{solver}-{mode}"] = Case(equal, options={"solver": made, "fisher": fisher, "distribution": mode})
    plain = Case(equal)
    found |= {
        "ddp": replace(plain, wrap="ddp"),
        "ddp-sharded": replace(plain, wrap="ddp", options={"distribution": "sharded"}),
        "inner": replace(plain, wrap="inner", options={"distribution": "hybrid"}),
        "accumulated": replace(plain, micro=2),
        "accumulated-ddp": replace(plain, micro=2, wrap="ddp"),
        "reduce": replace(plain, options={"sharing": "reduce", "fisher": st.Exact(), "distribution": "sharded"}),
        "uneven": replace(plain, sizes=uneven),
        "uneven-exact-ddp": replace(plain, sizes=uneven, wrap="ddp", options={"fisher": st.Exact()}),
        "float32": replace(plain, dtype=torch.float32, options={"distribution": "sharded"}),
    }
    return found


TROUBLED = {2: "replicated", 3: "sharded", 4: "hybrid"}
CULPRIT = {2: 1, 3: 2, 4: 2}  # a rank that owns a layer


def everything(rank: int, world: int, old: dict[str, bytes]) -> dict[str, Any]:
    found = {"cases": run_all(rank, world, cases(world)), "troubles": troubles(rank, world, TROUBLED[world])}
    if world == 2:
        found["unlike"] = unlike(rank, world)
    if world == 3:
        found["resumed"] = resumed(rank, world, old)
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """What every rank of a world found: all in one start of the processes, which takes longest."""
    return functools.cache(lambda world: run_ranks(world, tmp_path_factory.mktemp("ranks"), everything, one_process()))


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
            assert_identical({**first, "held": 0}, {**found[rank][name], "held": 0}, f"{name} on rank {rank}")
        assert first["diagnostics"].update_norm == pytest.approx(truth["diagnostics"].update_norm, rel=1e-3)
        assert first["diagnostics"].num_decompositions == truth["diagnostics"].num_decompositions
    for solver in SOLVERS:
        first = found[0][f"{solver}-replicated"]
        for mode in MODES[1:]:
            other = found[0][f"{solver}-{mode}"]
            assert_identical(first["params"], other["params"], f"{solver}-{mode}")
            assert_identical(first["state"]["state"], other["state"]["state"], f"{solver}-{mode}")
    held = [ranks["eigenbasis-sharded"]["held"] for ranks in found]
    assert sum(held) == len(SIDES)
    assert max(held) < len(SIDES)
    check_traffic(world, found[0])


def check_traffic(world: int, found: dict[str, Any]) -> None:
    """The bytes are those of the documentation, for numbers of 8 bytes."""
    count, trained = len(SIDES), 7
    header = 8 * (3 + 4 * world + trained + 4 * count) + 8 * 3  # counts, and the verdict on one group of layers
    triangles = sum((m if i == TABLE else packed_size(m)) + packed_size(n) for i, (n, m) in enumerate(SIDES))
    matrices = sum(n * m for n, m in SIDES)
    expected = STEPS * (header + 8 * PARAMS) + UPDATES * 8 * triangles
    basis = sum(n * n + n + m + (m if i == TABLE else m * m) for i, (n, m) in enumerate(SIDES))
    for name, reduced, broadcast in (
        ("eigenbasis-replicated", expected, 0),
        ("ddp", expected - STEPS * 8 * PARAMS, 0),
        ("eigenbasis-sharded", expected, STEPS * 8 * matrices),
        ("eigenbasis-hybrid", expected, REFRESHES * 8 * basis),
        ("corrected-replicated", expected + (UPDATES - 1) * 8 * matrices, 0),
    ):
        traffic = found[name]["traffic"]
        assert (traffic.reduced, traffic.broadcast, traffic.gathered) == (reduced, broadcast, 0), name


@pytest.mark.parametrize("size", range(1, 8))
def test_a_triangle_holds_a_symmetric_matrix(size: int) -> None:
    matrix = torch.randn(size, size)
    matrix += matrix.T.clone()
    packed = pack(matrix)
    assert len(packed) == packed_size(size)
    assert torch.equal(unpack(packed, size), matrix)


# -- what goes wrong on one rank ---------------------------------------------------------------------


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Any:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def broken(error: Exception) -> Any:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    return fail


def told(opt: Any, closure: Any = None) -> str:
    try:
        opt.step(closure)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def troubles(rank: int, world: int, mode: str) -> dict[str, Any]:
    case = Case((4,) * world, options={**EVERY, "distribution": mode})
    model, opt, _ = build(case)
    local = slice(4 * rank, 4 * rank + 4)
    guilty = rank == CULPRIT[world]

    def backward(step: int, spoil: float = 1.0) -> torch.Tensor:
        x, y = batch(4 * world, step)
        opt.zero_grad()
        loss = F.cross_entropy(model(x[local]), y[local]) * spoil
        loss.backward()
        return loss

    for step in range(2):
        backward(step)
        opt.step()
    before, kept = snapshot(model), copy.deepcopy(opt.state_dict())
    errors = {}
    backward(2, float("nan") if guilty else 1.0)
    errors["nan"] = told(opt)
    opt._skip_nonfinite = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backward(2, float("inf") if guilty else 1.0)
        errors["skipped"] = told(opt)
    errors["warned"] = len(caught)
    opt._skip_nonfinite = False
    skipped, opt._memory["num_skipped"] = opt._memory["num_skipped"], 0
    backward(2)
    with replaced(torch.linalg, "eigh", broken(KeyError("odd")) if guilty else torch.linalg.eigh):
        errors["eigh"] = told(opt)
    backward(2)
    with replaced(type(opt), "_direction", broken(ValueError("odd")) if guilty else type(opt)._direction):
        errors["direction"] = told(opt)
    backward(2)
    with replaced(type(opt), "_updated", broken(ValueError("odd")) if guilty else type(opt)._updated):
        errors["factors"] = told(opt)
    errors["closure"] = told(opt, broken(KeyError("y")) if guilty else lambda: backward(2))
    opt.zero_grad()
    errors["no backward"] = told(opt)
    assert_identical(before, snapshot(model))
    assert_identical(kept, opt.state_dict())
    failures = []
    for step in range(2, 6):  # the decomposition fails on one rank, three times in a row
        backward(step)
        error = torch.linalg.LinAlgError("no convergence")
        with replaced(torch.linalg, "eigh", broken(error) if guilty and step < 5 else torch.linalg.eigh):
            failures += [(told(opt).split(":")[0], opt.diagnostics.num_failures)]
    backward(6)
    opt.step()
    return {"errors": errors, "skipped": skipped, "failures": failures, **outcome(model, opt)}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(world: int, ran: Callable[[int], list[Any]]) -> None:
    found = [of["troubles"] for of in ran(world)]
    for rank, of in enumerate(found):
        errors, own = of["errors"], rank == CULPRIT[world]
        assert errors["nan"].startswith(f"NonFiniteError: A gradient holds NaN or infinity on rank {CULPRIT[world]} of")
        assert errors["skipped"] == "no error"
        assert errors["warned"] == of["skipped"] == 1
        for key, text in (
            ("eigh", "KeyError: 'odd'"), ("direction", "ValueError: odd"), ("factors", "ValueError: odd"),
            ("closure", "KeyError: 'y'"),
        ):  # fmt: skip
            assert errors[key].endswith(text), errors[key]
            assert own or errors[key].startswith("RankError"), errors[key]
        assert errors["no backward"].startswith("CaptureError")
        assert_identical(of["failures"], found[0]["failures"])
        assert_identical(of["state"], found[0]["state"])
        assert_identical(of["params"], found[0]["params"])
    assert [kind for kind, _ in found[0]["failures"]] == ["no error", "no error", "DecompositionError", "no error"]
    assert [count > 0 for _, count in found[0]["failures"]] == [True, True, True, False]


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
            opt = st.KFAC(called, **{**COMMON, **EVERY, "distribution": mode, "fisher": st.Exact()})
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
    found["starts"] = told(st.KFAC(model))
    case = Case((4,) * world)
    model, opt, _ = build(case)
    x, y = batch(4, rank)
    if rank:
        opt.load_state_dict({**opt.state_dict(), "state": {0: {"steps": 7, "num_skipped": 0}}})
    F.cross_entropy(model(x), y).backward()
    found["steps"] = told(opt)
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
        case = Case((24 // world,) * world, options={"solver": SOLVERS[solver], "distribution": mode})
        model, opt, _ = build(case)
        go_on(case, model, opt, rank, range(4))  # within a period
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
        whole = go_on(case, model, opt, rank, range(4, 8))
        other, again, _ = build(case)
        load(other, again, buffer.getvalue())
        assert_identical(whole["params"], go_on(case, other, again, rank, range(4, 8))["params"], f"{solver}-{mode}")
        smaller, from_one, _ = build(case)
        load(smaller, from_one, old[solver])
        found[f"{solver}-{mode}"] = {
            "saved": buffer.getvalue(),
            "from one": go_on(case, smaller, from_one, rank, range(4, 8))["params"],
            "twin": outcome(model, copy.deepcopy((model, opt))[1])["state"]["state"],
            "params": whole["params"],
            "state": whole["state"]["state"],
        }
    return found


def load(model: nn.Module, opt: Any, saved: bytes) -> None:
    state = torch.load(io.BytesIO(saved), weights_only=True)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])


@functools.cache
def one_process() -> dict[str, bytes]:
    """A checkpoint of one process for every solver."""
    old = {}
    for solver in SOLVERS:
        case = Case((24,), options={"solver": SOLVERS[solver]})
        model, opt, _ = build(case)
        go_on(case, model, opt, 0, range(4))
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
        old[solver] = buffer.getvalue()
    return old


def test_a_checkpoint_goes_on_to_the_bit_and_serves_any_number_of_ranks(ran: Callable[[int], list[Any]]) -> None:
    found, truth = [of["resumed"] for of in ran(3)], {}
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
        case = Case((24,), options={"solver": SOLVERS[solver], "distribution": mode})
        model, opt, _ = build(case)
        load(model, opt, found[1][name]["saved"])
        assert_close(go_on(case, model, opt, 0, range(4, 8))["params"], truth[solver], 1e-9, 1e-11, f"{name} to one")


def test_the_work_is_divided_by_its_cost() -> None:
    model = words()
    opt = st.KFAC(model, embeddings="kronecker")
    shards = Shards(opt._crew, st.Eigenbasis(), opt._blocks)
    with replaced(type(opt._crew), "place", property(lambda _: (0, 2))):
        owners = {block.name: shards.owner(block) for block in opt._blocks.values()}
    assert owners == {"out": 0, "conv": 1, "table": 1}  # 3^3 + 16^3, 5^3 + 13^3, 4^3 + 7


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(st.errors.InvalidOptionError, match="distribution='split'"):
        st.KFAC(words(), distribution="split")


def test_one_process_has_no_ranks_and_no_traffic() -> None:
    runs = [alone(Case((8,), options={"distribution": mode})) for mode in MODES]
    for run in runs:
        assert run["traffic"] is None
        assert run["held"] == 3
        assert_identical(run["params"], runs[0]["params"])

"""LPSGD and LPSGDM on several processes: DDP and FSDP2 take the steps of one process with all batches joined."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from ranks import run_ranks
from steepest.distributed.ranks import RankError
from steepest.errors import InvalidOptionError, NonFiniteError

STEPS = 4
PLAIN: dict[str, Any] = {"lr": 0.05, "p": 6.0}
MOMENTUM: dict[str, Any] = {"lr": 0.05, "p": 6.0, "momentum": 0.8, "weight_decay": 0.1}


def model(dtype: torch.dtype = torch.float64, width: int = 7) -> nn.Module:
    """Its sizes are no multiples of the number of processes: shards differ, and of four the last has no bias."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def batch(rank: int, step: int, unequal: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    size = 4 + (3 * rank if unequal else 0)
    return tuple(torch.randn(size, n, generator=generator, dtype=torch.float64).to(dtype) for n in (5, 3))  # type: ignore[return-value]


def loss_of(net: nn.Module, data: tuple[Tensor, Tensor], share: float = 1.0) -> Tensor:
    x, y = data
    return share * (net(x) - y).square().mean()


def train(net: nn.Module, opt: Any, rank: int, world: int, unequal: bool) -> None:
    """A p schedule, local batches; a mean over processes of means weighed by their sizes is the mean of all."""
    dtype = next(net.parameters()).dtype
    schedule = st.CosineAnnealingP(opt, T_max=STEPS)
    sizes = [len(batch(r, 0, unequal)[0]) for r in range(world)]
    for step in range(STEPS):
        opt.zero_grad()
        loss_of(net, batch(rank, step, unequal, dtype), sizes[rank] * world / sum(sizes)).backward()
        opt.step()
        schedule.step()


def reference(kind: Any, options: dict[str, Any], world: int, unequal: bool, dtype: Any, width: int) -> list[Tensor]:
    net = model(dtype, width)
    opt = kind(net.parameters(), **options)
    schedule = st.CosineAnnealingP(opt, T_max=STEPS)
    for step in range(STEPS):
        opt.zero_grad()
        parts = [batch(rank, step, unequal, dtype) for rank in range(world)]
        loss_of(net, tuple(map(torch.cat, zip(*parts, strict=True)))).backward()  # type: ignore[arg-type]
        opt.step()
        schedule.step()
    return [param.detach() for param in net.parameters()]


def full(net: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in net.parameters()]


def sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net[0])  # type: ignore[index]
    fully_shard(net)
    return net


def wrapped(how: str, dtype: torch.dtype, width: int) -> nn.Module:
    net = model(dtype, width)
    return sharded(net) if how == "fsdp" else nn.parallel.DistributedDataParallel(net)


def runs(rank: int, world: int, fused: bool) -> dict[str, Any]:
    """Every way to wrap, every option: parameters and what the optimizer sent."""
    found: dict[str, Any] = {}
    if fused:
        for how in ("ddp", "fsdp"):
            net = wrapped(how, torch.float64, 4096)
            train(net, st.LPSGDM(net.parameters(), **MOMENTUM, fused=True), rank, world, unequal=False)
            found[how] = full(net)
        return found
    for how, foreach, unequal, dtype in itertools.product(
        ("ddp", "fsdp"), (False, True), (False, True), (torch.float64, torch.float32)
    ):
        for kind, options in ((st.LPSGD, PLAIN), (st.LPSGDM, MOMENTUM)):
            net = wrapped(how, dtype, 7)
            opt = kind(net.parameters(), **options, foreach=foreach)
            train(net, opt, rank, world, unequal)
            found[f"{how} {foreach} {unequal} {dtype} {kind.__name__}"] = (full(net), opt.traffic)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_and_fsdp_take_the_steps_of_one_process(world: int, tmp_path: Path) -> None:
    results = run_ranks(world, tmp_path, runs, False)
    for name, (params, traffic) in results[0].items():
        how, _, unequal, dtype, kind = name.split()
        exact = dtype == "torch.float64"
        options = PLAIN if kind == "LPSGD" else MOMENTUM
        wanted = reference(
            getattr(st, kind), options, world, unequal == "True", torch.float64 if exact else torch.float32, 7
        )
        for mine, expected in zip(params, wanted, strict=True):
            # Where a gradient is next to nothing the step follows its sign: |g| ** (1 - rho) magnifies rounding.
            tolerance = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-4}
            assert torch.allclose(mine, expected, **tolerance), (name, (mine - expected).abs().max())
        for other in results[1:]:
            assert all(map(torch.equal, params, other[name][0])), name
        assert traffic.reduced == (8 * STEPS if how == "fsdp" else 0)
        assert traffic.calls == (STEPS if how == "fsdp" else 0)
    for one, other in itertools.pairwise(sorted(results[0])):
        if one.replace("False", "True", 1) == other:  # joined or not
            assert all(map(torch.equal, results[0][one][0], results[0][other][0]))


def test_the_compiled_pass_works_on_shards(tmp_path: Path) -> None:
    results = run_ranks(2, tmp_path, runs, True)
    wanted = reference(st.LPSGDM, MOMENTUM, 2, False, torch.float64, 4096)
    for how in ("ddp", "fsdp"):
        assert all(map(torch.equal, results[0][how], results[1][how]))
        for mine, expected in zip(results[0][how], wanted, strict=True):
            assert torch.allclose(mine, expected, rtol=1e-10, atol=1e-11)


def failures(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for bad, value in (("nan", float("nan")), ("inf", float("inf")), ("large", 1e30)):
        for on_nonfinite in ("raise", "skip"):
            net = wrapped("fsdp", torch.float32, 7)
            opt = st.LPSGDM(net.parameters(), **MOMENTUM, on_nonfinite=on_nonfinite)  # type: ignore[arg-type]
            loss_of(net, batch(rank, 0, False, torch.float32)).backward()
            opt.step()
            before, state = full(net), copy.deepcopy(opt.state_dict()["state"])
            if rank == world - 1:  # the shard of one process alone; squares of 1e30 overflow, the number does not
                next(net.parameters()).grad.to_local()[0] = value  # type: ignore[union-attr]
            said = ""
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    opt.step()
                except NonFiniteError as error:
                    said = str(error)
            momenta = [s["momentum_buffer"].to_local() for s in opt.state_dict()["state"].values()]
            kept = [s["momentum_buffer"].to_local() for s in state.values()]
            found[f"{bad} {on_nonfinite}"] = (
                said, [str(w.message) for w in warned], opt.diagnostics.num_skipped,
                all(map(torch.equal, full(net), before)), all(map(torch.equal, momenta, kept)), opt.traffic.reduced,
            )  # fmt: skip
    net = wrapped("ddp", torch.float32, 7)
    opt = st.LPSGD(net.parameters(), **PLAIN)
    x, y = batch(rank, 0, False, torch.float32)
    loss_of(net, (x / (rank < world - 1), y)).backward()  # infinite inputs of one process: DDP tells all of it
    before = full(net)
    try:
        opt.step()
    except NonFiniteError as error:
        found["ddp"] = (str(error), all(map(torch.equal, full(net), before)), opt.traffic.calls)
    net = wrapped("fsdp", torch.float32, 7)
    opt = st.LPSGD(net.parameters(), **PLAIN)
    loss_of(net, batch(rank, 0, False, torch.float32)).backward()
    before = full(net)
    opt.param_groups[0]["p"] = 1.0 if rank == 0 else 4.0
    try:
        opt.step()
    except (InvalidOptionError, RankError) as error:
        found["option"] = (type(error).__name__, str(error), all(map(torch.equal, full(net), before)))
    try:
        st.LPSGD(net.parameters(), differentiable=True)
    except InvalidOptionError as error:
        found["differentiable"] = str(error)
    quiet = st.LPSGD(net.parameters(), **PLAIN, on_nonfinite="ignore")
    quiet.step()
    found["quiet"] = quiet.traffic.calls
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_what_one_shard_holds_stops_all_processes_alike(world: int, tmp_path: Path) -> None:
    results = run_ranks(world, tmp_path, failures)
    for rank, found in enumerate(results):
        for bad in ("nan", "inf"):
            said, warned, skipped, params, state, sent = found[f"{bad} raise"]
            assert "NaN or infinity" in said
            assert (warned, skipped, params, state, sent) == ([], 0, True, True, 8 + 12)
            said, warned, skipped, params, state, sent = found[f"{bad} skip"]
            assert said == ""
            assert "Step skipped" in warned[0]
            assert (len(warned), skipped, params, state, sent) == (1, 1, True, True, 8 + 12)
        for on_nonfinite in ("raise", "skip"):
            said, warned, skipped, params, state, sent = found[f"large {on_nonfinite}"]
            # The shard whose norm overflows makes all look twice, and all take the step.
            assert (said, warned, skipped, sent) == ("", [], 0, 8 + 12)
            assert not params
        said, same, calls = found["ddp"]
        assert "NaN or infinity" in said
        assert (same, calls) == (True, 0)
        name, said, same = found["option"]
        assert name == ("InvalidOptionError" if rank == 0 else "RankError")
        assert same
        assert "p=1.0" in said if rank == 0 else "Another process refused" in said
        assert "DTensor" in found["differentiable"]
        assert found["quiet"] == 0


def round_trip(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as dcp

    found: dict[str, Any] = {}
    for full_state, how in itertools.product((False, True), ("fsdp", "ddp")):
        for kind, options in ((st.LPSGD, PLAIN), (st.LPSGDM, MOMENTUM)):
            if full_state and kind is st.LPSGD:  # torch loads no full state without a tensor, that of its SGD neither
                continue
            net = wrapped(how, torch.float64, 7)
            opt = kind(net.parameters(), **options, on_nonfinite="skip")
            loss_of(net, batch(rank, 0, False)).backward()
            opt.step()
            next(net.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opt.step()
            choice = dcp.StateDictOptions(full_state_dict=full_state)
            saved = dcp.get_optimizer_state_dict(net, opt, options=choice)
            weights = dcp.get_model_state_dict(net, options=choice)
            kinds = sorted({type(value).__name__ for state in saved["state"].values() for value in state.values()})  # type: ignore[union-attr]
            again = wrapped(how, torch.float64, 7)
            other = kind(again.parameters(), **options | {"lr": 1.0}, on_nonfinite="skip")
            dcp.set_model_state_dict(again, weights, options=choice)
            dcp.set_optimizer_state_dict(again, other, saved, options=choice)
            for a_net, an_opt in ((net, opt), (again, other)):
                an_opt.zero_grad()
                loss_of(a_net, batch(rank, 1, False)).backward()
                an_opt.step()
            found[f"{full_state} {how} {kind.__name__}"] = (
                kinds, opt.diagnostics, other.diagnostics, all(map(torch.equal, full(net), full(again))),
            )  # fmt: skip
    return found


def test_states_go_through_torchs_distributed_checkpoints(tmp_path: Path) -> None:
    for found in run_ranks(2, tmp_path, round_trip):
        for name, (kinds, before, after, same) in found.items():
            assert same, name
            assert before == after, name
            assert before.num_skipped == 1
            if name.endswith("LPSGDM"):
                wanted = "DTensor" if name.startswith("False fsdp") else "Tensor"
                assert kinds == [wanted], name

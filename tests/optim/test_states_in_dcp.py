"""torch.distributed.checkpoint in a loop of one's own: states of two processes are read by three."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as set_state

import steepest as st
from ranks import run_ranks
from steepest.distributed import Ranks
from steepest.distributed.checkpoint.tensors import read_tensors, write_tensors
from steepest.errors import SteepestError

MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "LPSGDM, sharded": lambda net: st.LPSGDM(net.parameters(), lr=0.05, p=6.0, momentum=0.8),
    "KFAC": lambda net: st.KFAC(net, lr=0.05, factor_update_steps=1, inverse_update_steps=2),
    "FOP": lambda net: st.FOP(net, lr=0.05, factor_update_steps=1, inverse_update_steps=2),
    "Sven": lambda net: st.Sven(net, lr=0.05),
}


def model() -> nn.Module:
    """Its sizes are no multiples of the number of processes."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (24,), generator=generator)


def built(name: str, world: int) -> tuple[nn.Module, Any]:
    net = model()
    if world > 1 and "sharded" in name:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net[0])  # type: ignore[index]
        fully_shard(net)
    return net, MAKE[name](net)


def train(net: nn.Module, opt: Any, rank: int, world: int, steps: int) -> None:
    x, y = (part.chunk(world)[rank] for part in data())
    for _ in range(steps):
        opt.zero_grad()
        if isinstance(opt, st.Sven):
            opt.step(lambda: F.cross_entropy(net(x), y, reduction="none"))
        else:
            F.cross_entropy(net(x), y).backward()
            opt.step()


def full(net: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in net.parameters()]


def written(rank: int, world: int, folder: str) -> None:
    for name in MAKE:
        net, opt = built(name, world)
        train(net, opt, rank, world, 3)
        content = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, opt)}
        save(content, checkpoint_id=Path(folder, name))
        Path(folder, f"ours {name}").mkdir(exist_ok=True)
        weights = full(net)
        if rank == 0:
            torch.save(weights, Path(folder, f"{name}.pt"))
        files = write_tensors(Path(folder, f"ours {name}"), content["model"], Ranks.current())  # type: ignore[arg-type]
        # Every process writes its part: a shard, or some of what all have.
        assert min(size for size, _ in files.values()) > 0
        assert any(file.startswith(f"__{rank}_") for file in files)


def read(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in MAKE:
        net, opt = built(name, world)
        if "sharded" not in name:
            found[f"{name} without a state"] = refusal(net, opt)
            train(net, opt, rank, world, 1)  # torch wants a state to be there
        content = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, opt)}
        load(content, checkpoint_id=Path(folder, name))
        net.load_state_dict(content["model"])
        # Sven keeps what it has with the first parameter, and torch asks for a state of all.
        set_state(net, opt, content["optimizer"], options=StateDictOptions(strict=name != "Sven"))
        train(net, opt, rank, world, 3)
        found[name] = full(net)

        other, _ = built(name, world)
        weights = get_model_state_dict(other)
        read_tensors(Path(folder, f"ours {name}"), weights, Ranks.current())  # type: ignore[arg-type]
        saved = torch.load(Path(folder, f"{name}.pt"), weights_only=True)
        found[f"ours {name}"] = all(map(torch.equal, full(other), saved))
        if "sharded" in name:
            found["kinds"] = {type(value).__name__ for value in weights.values()}
    return found


def refusal(net: nn.Module, opt: Any) -> str:
    """torch makes a step to find a state; that of another kind of step is told, and changes nothing."""
    before = full(net)
    with pytest.raises(SteepestError) as caught:
        get_optimizer_state_dict(net, opt)
    assert all(map(torch.equal, before, full(net)))
    opt.zero_grad()
    return str(caught.value)


def test_states_of_two_processes_are_read_by_three(tmp_path: Path) -> None:
    run_ranks(2, tmp_path / "two", written, str(tmp_path))
    ranks = run_ranks(3, tmp_path / "three", read, str(tmp_path))
    for name in MAKE:
        net, opt = built(name, 1)
        train(net, opt, 0, 1, 6)
        for found in ranks:
            assert found[f"ours {name}"], name
            for ours, one in zip(found[name], full(net), strict=True):
                torch.testing.assert_close(
                    ours, one, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name} {text}"
                )
    assert ranks[0]["kinds"] == {"DTensor"}
    assert "needs a closure" in ranks[0]["Sven without a state"]
    for name in ("KFAC", "FOP"):
        assert "call the model itself in the loop" in ranks[0][f"{name} without a state"]

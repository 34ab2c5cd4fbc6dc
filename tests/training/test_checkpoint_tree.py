"""A state taken apart and put together again: numbers exact, tensors in their order of memory, parameters by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steepest.cli import run
from steepest.commands import train as command
from steepest.distributed.checkpoint.tensors import read_tensors, write_tensors
from steepest.distributed.checkpoint.tree import blank, leaves, pack, unpack
from steepest.training.checkpoint import Keeping
from steepest.training.checkpoints.names import by_name, by_number
from steepest.training.errors import CheckpointError, DamagedCheckpointError


def there_and_back(value: Any, folder: Path) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(pack(value, "all", tensors), allow_nan=False))
    folder.mkdir()
    write_tensors(folder, tensors, None)
    found = {leaf["key"]: blank(leaf) for leaf in leaves(tree)}
    assert found.keys() == tensors.keys()
    read_tensors(folder, found, None)
    return unpack(tree, found)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    square = torch.randn(4, 6)
    value = {
        "numbers": [0.1 + 0.2, 1e-320, -0.0, 2**70, True, None, "text", math.inf, -math.inf],
        "pair": (1, (2.5, square)),
        "by number": {0: {"step": torch.tensor(3.0)}, 7: []},
        "$": "tensor",
        "a.b": torch.ones(2),
        "a": {"b": torch.zeros(2), "nothing": torch.empty(0, 3)},
        "turned": square.t(),
        "part": torch.randn(5, 8)[:, 2:5],
        "spread": torch.ones(1).expand(3),
        "last channels": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "types": [torch.tensor([1, 2], dtype=d) for d in (torch.uint8, torch.int64, torch.bfloat16, torch.complex64)],
    }
    found = there_and_back(value, tmp_path / "all")
    assert found.keys() == value.keys()
    for name in ("numbers", "$"):
        assert str(found[name]) == str(value[name])  # -0.0 too
    tensors = [name for name in value if name not in {"numbers", "$"}]
    torch.testing.assert_close([found[name] for name in tensors], [value[name] for name in tensors], rtol=0, atol=0)
    assert isinstance(found["pair"], tuple)
    assert list(found["by number"]) == [0, 7]
    for name in ("turned", "part", "last channels"):
        assert found[name].stride() == value[name].stride(), name  # type: ignore[attr-defined]
    assert math.isnan(there_and_back([math.nan], tmp_path / "nan")[0])


@pytest.mark.parametrize("wrong", [{1.5: 2}, {"x": object()}, [{"y": torch.float32}]])
def test_what_cannot_be_kept_is_named(wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\S* is a \w+, and a checkpoint keeps tensors, numbers"):
        pack(wrong, "state", {})
    with pytest.raises(CheckpointError, match="all has the type 'float7', which this torch does not know"):
        blank({"key": "all", "dtype": "float7", "shape": []})


def test_tensors_that_are_not_there_are_damage(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": torch.ones(2)}, None)
    with pytest.raises(DamagedCheckpointError, match=r"cannot be read \(.*b"):
        read_tensors(tmp_path, {"b": torch.ones(2)}, None)
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        read_tensors(tmp_path, {"a": torch.ones(3)}, None)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def step(net: nn.Module, opt: torch.optim.Optimizer) -> None:
    opt.zero_grad()
    net(torch.ones(4, 2)).square().mean().backward()
    opt.step()


def test_the_state_of_an_optimizer_goes_by_names_and_not_by_places() -> None:
    net, other = model(), model()
    opt = torch.optim.Adam([{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}])  # type: ignore[index]
    again = torch.optim.Adam(
        [{"params": reversed(list(other[0].parameters()))}, {"params": other[2].parameters()}]  # type: ignore[index]
    )
    step(net, opt)
    saved = by_name(opt, net)
    assert saved["state"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert saved["state"]["2.bias"]["exp_avg"] is opt.state[net[2].bias]["exp_avg"]  # type: ignore[index]
    other.load_state_dict(net.state_dict())
    again.load_state_dict(copy.deepcopy(by_number(saved, again, other)))
    for _ in range(3):
        step(net, opt)
        step(other, again)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    assert again.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match=r"4 parameters in 2 groups, this one has 2 in 1: not both have 2\.bias, 2\.w"):
        by_number(saved, torch.optim.Adam(net[0].parameters()), net)  # type: ignore[index]
    with pytest.raises(ValueError, match="4 in 1: they are grouped in another way"):
        by_number(saved, torch.optim.Adam(net.parameters()), net)


def test_no_step_is_made_to_find_a_state() -> None:
    net = model()
    opt = torch.optim.Adam(net.parameters())
    assert by_name(opt, net)["state"] == {}
    assert not opt.state


def test_how_many_stay_is_the_user_s_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Keeping] = []
    made = command.execute

    def watched(*given: Any, keeping: Keeping, **more: Any) -> Any:
        seen.append(keeping)
        return made(*given, keeping=keeping, **more)

    monkeypatch.setattr(command, "execute", watched)
    small = ["train", "diabetes", "-o", "sgd", "--epochs", "1"]
    assert run([*small, "--out", str(tmp_path / "a")]) == 0
    assert run([*small, "--out", str(tmp_path / "b"), "--keep-checkpoints", "5"]) == 0
    assert [(keeping.keep, keeping.checkpoints.name) for keeping in seen] == [(2, "checkpoints"), (5, "checkpoints")]
    capsys.readouterr()
    assert run([*small, "--out", str(tmp_path / "c"), "--keep-checkpoints", "0"]) == 2
    assert "the number of checkpoints to keep is 0: give at least 1" in capsys.readouterr().err

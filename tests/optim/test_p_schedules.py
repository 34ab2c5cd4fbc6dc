"""Schedules of p."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR

import steepest as st

ANNEALING = [st.CosineAnnealingP, st.LinearAnnealingP]


def made(p: float | torch.Tensor = 4.0, **options: Any) -> st.LPSGDM:
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    param.grad = torch.tensor([0.1, 5.0, -0.02])
    return st.LPSGDM([param], lr=0.1, p=p, **options)


def values(schedule: Any, count: int) -> list[float]:
    seen = []
    for _ in range(count):
        (value,) = schedule.get_last_p()
        assert schedule.optimizer.param_groups[0]["p"] == value
        seen.append(value)
        schedule.optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("S", [2, 3, 5, 50])
def test_cosine_annealing_is_the_papers_formula(S: int) -> None:
    expected = [2 + (6.0 - 2) * (1 + math.cos(math.pi * (s - 1) / (S - 1))) / 2 for s in range(1, S + 1)]
    found = values(st.CosineAnnealingP(made(6.0), T_max=S), S)
    assert found == pytest.approx(expected, rel=1e-14)
    assert (found[0], found[-1]) == (6.0, 2.0)


def test_linear_annealing_is_a_line() -> None:
    assert values(st.LinearAnnealingP(made(4.0), T_max=5), 5) == [4.0, 3.5, 3.0, 2.5, 2.0]


@pytest.mark.parametrize("kind", ANNEALING)
def test_the_only_period_of_a_schedule_is_its_last(kind: Any) -> None:
    assert values(kind(made(4.0), T_max=1), 3) == [2.0] * 3


@pytest.mark.parametrize("kind", ANNEALING)
def test_p_stays_at_the_end(kind: Any) -> None:
    assert values(kind(made(4.0), T_max=4, p_min=3.0), 9)[3:] == [3.0] * 6


@pytest.mark.parametrize("kind", ANNEALING)
@pytest.mark.parametrize("p_max", [11.12, 1e17, 1e300])
def test_however_large_p_is_it_ends_at_p_min(kind: Any, p_max: float) -> None:
    assert values(kind(made(p_max), T_max=3, p_min=2.35), 4)[2:] == [2.35, 2.35]


@pytest.mark.parametrize("kind", ANNEALING)
@pytest.mark.parametrize("hold", [0, 1, 3, 7])
def test_a_warm_hold_delays_the_descent(kind: Any, hold: int) -> None:
    found = values(kind(made(4.0), T_max=8, warm_hold=hold), 8)
    assert found[:hold] == [4.0] * hold
    assert found[-1] == 2.0
    assert found[hold:] == pytest.approx(values(kind(made(4.0), T_max=8 - hold), 8 - hold))


def test_a_constant_p_stays() -> None:
    assert values(st.ConstantP(made(5.0)), 4) == [5.0] * 4


@pytest.mark.parametrize("kind", ANNEALING)
def test_every_group_starts_at_its_own_p(kind: Any) -> None:
    opt = made(4.0)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "p": 10.0})
    schedule = kind(opt, T_max=3)
    assert schedule.get_last_p() == [4.0, 10.0]
    schedule.step()
    assert schedule.get_last_p() == pytest.approx([3.0, 6.0])
    assert [group["p"] for group in opt.param_groups] == schedule.get_last_p()


def test_a_p_that_is_a_tensor_is_written_in_place() -> None:
    p = torch.tensor(4.0)
    opt = made(p, capturable=True)
    own = opt.param_groups[0]["p"]
    schedule = st.CosineAnnealingP(opt, T_max=3)
    schedule.step()
    assert opt.param_groups[0]["p"] is own
    assert float(own) == 3.0


def test_it_stands_beside_torchs_schedules_of_lr() -> None:
    opt, alone = made(), made()
    schedules = ChainedScheduler([CosineAnnealingLR(opt, T_max=4), st.CosineAnnealingP(opt, T_max=5)])  # type: ignore[list-item]
    twin = CosineAnnealingLR(alone, T_max=4)
    for period in range(4):
        for each in (opt, alone):
            each.step()
        schedules.step()
        twin.step()
        assert opt.param_groups[0]["lr"] == alone.param_groups[0]["lr"]
        assert opt.param_groups[0]["p"] == pytest.approx(3 + math.cos(math.pi * (period + 1) / 4))


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("kind", ANNEALING)
def test_a_run_that_is_resumed_in_mid_schedule_is_the_same_to_the_bit(kind: Any, optimizer_first: bool) -> None:
    whole, first = made(), made()
    whole_schedule, schedule = kind(whole, T_max=9), kind(first, T_max=9)
    values(whole_schedule, 9)
    values(schedule, 4)
    buffer = io.BytesIO()
    torch.save([first.param_groups[0]["params"][0].detach(), first.state_dict(), schedule.state_dict()], buffer)
    buffer.seek(0)
    weights, opt_state, schedule_state = torch.load(buffer, weights_only=True)
    resumed = made()
    with torch.no_grad():
        resumed.param_groups[0]["params"][0].copy_(weights)
    if optimizer_first:
        resumed.load_state_dict(opt_state)
    other = kind(resumed, T_max=9)
    if not optimizer_first:
        resumed.load_state_dict(opt_state)
    other.load_state_dict(schedule_state)
    assert resumed.param_groups[0]["p"] == first.param_groups[0]["p"]
    values(other, 5)
    a, b = (opt.param_groups[0]["params"][0] for opt in (whole, resumed))
    assert torch.equal(a, b)
    assert other.get_last_p() == whole_schedule.get_last_p()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_with_their_own_optimizer(how: Any) -> None:
    opt = made()
    schedule = st.CosineAnnealingP(opt, T_max=5)
    values(schedule, 2)
    opt2, schedule2 = how((opt, schedule))
    assert schedule2.optimizer is opt2
    assert values(schedule2, 3) == values(schedule, 3)


def test_last_epoch_goes_on_from_the_optimizers_state() -> None:
    opt = made()
    values(st.CosineAnnealingP(opt, T_max=9), 3)
    assert values(st.CosineAnnealingP(opt, T_max=9, last_epoch=2), 6) == values(st.CosineAnnealingP(made(), 9), 9)[3:]


@pytest.mark.parametrize("kind", ANNEALING)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"T_max": 0}, "T_max=0: give an integer of at least 1"),
        ({"T_max": -3}, "T_max=-3"),
        ({"T_max": 2.5}, r"T_max=2\.5"),
        ({"T_max": 5, "p_min": 1.0}, r"p_min=1\.0: give a finite number in \[2, inf\]"),
        ({"T_max": 5, "p_min": float("nan")}, "p_min=nan"),
        ({"T_max": 5, "p_min": 5.0}, r"p=4 of parameter group 0 is p_max.* below p_min=5"),
        ({"T_max": 5, "warm_hold": 5}, "warm_hold=5 with T_max=5"),
        ({"T_max": 5, "warm_hold": -1}, "warm_hold=-1"),
        ({"T_max": 5, "last_epoch": -2}, "last_epoch=-2"),
        ({"T_max": 5, "last_epoch": 3}, "last_epoch=3, and parameter group 0 does not know the p it started with"),
    ],
)
def test_an_impossible_schedule_is_one_clear_error(kind: Any, options: dict[str, Any], message: str) -> None:
    opt = made()
    with pytest.raises(st.InvalidOptionError, match=message):
        kind(opt, **options)
    assert opt.param_groups[0]["p"] == 4.0


def test_what_has_no_p_is_told() -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(st.InvalidOptionError, match=r"Parameter group 0 of SGD has no p.*use steepest\.LPSGD"):
        st.CosineAnnealingP(sgd, T_max=3)
    with pytest.raises(st.InvalidOptionError, match="Linear is no torch"):
        st.CosineAnnealingP(torch.nn.Linear(1, 1), T_max=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [st.ConstantP, st.CosineAnnealingP])
def test_a_tensor_of_integers_cannot_be_scheduled(kind: Any) -> None:
    opt = made(torch.tensor(4))
    with pytest.raises(st.InvalidOptionError, match=r"p of parameter group 0 is a tensor of torch\.int64"):
        kind(opt, **({} if kind is st.ConstantP else {"T_max": 3}))
    assert "initial_p" not in opt.param_groups[0]


def test_groups_that_came_later_are_told() -> None:
    opt = made()
    schedule = st.CosineAnnealingP(opt, T_max=3)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(st.InvalidOptionError, match="has 2 parameter groups, and had 1"):
        schedule.step()


def test_the_state_of_another_kind_of_schedule_is_refused() -> None:
    state = st.ConstantP(made()).state_dict()
    with pytest.raises(st.InvalidOptionError, match=r"CosineAnnealingP needs .*T_max"):
        st.CosineAnnealingP(made(), T_max=3).load_state_dict(state)

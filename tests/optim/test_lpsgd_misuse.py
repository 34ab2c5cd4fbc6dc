"""LPSGD and LPSGDM: what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steepest as st

NAN, INF = float("nan"), float("inf")


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("kind", [st.LPSGD, st.LPSGDM])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.99}, r"p=1\.99: give a finite number in \[2, inf\]"),
        ({"p": INF}, r"p=inf: give a finite number"),
        ({"p": NAN}, r"p=nan: give a finite number"),
        ({"p": "4"}, r"p='4': give a finite number"),
        ({"p": torch.tensor(1.0)}, r"p=tensor\(1\.\): give a finite number"),
        ({"p": torch.tensor([3.0, 4.0])}, r"p has shape \(2,\): give a number or a tensor of one element"),
        ({"lr": -0.1}, r"lr=-0\.1: give a finite number in \[0, inf\]"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"lr has shape \(2,\)"),
        ({"eps": 0.0}, r"eps=0\.0: give a finite number in \["),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"eps": 1e-40}, "eps=1e-40"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"on_nonfinite": "warn"}, "on_nonfinite='warn': choose one of 'raise', 'skip', 'ignore'"),
        ({"on_nonfinite": "skip", "capturable": True}, "on_nonfinite='skip' with capturable=True"),
        ({"on_nonfinite": "skip", "differentiable": True}, "on_nonfinite='skip' with differentiable=True"),
        ({"foreach": True, "differentiable": True}, "foreach=True with differentiable=True"),
        ({"fused": True, "differentiable": True}, "fused=True with differentiable=True"),
        ({"fused": True, "capturable": True}, "fused=True with capturable=True"),
        ({"fused": True, "foreach": True}, "fused=True with foreach=True"),
    ],
)
def test_an_impossible_option_is_one_clear_error(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=message) as caught:
        kind([parameter()], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("momentum", [1.0, -0.1, NAN, INF])
def test_a_momentum_outside_0_to_1_is_refused(momentum: float) -> None:
    with pytest.raises(st.InvalidOptionError, match=rf"momentum={momentum}: give a finite number in \[0, 1\)"):
        st.LPSGDM([parameter()], momentum=momentum)


def test_lpsgd_has_no_momentum() -> None:
    with pytest.raises(TypeError, match="momentum"):
        st.LPSGD([parameter()], momentum=0.9)  # type: ignore[call-arg]


def test_an_impossible_option_of_a_group_is_refused_and_the_group_not_kept() -> None:
    opt = st.LPSGD([parameter()])
    with pytest.raises(st.InvalidOptionError, match=r"p=1\.0"):
        opt.add_param_group({"params": [parameter()], "p": 1.0})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(("name", "value"), [("p", 1.5), ("eps", 0.0), ("momentum", 1.0), ("lr", NAN)])
def test_an_option_that_was_spoilt_by_hand_is_found_at_the_next_step(name: str, value: float) -> None:
    param = parameter()
    param.grad = torch.ones(3)
    opt = st.LPSGDM([param])
    opt.param_groups[0][name] = value
    with pytest.raises(st.InvalidOptionError, match=f"{name}="):
        opt.step()
    assert param.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("param", "found"),
    [
        (torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)), "complex"),
        (torch.nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False), r"of torch\.int32"),
        (torch.nn.Parameter(torch.eye(2).to_sparse()), "sparse_coo"),
    ],
)
def test_parameters_that_it_is_not_for_are_refused_by_name(param: torch.nn.Parameter, found: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=rf"The parameter 'table\.weight' is {found}.*"):
        st.LPSGD([("bias", parameter()), ("table.weight", param)])
    with pytest.raises(st.InvalidOptionError, match=rf"The parameter number 1 of its group.* is {found}"):
        st.LPSGDM([parameter(), param])


def test_sparse_gradients_are_refused_by_name_before_anything_moves() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2, sparse=True), torch.nn.Linear(2, 1))
    opt = st.LPSGDM(model.named_parameters(), lr=0.1)
    model(torch.tensor([1, 2])).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        st.InvalidOptionError, match=r"The gradient of parameter '0\.weight' is sparse_coo: .*sparse=False"
    ):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_compiled_pass_says_what_it_is_for() -> None:
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(st.InvalidOptionError, match=r"fused=True with a parameter on cpu in torch\.bfloat16"):
        st.LPSGD([half], fused=True)


def test_parameters_that_left_the_compiled_pass_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from steepest.optim import _lp_fused

    monkeypatch.setattr(_lp_fused, "compiled", lambda *_, **__: None)
    model = torch.nn.Linear(2, 1)
    opt = st.LPSGD(model.parameters(), fused=True)
    model.bfloat16()
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(st.InvalidOptionError, match=r"in torch\.bfloat16"):
        opt.step()


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from steepest.optim import _lp_fused

    def broken(*_: object, **__: object) -> Any:
        def fail(*_: object) -> None:
            raise RuntimeError("No working C++ compiler found")

        return fail

    _lp_fused.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(st.InvalidOptionError, match=r"No working C\+\+ compiler found.*leave fused out"):
        st.LPSGD([parameter()], fused=True)

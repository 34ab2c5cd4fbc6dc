"""What goes wrong on one of the ranks that take KFAC's steps together, one thing after the other."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F

from optim.kfac_runs import EVERY, snapshot
from optim.rank_runs import MODES, Case, assert_identical, batch, broken, build, outcome, replaced, told

CULPRIT = {2: 1, 3: 2, 4: 2}  # a rank that owns a layer


def troubles(rank: int, world: int, mode: str) -> dict[str, Any]:
    case = Case((4,) * world, options={**EVERY, **MODES[mode]})
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
    errors["nan"] = told(opt.step)
    opt._skip_nonfinite = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backward(2, float("inf") if guilty else 1.0)
        errors["skipped"] = told(opt.step)
    errors["warned"] = len(caught)
    opt._skip_nonfinite = False
    skipped, opt._memory["num_skipped"] = opt._memory["num_skipped"], 0
    backward(2)
    with replaced(torch.linalg, "eigh", broken(KeyError("odd")) if guilty else torch.linalg.eigh):
        errors["eigh"] = told(opt.step)
    backward(2)
    with replaced(type(opt), "_direction", broken(ValueError("odd")) if guilty else type(opt)._direction):
        errors["direction"] = told(opt.step)
    backward(2)
    with replaced(type(opt), "_updated", broken(ValueError("odd")) if guilty else type(opt)._updated):
        errors["factors"] = told(opt.step)
    errors["closure"] = told(opt.step, broken(KeyError("y")) if guilty else lambda: backward(2))
    backward(2)
    errors["saving alone"] = told(opt.state_dict if guilty else opt.step) if mode in {"sharded", "half"} else ""
    opt.zero_grad()
    errors["no backward"] = told(opt.step)
    assert_identical(before, snapshot(model))
    assert_identical(kept, opt.state_dict())
    failures = []
    for step in range(2, 6):  # the decomposition fails on one rank, three times in a row
        backward(step)
        error = torch.linalg.LinAlgError("no convergence")
        with replaced(torch.linalg, "eigh", broken(error) if guilty and step < 5 else torch.linalg.eigh):
            failures += [(told(opt.step).split(":")[0], opt.diagnostics.num_failures)]
    backward(6)
    opt.step()
    return {"errors": errors, "skipped": skipped, "failures": failures, **outcome(model, opt)}


def check_troubles(world: int, mode: str, found: list[Any]) -> None:
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
        if mode in {"sharded", "half"}:
            assert f"1 of {world} ranks called state_dict(), and the others step()" in errors["saving alone"]
        assert_identical(of["failures"], found[0]["failures"])
        assert_identical(of["state"], found[0]["state"])
        assert_identical(of["params"], found[0]["params"])
    assert [kind for kind, _ in found[0]["failures"]] == ["no error", "no error", "DecompositionError", "no error"]
    assert [count > 0 for _, count in found[0]["failures"]] == [True, True, True, False]

"""What goes wrong on one rank raises on all that take a step of Sven together, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import steepest as st
from optim.rank_runs import assert_identical
from optim.sven_cases import text
from optim.sven_troubles import failures, sentences
from ranks import run_ranks


def test_what_goes_wrong_on_one_rank_raises_on_all_and_changes_nothing(tmp_path: Path) -> None:
    world = 3
    found = run_ranks(world, tmp_path, failures)
    told = f"Rank {world - 1} of {world} failed, so that none goes on. It said: "
    for rank, one in enumerate(found):
        last = rank == world - 1
        assert one["fresh state"]
        for name, kind, text_ in (
            ("nan", "NonFiniteError", "1 of 4 losses"),
            ("error", "KeyError", "user"),
            ("no closure", "ClosureError", "needs a closure"),
            ("reduced", "ClosureError", "It looks reduced"),
        ):
            prefix = kind if last else ("NonFiniteRankError: " if name == "nan" else "RankError: ") + told + kind
            assert one[name].startswith(prefix), one[name]
            assert text_ in one[name]
        assert f"what the closure returns is a tensor on rank 0 and a dict on rank {world - 1}" in one["dict"]
        assert "dtype of the rows is torch.float64 on rank 0 and torch.float32" in one["half"]
        assert one["skipped"] == ["skipped", "stepped", "skipped"]
        assert one["not skipped"].startswith("KeyError" if rank == 0 else "RankError: Rank 0")
        assert one["count"] == 2
        assert f"lr is [0.1] on rank 0 and [0.5] on rank {world - 1}" in one["lr"]
        assert "solver is Damped(damping=0.2" in one["solver"]
        assert "number of parameters is" in one["fewer"]
        assert one["broken"].startswith("ValueError: no sol" if rank == 0 else "RankError: Rank 0")
        assert one["odd"] == "stepped"
        assert one["overflow"].startswith("NonFiniteError: The Gram of the per-sample gradients holds NaN or infinity")
        assert one["too far"].startswith("NonFiniteError: The update reaches")
        assert f"Parameter '2.weight' is not the same on rank 0 and on rank {world - 1}" in one["start"]
        assert "Parameter '0.bias' is not the same" in one["frozen"]
        assert "solver is LeaveOneOut(" in one["levenberg of one"]
        assert "and LevenbergMarquardt(" in one["levenberg of one"]
        assert one["levenberg of one"].startswith("InvalidOptionError")
        assert f"method is ['sven'] on rank 0 and ['adamw', 'sven'] on rank {world - 1}" in one["adamw of one"]
        assert (
            f"Parameter '0.weight' and 3 more is not the same on rank 0 and on rank {world - 1}" in one["other groups"]
        )
        for form in ("primal", "dual"):
            assert one[f"{form} good"] == "stepped"
            assert one[f"{form} broken"].startswith("KeyError" if last else "RankError: " + told + "KeyError")
            assert one[f"{form} nan"] == "stepped"
            assert one[f"{form} taken back"]
            assert one[f"{form} steep"].startswith("NonFiniteError: The products of the per-sample gradients"), one
        assert one["adamw good"] == one["metric good"] == "stepped"
        assert one["adamw steep"].startswith("NonFiniteError: The gradient of '0.weight' holds NaN"), one["adamw steep"]
        assert one["metric steep"].startswith("NonFiniteError: The batch has no metric"), one["metric steep"]
        assert f"momentum is 0.2 on rank 0 and 0.5 on rank {world - 1}" in one["momentum"]
        assert f"relative_decay is 0.0 on rank 0 and 0.5 on rank {world - 1}" in one["decay"]
        assert "metric is None on rank 0 and KroneckerMetric(" in one["metric"]
        assert "weights is {'some': 1.0} on rank 0 and {'some': 2.0}" in one["weights"]
        assert "a weight for 'other', and the closure returned the blocks 'some'" in one["unknown"]
        assert one["before"] == one["after"] == "stepped"
        assert one["second"].startswith("KeyError" if last else "RankError: " + told + "KeyError"), one["second"]
        assert one["second nan"] == one["second worse"] == "stepped"  # whole steps that moved nothing
        assert one["given up"]
        assert one["as it was"]
        assert torch.equal(one["new params"], found[0]["new params"])
        assert torch.equal(one["reported"][0], found[0]["reported"][0])
        assert_identical(one["reported"][2], found[0]["reported"][2])
        assert one["after all"] == ["stepped", "stepped"]
        assert one["saved"]
        assert torch.equal(one["params"], found[0]["params"])
        assert one["wrapped"]["same"]
        assert one["wrapped"]["names"] == ["0.weight"]
        said, _ = one["wrapped"]["said"]
        assert "Sven trains the module inside DistributedDataParallel" in said
        assert torch.equal(one["lengths"]["params"], found[0]["lengths"]["params"])
    _check_reported(world, found[0]["reported"][0])
    torch.manual_seed(5)
    model = text().double()
    opt = st.Sven(model, solver=st.Damped(1e-2), capture=st.ReferenceCapture(model))
    loss = opt.step(lambda: torch.cat([model(sentences(rank)).flatten().square() for rank in range(world)]))
    torch.testing.assert_close(found[0]["lengths"]["loss"], loss, rtol=1e-12, atol=0)
    want = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (found[0]["lengths"]["params"] - want).norm() <= 1e-10 * want.norm()


def _check_reported(world: int, loss: Tensor) -> None:
    """A step by residuals tells the mean loss of all samples: three on the last rank, two on the others."""
    torch.manual_seed(3)
    classes, inputs = nn.Linear(5, 4).double(), torch.randn(8, 5, dtype=torch.float64)
    each = nn.functional.cross_entropy(classes(inputs[:5]), torch.tensor([0, 1, 2, 3, 0]), reduction="none").detach()
    want = (each[:3].sum() + (world - 1) * each[3:].sum()) / (3 + 2 * (world - 1))
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)

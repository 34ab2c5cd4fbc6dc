"""Records on their way between processes, and the Jacobian whose rows lie on several of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from capturing import capture_rows
from ranks import run_ranks
from steepest.distributed import Ranks
from steepest.distributed.agreement import check_alike, tell
from steepest.distributed.jacobian import SpreadJacobian
from steepest.distributed.records import align, layout
from steepest.engine.packing import RecordForm
from steepest.errors import InvalidOptionError, NonFiniteError

COUNTS = (3, 5, 2, 4)


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def talk(rank: int, world: int) -> dict[str, Any]:
    """Exchanges with neighbours, and what the ranks tell each other."""
    ranks = Ranks.current()
    assert ranks is not None
    send = [torch.full((3,), float(rank)), torch.empty(0), torch.full((), rank, dtype=torch.int64)]
    room = [torch.empty(3), torch.empty(0), torch.empty((), dtype=torch.int64)]
    ranks.exchange(send, (rank + 1) % world, room, (rank - 1) % world)()
    to_last = [torch.tensor([rank, 7])] if rank == 0 else [torch.zeros(2, dtype=torch.int64)]
    ends = (world - 1, None) if rank == 0 else (None, 0 if rank == world - 1 else None)
    ranks.exchange(to_last, ends[0], to_last, ends[1])()
    last, soft, hard = rank == world - 1, NonFiniteError("a NaN"), ValueError("no such thing")
    return {
        "room": [t.tolist() for t in room],
        "to_last": to_last[0].tolist(),
        "sent": ranks.traffic.sent,
        "told": tell(ranks, {"rank": rank}, None),
        "soft": said(lambda: tell(ranks, None if last else 1, soft if last else None)),
        "hard": said(lambda: tell(ranks, None if last else 1, hard if last else None)),
        "both": said(lambda: tell(ranks, None, hard if last else soft)),
    }


def test_neighbours_exchange_tensors_and_failures_are_everybodys(tmp_path: Path) -> None:
    world = 3
    for rank, found in enumerate(run_ranks(world, tmp_path, talk)):
        left, last = (rank - 1) % world, rank == world - 1
        assert found["room"] == [[float(left)] * 3, [], left]
        assert found["to_last"] == ([0, 7] if rank == 0 or last else [0, 0])
        assert found["sent"] == 3 * 4 + 8 + (16 if rank == 0 else 0)
        assert found["told"] == [{"rank": r} for r in range(world)]
        told = f"Rank {world - 1} of {world} failed, so that none goes on. It said: "
        assert found["soft"] == ("" if last else f"NonFiniteRankError: {told}") + "NonFiniteError: a NaN"
        assert found["hard"] == ("" if last else f"RankError: {told}") + "ValueError: no such thing"
        # What may be skipped gives way to what may not.
        assert found["both"] == ("" if last else f"RankError: {told}") + "ValueError: no such thing"


def test_settings_that_differ_are_named() -> None:
    check_alike("It", [{"a": 1}, {"a": 1}], "do so")
    with pytest.raises(InvalidOptionError, match=r"It differs between processes: b is 2 on rank 0 and 3 on rank 2"):
        check_alike("It", [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}], "do so")
    with pytest.raises(InvalidOptionError, match="c is missing on rank 0 and 4 on rank 1"):
        check_alike("It", [{}, {"c": 4}], "do so")


def model() -> nn.Module:
    """Positions, convolution, embedding, norm, a tied weight: every kind of record."""
    torch.manual_seed(0)
    made = nn.ModuleDict({
        "table": nn.Embedding(40, 6),
        "small": nn.Embedding(3, 6),
        "norm": nn.LayerNorm(6),
        "conv": nn.Conv1d(6, 4, 3, padding=1),
        "grouped": nn.Conv1d(4, 4, 3, groups=2),
        "wide": nn.Linear(6, 6),
        "last": nn.Linear(4, 2),
    })
    return made.double()


def rows_of(made: Any, tokens: Tensor) -> Tensor:
    x = made["wide"](made["norm"](made["table"](tokens) + made["small"](tokens % 3)).tanh())
    x = made["grouped"](made["conv"](made["wide"](x).mT).tanh())
    return made["last"](x.mean(2)).square().sum(1)


def tokens_of(world: int, length: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(40, (count, length), generator=generator) for count in COUNTS[:world]]


class Watch:
    """How much of other ranks' records is alive whenever room for more is made."""

    def __init__(self) -> None:
        self.alive: list[tuple[weakref.ref[Tensor], tuple[str, ...]]] = []
        self.most_layers = self.most_bytes = 0
        self.made = RecordForm.empty

    def __call__(self, form: RecordForm, device: torch.device) -> list[Tensor]:
        room = self.made(form, device)
        names = tuple(name for name, _ in form.shapes)
        self.alive = [(ref, owner) for ref, owner in self.alive if ref() is not None]
        self.alive += [(weakref.ref(tensor), names) for tensor in room]
        self.most_layers = max(self.most_layers, len({owner for _, owner in self.alive}))
        held = [ref() for ref, _ in self.alive]
        self.most_bytes = max(self.most_bytes, sum(t.numel() * t.itemsize for t in held if t is not None))
        return room


def spread(rank: int, world: int) -> dict[str, Any]:
    ranks = Ranks.current()
    assert ranks is not None
    made, tokens = model(), tokens_of(world)[rank]
    local = capture_rows(made, lambda: rows_of(made, tokens))
    jacobian = SpreadJacobian(local, ranks, COUNTS[:world])
    watch = Watch()
    RecordForm.empty = lambda form, device: watch(form, device)  # type: ignore[method-assign]
    before = (ranks.traffic.sent, ranks.traffic.gathered)
    gram = jacobian.gram()
    traffic = (ranks.traffic.sent - before[0], ranks.traffic.gathered - before[1])
    RecordForm.empty = watch.made  # type: ignore[method-assign]
    weights = torch.linspace(-1, 1, jacobian.num_rows, dtype=torch.float64)
    vjp = jacobian.vjp(weights)
    kept = jacobian.sample_outputs(0.5, torch.Generator().manual_seed(1))
    added = {name: torch.ones_like(product) for name, product in vjp.items()}
    jacobian.add_vjp_(added, weights, dict.fromkeys(added, -2.0))
    found = {
        "gram": gram,
        "gram32": jacobian.gram("float32"),
        "cut": jacobian.restrict(kept).gram(),
        "dense": jacobian.to_dense(),
        "vjp": torch.cat([product.flatten() for product in vjp.values()]),
        "added": all(torch.equal(added[n], 1 - 2 * vjp[n]) for n in vjp),
        "jvp": jacobian.jvp(vjp),
        "projected": jacobian.project({name: torch.stack([p, -p]) for name, p in vjp.items()}),
        "norms": jacobian.squared_norms(),
        "normal": jacobian.normal_equations(weights, torch.float64),
        "traffic": traffic,
        "layers": watch.most_layers,
        "bytes": watch.most_bytes,
        "forms": [RecordForm.of(record) for record in local.records],
        "refused": [said(lambda: jacobian.layer_rows("last.weight")), said(lambda: jacobian.cross_gram(local))],
    }

    # A rank that fails in the middle of a layer raises everywhere, and what comes after works.
    def fail(*_: Any) -> Tensor:
        raise MemoryError("too much")

    if rank == world - 1:
        for kind in {type(record) for record in local.records}:
            kind.gram = fail  # type: ignore[method-assign]
    found["failed"] = said(jacobian.gram)
    bad = SpreadJacobian(local, ranks, COUNTS[:world])
    if rank == 0:
        local.vjp = fail  # type: ignore[method-assign]
    found["failed_vjp"] = said(lambda: bad.vjp(weights))
    # Ranks whose records differ: another length of the sequences is no difference, other uses of parameters are.
    if rank == 0:
        odd = capture_rows(made, lambda: made["last"](made["conv"](made["norm"](torch.ones(3, 7, 6).double()).mT).mean(2)).sum(1))  # fmt: skip  # noqa: E501
    else:
        odd = capture_rows(st.ReferenceCapture(made), lambda: rows_of(made, tokens))  # type: ignore[arg-type]
    layouts = ranks.gather_objects(layout(odd))
    aligned = align(odd, layouts)
    found["aligned"] = (layout(aligned), align(local, [layout(local)] * world) is local)
    own, theirs = odd.to_dense(), aligned.to_dense()
    found["kept"] = torch.equal(own, theirs)
    return found


def sends(rank: int, world: int, layer: int) -> int:
    return (world - 1) // 2 + (world % 2 == 0 and (rank < world // 2) != (layer % 2 == 0))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rows_on_several_processes_are_one_jacobian(world: int, tmp_path: Path) -> None:
    made = model()
    truth = capture_rows(made, lambda: rows_of(made, torch.cat(tokens_of(world))))
    dense, rows = truth.to_dense(), truth.num_rows
    weights = torch.linspace(-1, 1, rows, dtype=torch.float64)
    product = truth.vjp(weights)
    kept = truth.sample_outputs(0.5, torch.Generator().manual_seed(1))
    flat = dense.T @ weights
    wanted = {
        "gram": dense @ dense.T,
        "cut": truth.restrict(kept).gram(),
        "dense": dense,
        "vjp": flat,
        "jvp": truth.jvp(product),
        "projected": torch.stack([dense @ flat, -dense @ flat], 1),
        "norms": dense.square().sum(1),
    }
    found = run_ranks(world, tmp_path, spread)
    layers = list(zip(*(one["forms"] for one in found), strict=True))
    explicit = [sum(f.explicit().nbytes for f in forms) < sum(f.nbytes for f in forms) for forms in layers]
    assert any(explicit)
    assert not all(explicit)  # both forms are on the wire
    wire = [[(f.explicit() if e else f).nbytes for f in forms] for e, forms in zip(explicit, layers, strict=True)]
    for rank, one in enumerate(found):
        for name, want in wanted.items():
            assert float((one[name] - want).abs().max()) <= 1e-11 * float(want.abs().max()), name
            assert torch.equal(one[name], found[0][name]), name
        assert float((one["gram32"] - wanted["gram"]).abs().max()) <= 3e-6 * float(wanted["gram"].abs().max())
        torch.testing.assert_close(one["normal"][0], dense.T @ dense, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one["normal"][1], flat, rtol=1e-10, atol=1e-10)
        assert one["added"]
        assert one["traffic"][0] == sum(sends(rank, world, n) * sizes[rank] for n, sizes in enumerate(wire))
        assert one["traffic"][1] == max(COUNTS[:world]) * (rows + 1) * 8
        assert one["layers"] <= 1
        assert one["bytes"] <= max(sum(sorted(sizes)[-2:]) for sizes in wire) < sum(map(sum, wire)) / 2
        assert all("no form for rows on" in text for text in one["refused"])
        last = rank == world - 1
        assert one["failed"].endswith("MemoryError: too much")
        assert one["failed"].startswith("MemoryError" if last else f"RankError: Rank {world - 1} of {world} failed")
        assert one["failed_vjp"].startswith("MemoryError" if rank == 0 else "RankError: Rank 0")
        assert one["aligned"] == (found[0]["aligned"][0], True)
        assert {kind for kind, _ in one["aligned"][0]} == {"MaterializedRecord"}
        assert one["kept"]
    assert sum(one["traffic"][0] for one in found) > 0

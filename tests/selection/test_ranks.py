"""Several processes select together: all get one selection, that of one process or, with a sketch, one close to it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import steepest as st
from ranks import run_ranks
from selecting import CROSS_ENTROPY, Toy, net, points
from steepest.errors import SteepestError
from steepest.selection import Progress

NUMBER, FEATURES, CLASSES, HIDDEN, SIZE = 300, 6, 3, 8, 16
WIDTH = CLASSES * (HIDDEN + 1)  # of a gradient in the last layer
KEPT = 60

EXACT = {
    "random": st.Random(),
    "el2n": st.EL2N(),
    "grand": st.GraNd(scope="all", class_policy="proportional"),
    "herding": st.Herding(),
    "k_center": st.KCenter(),
    "grad_match": st.GradMatch(),
}
WIDE = {  # a sketch with as many rows as gradients have numbers loses nothing
    "gradients": st.SAGE(sketch_size=WIDTH),
    "sketch": st.SAGE(sketch_size=WIDTH, consensus="sketch"),
    "kept": st.SAGE(sketch_size=WIDTH, consensus="sketch", keep_projections=True),
    "reference": st.SAGE(sketch_size=WIDTH, consensus="reference", weights="class"),
    "global": st.SAGE(sketch_size=WIDTH, class_policy="global", robust=True),
}
NARROW = {
    "narrow": st.SAGE(sketch_size=8),
    "narrow_top": st.SAGE(sketch_size=8, rule=st.Top()),
    "narrow_sketch": st.SAGE(sketch_size=8, consensus="reference"),
    "narrow_kept": st.SAGE(sketch_size=8, consensus="sketch", keep_projections=True),
}


def clusters(number: int = NUMBER) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(CLASSES, FEATURES, generator=generator)
    truth = torch.arange(number) % CLASSES
    x = centres[truth] + torch.randn(number, FEATURES, generator=generator)
    drawn = torch.randint(CLASSES, (number,), generator=generator)
    return x, torch.where(torch.rand(number, generator=generator) < 0.15, drawn, truth)


def trained() -> nn.Module:
    """A scorer that knows something of the classes; in float64, so that only sums in another order differ."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
    x, y = clusters()
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(20):
        opt.zero_grad()
        CROSS_ENTROPY(model(x.double()), y).mean().backward()
        opt.step()
    model.zero_grad()
    return model


def select(method: Any, data: Any = None, model: nn.Module | None = None, **options: Any) -> st.Selection:
    x, y = clusters()
    options = {"count": KEPT, "batch_size": SIZE, "loss_fn": CROSS_ENTROPY} | options
    if getattr(method, "consensus", "") == "reference":
        options["reference"] = (x[:70].double(), y[:70])
    loss_fn = options.pop("loss_fn")
    return st.select_subset(
        model or trained(), (x.double(), y) if data is None else data, loss_fn, method=method, **options
    )


def words(selection: st.Selection) -> tuple[Any, ...]:
    """All of a selection, to be compared for equality."""
    arrays = (selection.indices, selection.scores, selection.weights, selection.labels)
    plain = tuple(None if array is None else array.tolist() for array in arrays)
    return (*plain, selection.fingerprint, selection.model_hash, selection.options, str(selection.report),
            selection.report)  # fmt: skip


def all_methods(rank: int, world: int) -> dict[str, st.Selection]:
    return {name: select(method) for name, method in (EXACT | WIDE | NARROW).items()}


def shares(batches: int, world: int) -> list[int]:
    return [-(-batches * (r + 1) // world) - -(-batches * r // world) for r in range(world)]


def expected_traffic(name: str, found: st.Selection, world: int) -> int:
    """What the first process gives to collectives, by the formulas of the documentation."""
    method = (EXACT | WIDE | NARROW)[name]
    n = min(NUMBER, max(shares(-(-NUMBER // SIZE), world)) * SIZE)
    looked = min(KEPT, max(shares(-(-KEPT // SIZE), world)) * SIZE)
    numbers = 8 * n + 40 * n + 12 * KEPT  # positions, labels and digests; the choice
    scope = WIDTH + (HIDDEN * (FEATURES + 1) if getattr(method, "scope", "") == "all" else 0)
    numbers += 8 * scope + 32 * looked  # review
    if found.scores is not None:
        numbers += 4 * NUMBER
    if name in {"el2n", "grand"}:
        numbers += 4 * n
    if name in {"herding", "k_center"}:
        numbers += 4 * n * HIDDEN
    if name == "grad_match":
        numbers += 4 * n * (HIDDEN + 1 + CLASSES)
    if isinstance(method, st.SAGE):
        groups = 1 if method.class_policy == "global" else CLASSES
        rows = method.sketch_size
        read = min(70, max(shares(-(-70 // SIZE), world)) * SIZE)  # of the reference set
        more = {"gradients": n, "sketch": n if method.keep_projections else 2 * n, "reference": n + read}
        numbers += 8 * more[method.consensus]  # positions of the passes after the first
        numbers += 4 * rows * WIDTH + 8 * groups * rows  # sketch and consensus
        numbers += 2 * rows * n if method.keep_projections else 4 * n
        if method.consensus == "gradients":
            numbers += 8 * groups * WIDTH
        else:
            numbers += 8 * groups * rows  # sums
    return numbers


@pytest.mark.parametrize("world", [2, 4])
def test_all_processes_get_one_selection_and_it_is_that_of_one(world: int, tmp_path: Path) -> None:
    results = run_ranks(world, tmp_path, all_methods)
    x, y = clusters()
    for name in EXACT | WIDE | NARROW:
        one, many = select((EXACT | WIDE | NARROW)[name]), results[0][name]
        for other in results[1:]:
            assert words(other[name]) == words(many), name
        assert (many.fingerprint, many.model_hash) == (one.fingerprint, one.model_hash)
        many.check((x.double(), y))  # one process takes it for a selection of the same data
        assert many.labels is not None
        assert torch.equal(many.labels, y)
        assert (many.report.processes, one.report.processes, one.report.traffic) == (world, 1, 0)
        assert many.report.duplicates == one.report.duplicates
        assert many.report.class_counts == one.report.class_counts
        if name in EXACT | NARROW:
            assert many.report.traffic == expected_traffic(name, many, world), name
        else:  # rows of the sketch that are nothing but rounding may be left out
            assert 0.5 < many.report.traffic / expected_traffic(name, many, world) <= 1
        if one.scores is None or many.scores is None:
            assert one.scores is many.scores is None
            assert torch.equal(many.indices, one.indices)
            continue
        apart = (one.scores - many.scores).abs()
        if name in NARROW:
            # A merged sketch has the same bound, not the same numbers.
            assert float(apart.mean()) < 0.02
            assert float(torch.corrcoef(torch.stack([one.scores, many.scores]))[0, 1]) > 0.99
            certified = many.report.numbers["certificate_relative"]
            assert 0 < certified < 1.1 * one.report.numbers["certificate_relative"]
            common = len(set(one.indices.tolist()) & set(many.indices.tolist())) / KEPT
            assert common > (0.75 if name == "narrow_top" else 0.1), common
            continue
        assert float(apart.max()) < (1e-6 if name in EXACT or name != "kept" else 5e-4), name
        assert torch.equal(many.indices, one.indices), name
        assert torch.equal(many.weights, one.weights) or name == "grad_match"
        assert many.report.mean_cosine == pytest.approx(one.report.mean_cosine, rel=1e-10)
        assert many.report.notes == one.report.notes
        if name in {"el2n", "grand", "herding", "k_center", "grad_match"}:  # rows are those of one process to the bit
            assert torch.equal(one.scores, many.scores)
            assert many.report.numbers == one.report.numbers
            assert torch.equal(many.weights, one.weights)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, stop: int = 50) -> None:
        self.stop = stop

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = points()
        yield from zip(x[: self.stop], y[: self.stop], strict=True)


class Mapped(Dataset[tuple[Tensor, Tensor]]):
    """Points one by one; some positions may fail, hold NaN, have no label, or be others in every pass."""

    def __init__(self, at: int = -1, how: str = "") -> None:
        self.at, self.how, self.seen = at, how, 0

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = points()
        value, label = x[index], y[index]
        if index == self.at:
            self.seen += 1
            if self.how == "error":
                raise OSError("the disk is gone")
            value = value + (float("nan") if self.how == "nan" else self.seen)
        if self.how == "unlabelled" and index >= self.at:
            label = label.double()
        return value, label


def uneven() -> list[tuple[Tensor, Tensor]]:
    x, y = points()
    cuts = [0, 3, 20, 21, 35, 42, 50]
    return [(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]


DATA: dict[str, Callable[[], Any]] = {
    "tensors": points,
    "one sample": lambda: points(1),
    "fewer batches than processes": lambda: points(12),
    "stream": Stream,
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=8),
    "short stream": lambda: Stream(9),
    "batches": uneven,
    "loader": lambda: DataLoader(Mapped(), batch_size=8, shuffle=True),
    "no labels": lambda: (points()[0], points()[0][:, :3]),
    "dicts": lambda: [{"x": x, "label": y} for x, y in uneven()],
}
METHODS = [st.Random(), st.EL2N(), st.SAGE(sketch_size=27), st.GradMatch()]


def of_kind(kind: str, method: Any) -> st.Selection:
    data = DATA[kind]()
    options: dict[str, Any] = {"fraction": 0.3, "method": method}
    if kind in {"tensors", "one sample", "fewer batches than processes", "stream", "short stream", "no labels"}:
        options["batch_size"] = 8
    if kind == "dicts":
        losses = lambda model, batch: CROSS_ENTROPY(model(batch["x"]), batch["label"])  # noqa: E731
        return st.select_subset(net(), data, batch_losses=losses, **options)
    loss = CROSS_ENTROPY if kind != "no labels" else lambda out, y: (out - y).square().sum(1)
    return st.select_subset(net(), data, loss, **options)


def all_kinds(rank: int, world: int) -> dict[str, st.Selection]:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, method in itertools.product(DATA, METHODS):
            found[f"{kind}: {method.name}"] = of_kind(kind, method)
    return found


def test_every_kind_of_data_is_shared_out(tmp_path: Path) -> None:
    results = run_ranks(3, tmp_path, all_kinds)
    for kind, method in itertools.product(DATA, METHODS):
        name = f"{kind}: {method.name}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = of_kind(kind, method)
        many = results[0][name]
        assert all(words(other[name]) == words(many) for other in results[1:]), name
        assert one.fingerprint == many.fingerprint, name
        assert torch.equal(one.indices, many.indices), name
        if one.scores is not None and many.scores is not None:
            assert torch.allclose(one.scores, many.scores, rtol=1e-5, atol=1e-6), name
        if one.report.mean_cosine is not None or many.report.mean_cosine is not None:
            assert one.report.mean_cosine == pytest.approx(many.report.mean_cosine, rel=1e-6), name


def failed(work: Callable[[], Any]) -> str:
    try:
        work()
    except (SteepestError, OSError, ZeroDivisionError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def other_net() -> nn.Module:
    model = net()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    return model


def in_shards() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model)
    return model


def troubles(rank: int, world: int) -> dict[str, Any]:
    """Every trouble on one process or in its part of the data; a selection in the end shows that all go on."""
    last = rank == world - 1

    def run(method: Any = None, data: Any = None, model: nn.Module | None = None, **options: Any) -> Any:
        options = {"fraction": 0.2, "batch_size": 8} | options
        return st.select_subset(model or net(), data or Mapped(), CROSS_ENTROPY, method=method or st.EL2N(), **options)

    def broken(step: Progress) -> None:
        raise ZeroDivisionError

    def stopped(step: Progress) -> None:
        raise KeyboardInterrupt

    said: list[str] = []
    found = {
        "nan": failed(lambda: run(data=Mapped(45, "nan"))),
        "nan in a sketch": failed(lambda: run(st.SAGE(), Mapped(45, "nan"))),
        "error": failed(lambda: run(data=Mapped(45, "error"))),
        "labels": failed(lambda: run(data=Mapped(32, "unlabelled"), batch_size=8, method=st.Random(), review=False)),
        "augmented": failed(lambda: run(st.SAGE(), Mapped(45, "another"))),
        "options": failed(lambda: run(st.EL2N(keep="top" if last else "bottom"))),
        "impossible": failed(lambda: run(fraction=2.0 if last else 0.2)),
        "checkpoint": failed(lambda: run(checkpoint="c" if last else None)),
        "sharded": failed(lambda: run(model=in_shards())),
        "model": failed(lambda: run(model=other_net() if last else net())),
        "length": failed(lambda: run(data=(points(49) if last else points()))),
        "streams": failed(lambda: run(data=Stream(20 if last else 50), batch_size=8)),
        "memory": failed(lambda: run(st.Herding(max_memory=1000))),
        "no join": failed(lambda: run(Toy())),
        "progress": failed(lambda: run(progress=broken)),
        "ctrl-c": failed(lambda: run(progress=stopped)),
        "batches": failed(lambda: run(data=[(x, y if len(x) != 8 else y[:7]) for x, y in uneven()], batch_size=None)),
    }
    found["alone"] = words(run(alone=True))[0] if last else []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found["fine"] = words(run(st.EL2N(class_policy="global"), fraction=None, count=1,
                                  progress=lambda step: said.append(step.kind)))[0]  # fmt: skip
    return found | {"told": said, "warned": len(warned)}


def test_what_fails_on_one_process_fails_on_all_and_none_hangs(tmp_path: Path) -> None:
    world = 2
    results = run_ranks(world, tmp_path, troubles)
    wanted = {  # what the process that it happens on says, and what the others say
        "nan": ("NonFiniteError: The loss of sample 45 is nan", "NonFiniteRankError: Rank 1 of 2 failed"),
        "nan in a sketch": ("NonFiniteError: The loss of sample 45", "NonFiniteRankError: Rank 1 of 2 failed"),
        "error": ("OSError: the disk is gone", "RankError: Rank 1 of 2 failed"),
        "augmented": ("SelectionError: the data changed between passes", "RankError: Rank 1"),
        "impossible": ("InvalidOptionError: fraction", "RankError: Rank 1"),
        "batches": ("InvalidOptionError: The tensors in batch 5", "RankError: Rank 1 of 2 failed"),
    }
    for name, (own, others) in wanted.items():
        assert results[-1][name].startswith(own), results[-1][name]
        assert results[0][name].startswith(others), results[0][name]
        assert own.partition(": ")[2] in results[0][name]
    for name, message in {
        "labels": "InvalidOptionError: some processes found whole-number labels",
        "options": "SelectionError: the processes were given different things: options is",
        "model": "SelectionError: the processes were given different things: model is",
        "checkpoint": "SelectionError: the processes were given different things: whether there is a checkpoint",
        "sharded": "UnsupportedModelError: Parameter '0.weight' is a DTensor",
        "length": "SelectionError: the processes were given different things: number of samples is 50 on rank 0 and 49",
        "streams": "SelectionError: the processes read different data",
        "memory": "InvalidOptionError: Herding keeps 8 float32 numbers per sample: 1.6 KiB for 50 samples",
        "no join": "InvalidOptionError: Toy(scope='last', passes=2, reference=False) does not say how several",
    }.items():
        for found in results:
            assert found[name].startswith(message), (name, found[name])
    assert results[0]["progress"].startswith("ZeroDivisionError")
    assert results[0]["ctrl-c"].startswith("KeyboardInterrupt")
    for name in ("progress", "ctrl-c"):
        assert results[1][name].startswith("RankError: Rank 0 of 2 failed"), results[1][name]
    alone = st.select_subset(net(), points(), CROSS_ENTROPY, fraction=0.2, batch_size=8, method=st.EL2N())
    assert results[-1]["alone"] == alone.indices.tolist()
    one = st.EL2N(class_policy="global")
    with pytest.warns(UserWarning, match="no sample"):
        fine = st.select_subset(net(), points(), CROSS_ENTROPY, count=1, batch_size=8, method=one)
    assert all(found["fine"] == fine.indices.tolist() for found in results)
    assert results[0]["told"].count("batch") == 4  # of seven
    assert results[0]["told"].count("review") == 1
    assert (results[0]["warned"], results[1]["told"], results[1]["warned"]) == (1, [], 0)


def test_a_sketch_can_be_joined_with_one_that_lies_elsewhere() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    one, other, merged = (st.FrequentDirections(sketch_size=3) for _ in range(3))
    one.insert(rows[:25])
    other.insert(rows[25:])
    merged.insert(rows[:25])
    merged.merge(other)
    one.absorb(other.summary(), {name: part.clone() for name, part in other.rows().items()})
    assert torch.equal(one.sketch(), merged.sketch())
    assert (one.certificate, one.num_rows) == (merged.certificate, 40)

"""A selection begun by some processes is continued: bit for bit by as many, and by any other number without waste."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

import steepest as st
from ranks import run_ranks
from selecting import CROSS_ENTROPY, Toy, ToyRun, kept_in, net, points
from steepest.distributed.checkpoint import tensors as tensor_files
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.errors import SteepestError
from steepest.selection import Keep, Progress
from steepest.selection.method import Run
from steepest.selection.together import Together

NUMBER, SIZE, KEPT = 300, 8, 60
BATCHES = -(-NUMBER // SIZE)  # 38: 13, 13 and 12 for three processes
METHODS: dict[str, Any] = {
    "sage": st.SAGE(sketch_size=8),
    "sage_sketch": st.SAGE(sketch_size=8, consensus="sketch", keep_projections=True),
    "sage_reference": st.SAGE(sketch_size=8, consensus="reference", weights="class"),
    "el2n": st.EL2N(),
    "herding": st.Herding(),
    "grad_match": st.GradMatch(),
    "random": st.Random(),
}
# Batches of the first process after which it is interrupted: in the first pass, between two, in the second.
PLACES = {"pass 1": 4, "between": 13, "pass 2": 17}


class Watched(Dataset[tuple[Tensor, Tensor]]):
    """Points in three clusters, one by one; notes what was read."""

    def __init__(self, changed: int = -1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(NUMBER) % 3
        centres = 1.5 * torch.randn(3, 4, generator=generator)
        self.x = centres[self.y] + torch.randn(NUMBER, 4, generator=generator)
        if changed >= 0:
            self.x[changed] += 1
        self.read: list[int] = []

    def __len__(self) -> int:
        return NUMBER

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        return self.x[index], self.y[index]


class Flowing(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        data = Watched()
        self.pairs = list(zip(data.x, data.y, strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.pairs


def choose(name: str, folder: Path | None, data: Any = None, **options: Any) -> st.Selection:
    method = METHODS.get(name.removesuffix("_flowing"))
    if method is None:
        method = Joined()
    data = data if data is not None else Flowing() if name.endswith("_flowing") else Watched()
    options = {"method": method, "count": KEPT, "batch_size": SIZE, "checkpoint": folder} | options
    if getattr(method, "consensus", "") == "reference":
        options["reference"] = points(70)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return st.select_subset(net(), data, CROSS_ENTROPY, **options)


def words(selection: st.Selection) -> tuple[Any, ...]:
    arrays = (selection.indices, selection.scores, selection.weights, selection.labels)
    plain = tuple(None if array is None else array.tolist() for array in arrays)
    return (*plain, selection.fingerprint, selection.model_hash, selection.options, selection.report.numbers,
            selection.report.mean_cosine)  # fmt: skip


def stopped_after(batches: int, kind: type[BaseException] = KeyboardInterrupt) -> Callable[[Progress], None]:
    done = 0

    def progress(step: Progress) -> None:
        nonlocal done
        done += step.kind == "batch"
        if done == batches:
            raise kind

    return progress


def failed(work: Callable[[], Any]) -> str:
    try:
        work()
    except (SteepestError, OSError, ZeroDivisionError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@dataclass(frozen=True)
class Joined(Toy):
    """A method of somebody's own, which says how processes join what they learnt, and not how it is shared anew."""

    name: ClassVar[str] = "joined"

    def begin(self) -> Run:
        return JoinedRun(self)


class JoinedRun(ToyRun):
    def join(self, number: int, together: Together) -> None:
        if number < self.passes - 1:
            parts = together.told({name: part.double() for name, part in self.total.items()})
            self.total = {name: sum(part[name] for part in parts if part) for name in parts[0]}
        else:
            scores = torch.cat(self.scores) if self.scores else torch.zeros(0, dtype=torch.float64)
            self.scores = [together.in_order(scores.double())]

    def update(self, number: int, rows: Any) -> None:
        if number == self.passes - 1:
            self.scores.append(rows.jacobian.jvp({name: part.float() for name, part in self.total.items()}).double())
        else:
            part = rows.jacobian.vjp(torch.ones(len(rows.indices)))
            self.total = {name: self.total.get(name, 0) + value.double() for name, value in part.items()}


def begin(name: str, place: str, folder: Path, world: int) -> str:
    """Interrupts a selection in the same place of the data, however many share it."""
    at = PLACES[place] if world == 3 else round(PLACES[place] * BATCHES / 13 if world == 1 else PLACES[place] * 19 / 13)
    return failed(lambda: choose(name, folder, progress=stopped_after(at)))


def has(name: str, place: str) -> bool:
    method = METHODS.get(name.removesuffix("_flowing"))
    return place == "pass 1" or (name != "random" and (method is None or method.begin().passes > 1))


CASES = [(name, place) for name in METHODS for place in PLACES if has(name, place)]
CASES += [("sage_flowing", "pass 1"), ("sage_flowing", "pass 2"), ("el2n_flowing", "pass 1")]

SOME = [("sage", place) for place in PLACES] + [
    ("sage_flowing", "pass 1"),
    ("el2n", "pass 1"),
    ("grad_match", "pass 1"),
]


def copied(folder: Path, name: str, world: int, rank: int) -> Path:
    """The folder once more, made by the first process."""
    other = folder.with_name(f"{folder.name}.{name}")
    if rank == 0:
        shutil.copytree(folder, other)
    if world > 1:
        torch.distributed.barrier()
    return other


def three(rank: int, world: int, place: str, cases: list[tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, where in cases:
        folder = Path(place, f"{name} {where}")
        found[f"{name} {where} stopped"] = begin(name, where, folder, world)
        again = copied(folder, "again", world, rank)
        found[f"{name} {where}"] = words(choose(name, again))
        found[f"{name} whole"] = found.get(f"{name} whole") or words(choose(name, None))
        found[f"{name} {where} left"] = again.exists()
        found[f"{name} {where} of one"] = words(choose(name, Path(place, f"of one {name} {where}")))
    begin("joined", "pass 2", Path(place, "joined"), world)
    found["joined"] = words(choose("joined", copied(Path(place, "joined"), "again", world, rank)))
    return found


def two(rank: int, world: int, place: str, cases: list[tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, where in cases:
        folder = copied(Path(place, f"{name} {where}"), "two", world, rank)
        # Interrupted once more, and continued bit for bit.
        failed(lambda name=name, folder=folder: choose(name, folder, progress=stopped_after(3)))  # type: ignore[misc]
        once = copied(folder, "once", world, rank) if folder.exists() else None
        found[f"{name} {where}"] = words(choose(name, folder))
        if once is not None:
            found[f"{name} {where} once more"] = words(choose(name, once))
    said: list[str] = []
    keep = Keep(copied(Path(place, "joined"), "two", world, rank), say=said.append)
    found["joined"] = words(choose("joined", None, checkpoint=keep))
    found["said"] = said
    folder = Path(place, "back to one")
    failed(lambda: choose("sage", folder, progress=stopped_after(6)))
    found["another place"] = failed(lambda: choose("el2n", folder))
    return found


def alike(name: str, one: tuple[Any, ...], other: tuple[Any, ...], where: str) -> None:
    """The same selection, or with another sketch nearly the same."""
    assert one[3:7] == other[3:7], (name, where)  # labels, fingerprint, model, options
    if not name.startswith("sage"):
        assert one[:3] == other[:3], (name, where)
        return
    common = len(set(one[0]) & set(other[0])) / KEPT
    scores = torch.corrcoef(torch.tensor([one[1], other[1]]))[0, 1]
    assert float(scores) > 0.99, (name, where, float(scores))
    assert common >= 0.2, (name, where, common)  # `Strata` takes another neighbour wherever two scores change places


def top(name: str, one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
    """How many of the best samples of each class are the same."""
    if one[1] is None:
        return 1.0
    best = [set(torch.tensor(scores).topk(KEPT).indices.tolist()) for scores in (one[1], other[1])]
    return len(best[0] & best[1]) / KEPT


@pytest.mark.parametrize("cases", [SOME, pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_selection_is_continued_by_as_many_and_by_any_other_number(
    cases: list[tuple[str, str]], tmp_path: Path
) -> None:
    place = tmp_path / "kept"
    place.mkdir()
    for name, where in cases:  # begun by one process, for three
        assert begin(name, where, place / f"of one {name} {where}", 1) == "KeyboardInterrupt: "
    ranks = run_ranks(3, tmp_path / "three", three, str(place), cases)
    agreement = []
    for name, where in cases:
        key = f"{name} {where}"
        assert ranks[0][f"{key} stopped"] == "KeyboardInterrupt: "
        assert all(found[f"{key} stopped"].startswith("RankError: Rank 0 of 3 failed") for found in ranks[1:])
        for found in ranks:
            assert found[key] == found[f"{name} whole"] == ranks[0][key], key  # to the bit
            assert not found[f"{key} left"]
            assert found[f"{key} of one"] == ranks[0][f"{key} of one"], key
        one = words(choose(name, None))
        alike(name, one, ranks[0][f"{key} of one"], f"{where}, one to three")
        agreement.append(top(name, one, ranks[0][f"{key} of one"]))
        folder = copied(place / key, "one", 1, 0)
        back = words(choose(name, folder))
        assert not folder.exists()
        alike(name, one, back, f"{where}, three to one")
        agreement.append(top(name, one, back))
    pairs = run_ranks(2, tmp_path / "two", two, str(place), cases)
    for name, where in cases:
        key = f"{name} {where}"
        one = words(choose(name, None))
        assert pairs[0][key] == pairs[1][key], key
        alike(name, one, pairs[0][key], f"{where}, three to two")
        agreement.append(top(name, one, pairs[0][key]))
        if f"{key} once more" in pairs[0]:
            assert pairs[0][f"{key} once more"] == pairs[1][f"{key} once more"] == pairs[0][key], key
    assert min(agreement) >= 0.85, agreement
    assert pairs[0]["joined"][:3] == ranks[0]["joined"][:3]
    assert pairs[1]["said"] == []
    (said,) = pairs[0]["said"]
    assert "was written by another number of processes in the midst of pass 2" in said
    assert "this pass is begun anew" in said
    assert all("its method was 'sage' and is 'el2n'" in found["another place"] for found in pairs)
    alike("sage", words(choose("sage", None)), words(choose("sage", place / "back to one")), "two to one")


def halves(rank: int, world: int, place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    last = rank == world - 1
    folder = Path(place, "reads")
    begin("el2n", "pass 1", folder, world)
    found["missing"] = Path(place, "gone").exists()
    begin("sage", "pass 1", Path(place, "changed"), world)

    class Stopping(Watched):
        """The user presses Ctrl-C while the last process reads a sample."""

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 200 and not self.read.count(index):
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    found["ctrl-c"] = failed(lambda: choose("sage", Path(place, "ctrl-c"), Stopping() if last else Watched()))
    found["handler"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    found["after ctrl-c"] = words(choose("sage", Path(place, "ctrl-c")))
    found["whole"] = words(choose("sage", None))

    kept = Path(place, "full")
    begin("sage", "pass 1", kept, world)
    before = sorted(path.name for path in kept.iterdir())
    create = tensor_files._Files.create_stream

    def full(*_arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    if last:
        tensor_files._Files.create_stream = full  # type: ignore[method-assign]
    found["full"] = failed(lambda: choose("sage", kept, checkpoint_every=0.0))
    tensor_files._Files.create_stream = create  # type: ignore[method-assign]
    torch.distributed.barrier()
    found["kept"] = before == sorted(path.name for path in kept.iterdir())
    torch.distributed.barrier()
    found["after full"] = words(choose("sage", kept))
    found["error"] = failed(lambda: choose("sage", kept, progress=stopped_after(5, ZeroDivisionError)))
    found["nothing written"] = not kept.exists()
    found["often"] = failed(lambda: choose("sage", kept, checkpoint_every=0.0,
                                           progress=stopped_after(5, ZeroDivisionError)))  # fmt: skip
    found["written"] = len(complete_folders(kept))
    torch.distributed.barrier()
    if rank == 0:
        newest = complete_folders(kept)[-1]
        data = sorted(newest.glob("*.distcp"))[-1]
        data.write_bytes(data.read_bytes()[:-1])
    torch.distributed.barrier()
    said: list[str] = []
    keep = Keep(kept, say=said.append)
    found["after damage"] = words(choose("sage", None, checkpoint=keep))
    found["said"] = said
    return found


def test_what_goes_wrong_on_one_process_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "kept"
    place.mkdir()
    first, last = run_ranks(2, tmp_path / "ranks", halves, str(place))
    assert last["ctrl-c"] == "KeyboardInterrupt: "
    assert first["ctrl-c"].startswith("RankError: Rank 1 of 2 failed")
    assert "OutputError" in last["full"]
    assert "No space left on device" in last["full"]
    assert "No space left on device" in first["full"]
    for found in (first, last):
        assert found["handler"]
        assert found["after ctrl-c"] == found["whole"] == first["whole"]
        assert found["kept"]
        assert found["after full"] == found["whole"]
        assert found["nothing written"]
        assert found["written"] == 2
        assert found["after damage"] == found["whole"]
    (said,) = first["said"]
    assert "is damaged: it has" in said
    assert "going on from the one before" in said
    assert last["said"] == []

    # No sample is read twice in a pass; the first batch is looked at, to know the data by.
    state = kept_in(place / "reads")
    read = sorted(torch.cat([share["positions"] for share in state["shares"]]).tolist())
    assert len(read) == len(set(read)) == sum(share["batch"] for share in state["shares"]) * SIZE
    data = Watched()
    chosen = choose("el2n", place / "reads", data, review=False)
    assert torch.equal(chosen.indices, choose("el2n", None).indices)
    assert sorted(data.read) == sorted([*range(SIZE), *(set(range(NUMBER)) - set(read))])

    # Nor is a change of the data overlooked, in what others have read before.
    at = int(kept_in(place / "changed")["shares"][1]["positions"][0])
    with pytest.raises(SteepestError, match="the data changed between passes: pass 2"):
        choose("sage", place / "changed", Watched(changed=at))


def test_a_file_of_an_earlier_version_is_refused_by_all(tmp_path: Path) -> None:
    (tmp_path / "c.1-of-2").write_bytes(b"")
    with pytest.raises(SteepestError, match=r"c\.1-of-2 is a file, as earlier versions kept a selection under way"):
        choose("el2n", tmp_path / "c")

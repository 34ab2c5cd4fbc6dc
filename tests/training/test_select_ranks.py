"""`steepest select` on several processes: the selection of one, one voice, one set of files; stopped, it goes on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.optim import Adam

from ranks import run_ranks
from steepest.cli import run
from steepest.commands import select as command
from steepest.distributed import Ranks
from steepest.report.live import PlainListener
from steepest.selection import meetings
from steepest.selection.meetings import Meetings
from steepest.selection.passes import Passes
from steepest.selection.review import _Directions
from steepest.training.loop import Trainer

SELECT = ["select", "digits_wrong20", "--fraction", "0.2", "--batch-size", "60"]
EXACT = ("random", "el2n", "grand", "herding", "kcenter", "gradmatch")
SCORED = [*SELECT, "--warmup", "2"]
WHOLE = [*SCORED, "--check", "1", "--epochs", "2"]
FILES = {f"subset.{suffix}" for suffix in ("npz", "json", "html", "scorer.pt")}
CHECKED = FILES | {"subset.check.json"}

Said = tuple[int, str, str]


@contextmanager
def group_of_the_test(_device: str) -> Iterator[Ranks | None]:
    yield Ranks.current()


def call(*arguments: str, out: Path) -> Said:
    """Exit code, standard output and standard error of a command of this rank."""
    told, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(told), redirect_stderr(errors), patch.object(command, "process_group", group_of_the_test):
        code = run([*arguments, "-o", str(out / "subset.npz")])
    return code, told.getvalue(), errors.getvalue()


def arrays(folder: Path) -> dict[str, Any]:
    with np.load(folder / "subset.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name in ("indices", "scores", "weights", "labels")}


def same(a: Path, b: Path) -> bool:
    one, other = arrays(a), arrays(b)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def signalled(owner: Any, name: str, when: Callable[..., bool], number: int = signal.SIGTERM) -> Any:
    """A patch that sends this process a signal, once, where a method is called."""
    real, sent = getattr(owner, name), []

    def calling(self: Any, *given: Any, **named: Any) -> Any:
        if not sent and when(self, *given, **named):
            sent.append(1)
            os.kill(os.getpid(), number)
        return real(self, *given, **named)

    return patch.object(owner, name, calling)


def stops() -> dict[str, tuple[Any, list[str]]]:
    """Where a rank is told to stop, and options for it."""
    return {
        "scorer": (signalled(PlainListener, "epoch_done", lambda _s, _r, p: p.epoch == 1, signal.SIGINT), []),
        "trial": (signalled(Passes, "_take", lambda passes, *_: passes.alone), []),
        "pass 1": (signalled(Passes, "_take", lambda passes, *_: not passes.alone), []),
        "pass 2": (signalled(Passes, "_take", lambda passes, *_: passes.place == (1, 0) and not passes.alone), []),
        "choice": (signalled(Meetings, "waiting", lambda *_: True), ["--method", "kcenter"]),
        "review": (signalled(_Directions, "join", lambda *_: True), []),
        "draw": (signalled(Passes, "_take", lambda passes, *_: passes.alone and passes.place == (0, 2)), WHOLE[-4:]),
        "timing": (signalled(Adam, "step", lambda *_: True), ["--method", "random", "--optimizer", "adam"]),
        "check": (signalled(Trainer, "_set_lr", lambda t: t.subset is not None and t.progress.steps == 3), WHOLE[-4:]),
    }


def shared(rank: int, world: int, folder: str, weights: str) -> dict[str, Any]:
    os.environ["RANK"] = str(rank)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which who runs the tests may have switched off
    place, last = Path(folder), rank == world - 1
    found: dict[str, Any] = {}
    for method in (*EXACT, "sage"):
        found[method] = call(*SELECT, "--weights", weights, "--method", method, out=place / method)
    found["whole"] = call(*WHOLE, "--json", out=place / "whole")
    found["listed"] = sorted(path.name for path in (place / "whole").iterdir())
    found["again"] = call(*WHOLE, out=place / "whole")
    found["many"] = call(*SELECT[:2], "--count", "5000", out=place / "bad")
    found["uneven"] = call(*SELECT, "--batch-size", "61", out=place / "bad")
    found["one rank"] = call(*SELECT, "--weights", "gone.pt" if last else weights, out=place / "bad")
    found["elsewhere"] = call(*SELECT, "--weights", weights, out=place / (f"own{rank}" if last else "whole"))
    meetings._PULSE = 0.0  # the others hear from every step of a choice
    for name, (stop, options) in stops().items():
        with stop if last else nullcontext():
            found[f"stopped {name}"] = call(*SCORED, *options, out=place / name)
        found[f"left {name}"] = (place / name / "subset.html").exists()
        torch.distributed.barrier()
        found[f"resumed {name}"] = call(*SCORED, *options, out=place / name)
    with stops()["pass 2"][0] if last else nullcontext():
        found["for others"] = call(*SCORED, out=place / "others")
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer")
    arguments = ["train", "digits_wrong20", "-o", "adamw", "--epochs", "3", "--out", str(folder)]
    assert run(arguments) == 0
    return folder / "model.pt"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """The selections of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for method in (*EXACT, "sage"):
        assert call(*SELECT, "--weights", str(weights), "--method", method, out=folder / method)[0] == 0
    assert call(*WHOLE, "--json", out=folder / "whole")[0] == 0
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_share_a_selection_make_that_of_one(
    world: int, tmp_path: Path, weights: Path, alone: Path
) -> None:
    place = tmp_path / "shared"
    ranks = run_ranks(world, tmp_path / "ranks", shared, str(place), str(weights))
    first, *others = ranks
    for name, said in first.items():
        if isinstance(said, tuple):
            assert {rank[name][0] for rank in others} == {said[0]}, name  # one exit code
            assert all(not rank[name][1] and not rank[name][2] for rank in others), name  # and one voice

    for method in EXACT:
        assert first[method][0] == 0, first[method]
        assert same(place / method, alone / method), method
    kept, of_one = arrays(place / "sage")["indices"], arrays(alone / "sage")["indices"]
    assert len(np.intersect1d(kept, of_one)) >= 0.85 * len(of_one)  # another sketch, of the same bound
    check_whole(first, place / "whole", alone / "whole", world)
    check_refusals(first, world)
    check_stops(first, place, world)
    check_another_number(place / "others", place / "whole")


def check_whole(first: dict[str, Any], place: Path, alone: Path, world: int) -> None:
    code, told, errors = first["whole"]
    assert code == 0, errors
    data = json.loads(told)
    assert data["processes"] == world
    assert data["scorer"]["seconds"] > 0
    assert errors.count("epoch   1/2") == errors.count("pass 2 of 2") == 1
    one = json.loads((alone / "subset.check.json").read_text())["runs"]
    for mine, its in zip(data["check"]["runs"], one, strict=True):
        # Everything and the random subset are the same data; so are, but for the scorer's rounding, the subsets.
        tolerance = 0.05 if mine["arm"] == "subset" else 1e-4
        assert mine["val_loss"] == pytest.approx(its["val_loss"], rel=tolerance), mine
    states = [torch.load(folder / "subset.scorer.pt", weights_only=True)["state_dict"] for folder in (place, alone)]
    for mine_, its_ in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(mine_, its_, rtol=1e-4, atol=1e-5)
    assert set(first["listed"]) == CHECKED
    page = (place / "subset.html").read_text(encoding="utf-8")
    assert f"{world} processes; the first of them gave" in page
    assert "Did it pay?" in page


def check_refusals(first: dict[str, Any], world: int) -> None:
    for name, message in {
        "many": "has 1,079 training samples",
        "uneven": f"a batch of 61 samples cannot be shared evenly by {world} processes",
        "one rank": f"Rank {world - 1} of {world} failed, so that none goes on. It said: SelectionError: there is no",
        "elsewhere": "is there for some processes and not for others",
    }.items():
        code, told, errors = first[name]
        assert (code, told, errors.count("\n")) == (2, "", 1), (name, errors)
        assert message in errors, errors
    code, _, errors = first["again"]
    assert code == 0, errors  # the check is there already: nothing is trained anew
    assert "seed" not in errors, errors
    assert "going on with the selection" in errors


def check_stops(first: dict[str, Any], place: Path, world: int) -> None:
    for name in stops():
        code, told, errors = first[f"stopped {name}"]
        assert (code, told) == (130, ""), (name, code, told, errors)
        assert errors.count("interrupted; the same command goes on from here") == 1, (name, errors)
        assert not first[f"left {name}"], name
        code, told, errors = first[f"resumed {name}"]
        assert code == 0, (name, errors)
        files = {path.name for path in (place / name).iterdir()}
        wanted = CHECKED if name in ("draw", "check") else FILES
        assert files == wanted - ({"subset.scorer.pt"} if name == "timing" else set()), name
        if name == "timing":  # the method needs no scorer
            continue
        if name != "choice":  # which is another method's
            assert same(place / name, place / "whole"), name
        assert ("training the scorer" in errors) == (name in ("scorer", "trial")), (name, errors)
    assert "pass 2 of 2" in first["resumed pass 1"][2]
    assert "pass 1 of 2" not in first["resumed pass 2"][2]
    assert "pass" not in first["resumed choice"][2], first["resumed choice"][2]


def check_another_number(folder: Path, whole: Path) -> None:
    """What several have begun is continued by one, which reads nothing twice."""
    assert sorted(path.name for path in folder.iterdir()) == ["subset.checkpoint", "subset.scorer.pt"]
    code, _, errors = call(*SCORED, "--seed", "1", out=folder)
    assert code == 2
    assert "whose scorer is not the one that these settings make" in errors
    code, _, errors = call(*SCORED, out=folder)
    assert code == 0, errors
    assert "pass 2 of 2" in errors
    assert "pass 1 of 2" not in errors
    assert {path.name for path in folder.iterdir()} == FILES
    kept, of_many = arrays(folder)["indices"], arrays(whole)["indices"]
    assert len(np.intersect1d(kept, of_many)) >= 0.85 * len(of_many)
    assert call(*SCORED, "--fresh", out=folder)[0] == 0


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "steepest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STEEPEST_TIMEOUT": "30"}
    return subprocess.Popen(
        [*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_under_torchrun_speaks_once_and_survives_signals(tmp_path: Path) -> None:
    bad = torchrun(*SELECT, "--method", "sago", "-o", str(tmp_path / "bad.npz"))
    _, errors = bad.communicate(timeout=120)
    assert bad.returncode != 0
    assert errors.count("did you mean 'sage'?") == 1, errors
    bad = torchrun(*SELECT, "--count", "5", "-o", str(tmp_path / "bad.npz"))
    _, errors = bad.communicate(timeout=120)
    assert errors.count("both of them given") == 1, errors

    long = [*SELECT, "--warmup", "60", "--checkpoint-every", "0.3", "--check", "1", "--epochs", "30"]
    whole = torchrun(*long, "-o", str(tmp_path / "whole" / "subset.npz"))
    out, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    assert out.count("sage kept 216 of 1,079") == 1
    folder = tmp_path / "parts"
    for pattern, to_one in (("subset.scorer.checkpoints/step*", True), ("subset.scorer.pt", False), ("*.npz", True)):
        process = torchrun(*long, "-o", str(folder / "subset.npz"))
        wait_for(pattern, folder, process)
        if to_one:
            os.kill(workers(process.pid)[-1], signal.SIGTERM)
        else:  # a scheduler's, to torchrun, which passes it on
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0, pattern
        assert errors.count("interrupted; the same command goes on from here") == 1, (pattern, errors)
        assert not (folder / "subset.html").exists()
    process = torchrun(*long, "-o", str(folder / "subset.npz"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert same(folder, tmp_path / "whole")
    assert {path.name for path in folder.iterdir()} == CHECKED

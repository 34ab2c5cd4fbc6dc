"""What becomes of checkpoints on disk: damage, forgeries, kills in the midst of a save, and how many stay."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from made_checkpoints import forge, newest, reseal, tensors_of
from steepest.cli import run
from steepest.distributed.checkpoint.folders import complete_folders
from steepest.distributed.checkpoint.manifest import read_manifest
from steepest.distributed.checkpoint.together import choose
from steepest.training.checkpoint import Keeping, forget, saved_settings
from steepest.training.checkpoints.old import refuse_old_files
from steepest.training.errors import CheckpointError, DamagedCheckpointError
from steepest.training.execute import execute
from steepest.training.records import RunRecord
from steepest.training.spec import RunSpec

# 8 steps in each of 2 epochs.
SPEC = RunSpec("diabetes", "adam", {"lr": 0.01}, epochs=2, batch_size=32)


def keeping(folder: Path, steps: int = 10**9, every: float = 1e9, keep: int = 2) -> Keeping:
    left = iter(range(steps))
    return Keeping(
        folder / "checkpoints", folder / "model.pt", every=every, keep=keep, stop=lambda: next(left, None) is None
    )


def interrupted(folder: Path, steps: int, keep: int = 2) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(SPEC, keeping=keeping(folder, steps, every=0.0, keep=keep))


def losses(record: RunRecord) -> tuple[object, ...]:
    assert record.status == "finished", record.error
    return record.final, [(point.steps, point.train_loss, point.val_loss) for point in record.history]


def names(folder: Path) -> list[str]:
    return [path.name for path in complete_folders(folder / "checkpoints")]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("kind", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, empty, flip, remove, make_folder])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage: Callable[[Path], None], kind: str, tmp_path: Path
) -> None:
    whole = execute(SPEC)
    interrupted(tmp_path, 11)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    before, last = complete_folders(tmp_path / "checkpoints")
    damage(last / kind)
    assert saved_settings(tmp_path / "checkpoints") == "{}"
    said: list[str] = []
    resumed = execute(SPEC, keeping=replace(keeping(tmp_path), say=said.append))
    assert losses(resumed) == losses(whole)
    (line,) = said
    assert line.startswith(f"{last / kind} ")
    assert line.endswith(f": going on from the one before, {before}")
    damage(before / kind)
    with pytest.raises(DamagedCheckpointError, match=r"0011.*; .*0010.*; begin anew with --fresh"):
        execute(SPEC, keeping=keeping(tmp_path))
    if kind == "manifest.json":
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json.*--fresh"):
            saved_settings(tmp_path / "checkpoints")
    forget(tmp_path / "checkpoints")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    interrupted(tmp_path, 3)
    step, moments = newest(tmp_path), random.Random(0)
    for name in ("manifest.json", ".metadata", "__0_0.distcp"):
        content = (step / name).read_bytes()
        for place in moments.sample(range(len(content)), 60):
            (step / name).write_bytes(
                content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
            )
            said: list[str] = []
            chosen = choose(tmp_path / "checkpoints", None, said.append)
            assert chosen is not None
            assert chosen[0].name == "step-00000002", (name, place)
            assert name in said[0]
        (step / name).write_bytes(content)
    chosen = choose(tmp_path / "checkpoints", None, said.append)
    assert chosen is not None
    assert chosen[0] == step


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_what_would_run_code_is_refused_though_its_digests_are_right(tmp_path: Path) -> None:
    interrupted(tmp_path, 3, keep=1)
    step, mark = newest(tmp_path), tmp_path / "mark"
    good = (step / ".metadata").read_bytes()
    (step / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    reseal(step)
    with pytest.raises(
        DamagedCheckpointError, match=r"\.metadata cannot be read \(it asks for \w+\.mkdir, which no list"
    ):
        execute(SPEC, keeping=keeping(tmp_path))
    assert not mark.exists()
    (step / ".metadata").write_bytes(pickle.dumps(Evil(mark), protocol=0))
    reseal(step)
    with pytest.raises(DamagedCheckpointError, match=r"it asks for \w+\.mkdir"):
        execute(SPEC, keeping=keeping(tmp_path))
    assert not mark.exists()
    (step / ".metadata").write_bytes(good.replace(b"__0_0.distcp", b"../../a.dist"))
    reseal(step)
    with pytest.raises(DamagedCheckpointError, match=r"names a file outside of its folder, \.\./\.\./a\.dist"):
        execute(SPEC, keeping=keeping(tmp_path))
    (step / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    reseal(step)
    with pytest.raises(DamagedCheckpointError, match="it holds a dict and no list of tensors"):
        execute(SPEC, keeping=keeping(tmp_path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_things_that_are_no_tensors_are_not_unpickled(tmp_path: Path) -> None:
    interrupted(tmp_path, 3, keep=1)
    step = newest(tmp_path)
    tensors = tensors_of(step)
    for path in step.iterdir():
        if path.name != "manifest.json":
            path.unlink()
    save({**tensors, "optimizer.state.0.weight.step": Evil(tmp_path / "mark")}, storage_writer=FileSystemWriter(step))
    reseal(step)
    with pytest.raises(DamagedCheckpointError, match=r"asks for .*(PosixPath|WindowsPath|BytesStorageMetadata)"):
        execute(SPEC, keeping=keeping(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_a_list_of_tensors_of_another_shape_is_damage(tmp_path: Path) -> None:
    interrupted(tmp_path, 3, keep=1)
    step = newest(tmp_path)
    manifest = (step / "manifest.json").read_bytes()
    forge(step, lambda tensors: tensors.update({"model.0.weight": torch.zeros(3, 3)}))
    forged = read_manifest(step)["files"]
    (step / "manifest.json").write_bytes(manifest)
    assert read_manifest(step)["files"] != forged
    reseal(step)
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata does not fit the manifest in model\.0\.weight"):
        execute(SPEC, keeping=keeping(tmp_path))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_stay(keep: int, tmp_path: Path) -> None:
    interrupted(tmp_path, 5, keep=keep)
    assert names(tmp_path) == [f"step-{steps:08d}" for steps in range(6)][-keep:]
    # What was damaged and passed over does not count among those that are kept.
    if keep == 3:
        flip(newest(tmp_path) / ".metadata")
        interrupted(tmp_path, 0, keep=keep)
        assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000004.1"]
    whole = execute(SPEC)
    assert losses(execute(SPEC, keeping=keeping(tmp_path, keep=keep))) == losses(whole)


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".step-00000007.0badcafe.tmp"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(b"half")
    assert losses(execute(SPEC, keeping=keeping(tmp_path, every=0.0))) == losses(execute(SPEC))
    assert not leftover.exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_checkpoint_of_an_earlier_version_is_refused_and_thrown_away_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        torch.save({"format": 3}, tmp_path / name)
    command = ["train", "diabetes", "-o", "adam", "--epochs", "1", "--out", str(tmp_path)]
    for more in ([], ["--resume"]):
        assert run([*command, *more]) == 2
        shown = capsys.readouterr().err
        assert f"{tmp_path / 'checkpoint.pt'} is a checkpoint of an earlier version" in shown
        assert "--fresh" in shown
    assert run(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert run([*command, "--fresh"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "records", "report.html"]
    (tmp_path / "own").write_bytes(b"")
    with pytest.raises(CheckpointError, match="earlier version"):
        refuse_old_files(tmp_path / "own")


# In one process that forks: its children die at every call that changes files, and then at random moments.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from steepest.distributed.checkpoint.manifest import FORMAT
from steepest.distributed.checkpoint.together import choose, write_checkpoint
from steepest.distributed.checkpoint.tree import blank, leaves, pack
from steepest.distributed.checkpoint.tensors import read_tensors

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def write(steps, size):
    tensors = {}
    state = {str(i): torch.full((size,), float(steps)) for i in range(4)}
    content = {"format": FORMAT, "steps": steps, "state": pack({"state": state, "steps": steps}, "all", tensors)}
    write_checkpoint(folder, steps, 2, tensors, content, None)

def last():
    said = []
    found = choose(folder, None, said.append)
    assert not said, said
    if found is None:
        return -1
    path, content = found
    tensors = {leaf["key"]: blank(leaf) for leaf in leaves(content["state"])}
    read_tensors(path, tensors, None)
    assert len(tensors) == 4
    for tensor in tensors.values():
        assert (tensor == content["steps"]).all(), path
    return content["steps"]

def child(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid

calls, kills = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.scandir"}, 0

def dying(number):
    seen = []
    def hook(name, args):
        if name in calls:
            seen.append(name)
            if len(seen) > number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

reached, number = last(), 0
while True:
    goal = reached + 1
    def work():
        dying(number)
        write(goal, 100)
    _, status = os.waitpid(child(work), 0)
    found = last()
    assert found in (reached, goal), (found, reached)
    reached = found
    assert os.WIFSIGNALED(status) or (os.WEXITSTATUS(status) == 0 and found == goal), status
    if not os.WIFSIGNALED(status):
        break
    kills, number = kills + 1, number + 1

moments, began = random.Random(0), time.monotonic()
for _ in range(5):
    reached += 1
    write(reached, 200_000)
seconds, before = (time.monotonic() - began) / 5, reached
for _ in range(20):
    def work():
        for steps in range(reached + 1, reached + 1000):
            write(steps, 200_000)
    pid = child(work)
    time.sleep(moments.uniform(0.0, 4 * seconds))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = last()
    assert found >= reached, (found, reached)
    reached = found
write(reached + 1, 100)
assert not list(folder.glob(".*")), list(folder.glob(".*"))
print(number, reached - before)
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 of POSIX")
def test_a_save_that_is_killed_anywhere_leaves_what_was_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    points, reached = map(int, done.stdout.split())
    assert points > 15  # moments within one save
    assert reached >= 3  # saves that were complete before the kill

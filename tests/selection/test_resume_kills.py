"""A selection that is killed at any moment of a save goes on from a whole checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In one process that forks: its children die at every call that changes files.
KILLED = """
import os, shutil, signal, sys, warnings
from pathlib import Path
import torch
import steepest as st
from selecting import CROSS_ENTROPY, Toy, kept_in, net, points
from steepest.distributed.checkpoint.folders import complete_folders

warnings.simplefilter("error")  # of a damaged checkpoint
torch.set_num_threads(1)
place = Path(sys.argv[1])
calls = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.scandir"}

def choose(folder, stop=None):
    done = []
    def progress(step):
        done.append(step)
        if len(done) == stop:
            raise KeyboardInterrupt
    return st.select_subset(net(), points(), CROSS_ENTROPY, fraction=0.2, method=Toy(), batch_size=8, review=False,
                            checkpoint=folder, checkpoint_every=0.0, progress=progress)

def dying(number):
    seen = []
    def hook(name, args):
        if name in calls:
            seen.append(name)
            if len(seen) > number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def killed(folder, number):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            dying(number)
            choose(folder)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)

whole, moments, reached = choose(None), 0, set()
for stop, every in ((5, 1), (13, 1)):
    base = place / f"base {stop}"
    try:
        choose(base, stop)
    except KeyboardInterrupt:
        pass
    assert len(complete_folders(base)) == 2
    number = 0
    while number < 40 or stop == 13:
        folder = place / f"{stop} {number}"
        shutil.copytree(base, folder)
        alive = not killed(folder, number)
        if complete_folders(folder):
            state = kept_in(folder)
            reached.add((state["common"]["number"], state["shares"][0]["batch"]))
        found = choose(folder)
        assert torch.equal(found.indices, whole.indices) and torch.equal(found.scores, whole.scores), number
        assert not folder.exists()
        if alive:
            break
        number, moments = number + 1, moments + 1
print(moments, len(reached))
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 of POSIX")
def test_a_selection_that_is_killed_anywhere_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    moments, reached = map(int, done.stdout.split())
    assert moments > 70  # in several saves, and in the removal when all is done
    assert reached >= 4

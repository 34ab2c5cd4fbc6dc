"""What choosing costs: time over one epoch of training, and memory from 6,000 samples to 60,000.

    python benchmarks/select_cost.py [--quick]

Time: an epoch of SGD with momentum on the same model, data and batch size, and SAGE in the scope of the last layer and
of all layers, in turn in one process; `over_epoch` is the median of the pairwise ratios. Two forward passes are about
0.67 of an epoch. A sketch of l rows takes some 8 l D operations per sample, whatever the model costs: with all D
parameters of an MLP, an epoch of which takes 6 D, that is 85 epochs at l = 64, and it is left out here.

Memory: the peak of the resident memory of a process of its own for each number of samples, which are made when they are
read, so that the data takes none.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import steepest as st
from records import write
from steepest.training.data import Shape
from steepest.training.models import cnn, mlp, resnet

BATCH = 256
LOSS = partial(F.cross_entropy, reduction="none")
IMAGE = Shape((3, 32, 32), 10)
# model, shape of a sample, samples, scopes; in an MLP all layers take minutes (see the docstring)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, tuple[str, ...]]] = {
    "MLP 784-256-256-10": (lambda: mlp(784, 256, 256, 10), (784,), 10_240, ("last",)),
    "MLP 784-1024-1024-10": (lambda: mlp(784, 1024, 1024, 10), (784,), 5_120, ("last",)),
    "CNN 16-32-64, 32 x 32": (lambda: cnn(16, 32, 64)(IMAGE), IMAGE.inputs, 5_120, ("last", "all")),
    "ResNet 8-16-32, 32 x 32": (lambda: resnet(8, 16, 32)(IMAGE), IMAGE.inputs, 2_560, ("last", "all")),
}
SAMPLES = (6_000, 60_000)
LONG = 20.0  # seconds from which one round is enough


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    for inputs, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cost(rounds: int, *, short: bool) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, (build, shape, whole, scopes) in CASES.items():
        torch.manual_seed(0)
        number = whole // 4 if short else whole
        model, x, y = build(), torch.randn(number, *shape), torch.randint(10, (number,))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        for scope in scopes:
            method = st.SAGE(scope=scope, class_policy="balanced")
            choose = partial(
                st.select_subset, model, (x, y), LOSS, fraction=0.1, method=method, batch_size=BATCH, review=False
            )
            train = partial(epoch, model, optimizer, x, y)
            train()
            again = rounds if timed(choose) < LONG else 1
            pairs = [(timed(choose), timed(train)) for _ in range(again)]
            rows.append({
                "model": name,
                "scope": scope,
                "samples": number,
                "epoch_seconds": statistics.median(t for _, t in pairs),
                "select_seconds": statistics.median(s for s, _ in pairs),
                "over_epoch": statistics.median(s / t for s, t in pairs),
                "limit": 0.8 if scope == "last" else 2.6,
            })
            print(rows[-1], flush=True)
    return rows


class Made(Dataset[tuple[Tensor, int]]):
    """Samples that are made when they are asked for."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(784, generator=generator), index % 10


def peak(number: int, scope: str) -> None:
    """Print the peak of this process's memory in MiB."""
    torch.manual_seed(0)
    model = mlp(784, 64, 10)
    st.select_subset(model, Made(number), LOSS, fraction=0.1, method=st.SAGE(scope=scope), review=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(numbers: tuple[int, ...]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for scope in ("last", "all"):
        found = []
        for number in numbers:
            done = subprocess.run(
                [sys.executable, __file__, "--peak", str(number), scope], stdout=subprocess.PIPE, check=True, text=True
            )
            found.append(float(done.stdout))
        row = {f"N={number}": mib for number, mib in zip(numbers, found, strict=True)}
        rows.append({
            "model": "MLP 784-64-10",
            "scope": scope,
            **row,
            "growth": found[-1] / found[0] - 1,
            "limit": 0.05,
        })
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a quarter of the data, one round; no record")
    parser.add_argument("--peak", nargs=2, metavar=("SAMPLES", "SCOPE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        peak(int(given.peak[0]), given.peak[1])
        return
    times = cost(1 if given.quick else 7, short=given.quick)
    sizes = memory((600, 6_000) if given.quick else SAMPLES)
    if not given.quick:
        write("select_cost", times)
        write("select_memory", sizes)


if __name__ == "__main__":
    main()

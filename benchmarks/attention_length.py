"""Softmax-free attention against softmax attention over the number of tokens: time in turn, and peak memory.

    python benchmarks/attention_length.py [--threads 1] [--quick]

Forward and backward of `steepest.nn.functional.softmax_free_attention` with 49 averaged landmarks, by Cholesky and by
Newton's iteration, and of torch's `scaled_dot_product_attention`, for tensors [batch, heads, n, 32]; both work on
queries and values (softmax attention on keys too). `over_sdpa` is the median of the pairwise ratios. `exponent` is the
slope of log time over log n between 1,024 and 16,384 tokens. Memory is the peak of a process of its own beyond what it
had after a pass over 64 tokens, inputs and their gradients included (Linux).
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import steepest as st
from records import write

BATCH, HEADS, WIDTH, LANDMARKS = 2, 4, 32, 49
LENGTHS = (196, 392, 784, 1_024, 2_048, 4_096, 8_192, 16_384)
MEMORY_LENGTHS = (1_024, 4_096, 16_384)
SLOPE = (1_024, 16_384)
LONG = 5.0  # seconds of one pass from which one round is enough

soft = partial(st.nn.functional.softmax_free_attention, landmarks=LANDMARKS)
Pass = Callable[[], Tensor]


def passes(length: int, *, with_keys: bool = True) -> tuple[dict[str, Pass], Tensor]:
    """What is compared, on the same numbers, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    make = lambda: torch.randn(BATCH, HEADS, length, WIDTH, generator=generator)  # noqa: E731
    query, value = make().requires_grad_(), make().requires_grad_()
    key = make().requires_grad_() if with_keys else query
    return {
        "soft": lambda: soft(query, value),
        "newton": lambda: soft(query, value, inverse=st.nn.NewtonInverse()),
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
    }, make()


def timed(work: Pass, grad: Tensor) -> tuple[float, float]:
    """Seconds of forward and backward."""
    start = time.perf_counter()
    out = work()
    middle = time.perf_counter()
    out.backward(grad)
    return middle - start, time.perf_counter() - middle


def measure(length: int, rounds: int) -> dict[str, float]:
    work, grad = passes(length)
    first = {name: sum(timed(call, grad)) for name, call in work.items()}
    rounds = 1 if max(first.values()) > LONG else rounds
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            found[name].append(timed(call, grad))
    both = {name: [forward + backward for forward, backward in pairs] for name, pairs in found.items()}
    return {
        "n": length,
        "soft_ms": 1e3 * statistics.median(both["soft"]),
        "soft_forward_ms": 1e3 * statistics.median(forward for forward, _ in found["soft"]),
        "newton_ms": 1e3 * statistics.median(both["newton"]),
        "sdpa_ms": 1e3 * statistics.median(both["sdpa"]),
        "over_sdpa": statistics.median(a / b for a, b in zip(both["soft"], both["sdpa"], strict=True)),
        "newton_over_sdpa": statistics.median(a / b for a, b in zip(both["newton"], both["sdpa"], strict=True)),
    }


def exponent(rows: list[dict[str, float]], column: str) -> float:
    """Slope of the least-squares line through the logarithms."""
    part = [row for row in rows if SLOPE[0] <= row["n"] <= SLOPE[1]]
    return statistics.linear_regression([math.log(r["n"]) for r in part], [math.log(r[column]) for r in part]).slope


def peak(name: str, length: int) -> None:
    """Print the MiB that this process took at most, beyond what it had after a pass over 64 tokens (Linux)."""
    with_keys = name == "sdpa"
    work, grad = passes(64, with_keys=with_keys)
    timed(work[name], grad)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the start
    before = resident("VmRSS")
    work, grad = passes(length, with_keys=with_keys)
    timed(work[name], grad)
    print(resident("VmHWM") - before)


def resident(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


def memory(lengths: tuple[int, ...]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for length in lengths:
        found = {}
        for name in ("soft", "sdpa"):
            command = [sys.executable, __file__, "--peak", name, str(length)]
            found[name] = float(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        rows.append({"n": length, "soft_mib": found["soft"], "sdpa_mib": found["sdpa"]})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="up to 1,024 tokens, few rounds; no record")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        peak(given.peak[0], int(given.peak[1]))
        return
    rows: list[dict[str, float]] = []
    for length in LENGTHS[:4] if given.quick else LENGTHS:
        rows.append(measure(length, 3 if given.quick else 15))
        print({key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    taken = memory(MEMORY_LENGTHS[:1] if given.quick else MEMORY_LENGTHS)
    if given.quick:
        return
    slopes = {f"{column}_exponent": exponent(rows, f"{column}_ms") for column in ("soft", "soft_forward", "sdpa")}
    write("attention_length", [{"threads": given.threads, **row} for row in rows])
    write("attention_memory", taken)
    write("attention_exponent", [{"threads": given.threads, **slopes}])


if __name__ == "__main__":
    main()

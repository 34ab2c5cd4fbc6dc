"""One shrink of a Frequent Directions buffer: through its Gram, against the SVD that the published algorithm takes.

    python benchmarks/fd_shrink.py [--threads 1] [--quick]

A full buffer of 128 rows of 500,000 columns is brought down to 64. Both ways in turn in one process; `speedup` is of
the medians. `bound` is |A^T A - B^T B|_2 over the delta that the shrink took: at most 1 up to rounding.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import steepest as st
from records import write


def by_gram(rows: Tensor, size: int) -> tuple[Callable[[], None], Callable[[], tuple[Tensor, float]]]:
    """What is timed, and its result: B and delta."""
    sketch = st.FrequentDirections(size)
    sketch.insert(rows)
    return sketch.compress, lambda: (sketch.sketch(), sketch.certificate)


def by_svd(rows: Tensor, size: int) -> tuple[Callable[[], None], Callable[[], tuple[Tensor, float]]]:
    buffer, taken = rows.clone(), []

    def shrink() -> None:
        _, values, right = torch.linalg.svd(buffer, full_matrices=False)
        delta = values[size].square()
        scale = (values[:size].square() - delta).clamp(min=0).sqrt()
        torch.mul(right[:size], scale.unsqueeze(1), out=buffer[:size])
        taken.append(float(delta))

    return shrink, lambda: (buffer[:size], taken[0])


def left_out(rows: Tensor, sketch: Tensor) -> float:
    """``|A^T A - B^T B|_2`` from the rows alone: the eigenvalues of ``M diag(1, -1)`` with M the Gram of both."""
    both = torch.cat([rows, sketch]).double()
    signs = torch.ones(len(both), dtype=torch.float64)
    signs[len(rows) :] = -1
    values = torch.linalg.eigvals(both @ both.T * signs)
    return float(values.real.abs().max())


def measure(columns: int, size: int, repetitions: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 2 * size + 1).float().rsqrt().unsqueeze(1)
    rows = torch.randn(2 * size, columns, generator=generator) * scale
    ways = {"gram": by_gram, "svd": by_svd}
    times: dict[str, list[float]] = {name: [] for name in ways}
    bounds: dict[str, float] = {}
    for _ in range(repetitions):
        for name, way in ways.items():
            shrink, result = way(rows, size)
            start = time.perf_counter()
            shrink()
            times[name].append(time.perf_counter() - start)
            if name not in bounds:
                sketch, delta = result()
                bounds[name] = left_out(rows, sketch) / delta
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return [
        {
            "way": name,
            "columns": columns,
            "sketch_size": size,
            "repetitions": repetitions,
            "seconds": seconds,
            "speedup": medians["svd"] / seconds,
            "bound": bounds[name],
        }
        for name, seconds in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the columns, two repetitions; no record")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = measure(5_000, 64, 2) if given.quick else measure(500_000, 64, 5)
    if given.quick:
        for row in rows:
            print({name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()})
    else:
        write("fd_shrink", [{"threads": given.threads, **row} for row in rows])


if __name__ == "__main__":
    main()

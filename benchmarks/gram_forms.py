"""The two exact forms of a layer's Gram, timed in turn: what the engine's cost model chooses, and what was faster.

    python benchmarks/gram_forms.py

`regret` is the time of the chosen form over that of the faster one.
"""

import statistics
import time
from collections.abc import Callable

import torch

from records import write
from steepest.engine.linear import LinearRecord, factorized_is_cheaper

# rows, shared, features in, features out
CASES = [
    (rows, shared, width_in, width_out)
    for rows in (16, 64)
    for shared in (2, 4, 8, 16, 64)
    for width_in, width_out in ((32, 32), (128, 128), (512, 512), (64, 1024))
]
BUDGET = 1 << 28


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    rows = []
    for batch, shared, width_in, width_out in CASES:
        torch.manual_seed(0)
        record = LinearRecord(
            "weight", None, torch.randn(batch, shared, width_in), torch.randn(batch, shared, width_out)
        )
        forms = (record._factorized, record._materialized)
        for form in forms:
            form(torch.float64, BUDGET)
        pairs = [[timed(lambda f=form: f(torch.float64, BUDGET)) for form in forms] for _ in range(9)]
        factorized, materialized = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        chosen = factorized_is_cheaper(batch, shared, width_in, width_out)
        rows.append(
            {
                "rows": batch, "shared": shared, "in": width_in, "out": width_out,
                "factorized_ms": 1e3 * factorized, "materialized_ms": 1e3 * materialized,
                "chosen": "factorized" if chosen else "materialized",
                "regret": (factorized if chosen else materialized) / min(factorized, materialized),
            }
        )  # fmt: skip
    write("gram_forms", rows)
    print(
        f"median regret {statistics.median(r['regret'] for r in rows):.2f}, worst {max(r['regret'] for r in rows):.2f}"
    )


if __name__ == "__main__":
    main()

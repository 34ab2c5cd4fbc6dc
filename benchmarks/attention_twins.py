"""A small vision transformer with softmax-free attention and its softmax twin: accuracy at equal steps, time of a step.

    STEEPEST_DATA=... python benchmarks/attention_twins.py [--seeds 0 1 2] [--out runs/twins] [--quick]

Accuracy: on CIFAR-10 and Fashion-MNIST, AdamW with a rate that falls to 0, the same batches in the same order for all.
Either twin takes the rate of three that has the lowest validation loss on a seed of its own, then all seeds are run
with it and tested once. Variants of the softmax-free one, on CIFAR-10 only, take its rate: without symmetric
normalisation, with a fixed bandwidth, with other ridges. What is on disk is not repeated.

Time: one training step of the vision transformer (64 tokens) and of the transformers on single pixels (784 and 3,072
tokens), softmax-free over softmax, in turn in one process.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steepest as st
from records import write
from steepest._files import write_atomically
from steepest.nn.transformer import Attention
from steepest.training.data import Shape, Split
from steepest.training.models import pixels, vit
from steepest.training.source import Source, resolve

Row = dict[str, Any]
TASKS = ("cifar10", "fashion_mnist")
WIDTH, DEPTH, BATCH, STEPS = 64, 3, 64, 1000
RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEED = 1000


def changed(change: Callable[[st.nn.SoftmaxFreeAttention], None]) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, st.nn.SoftmaxFreeAttention):
                change(module)

    return apply


def ridge(size: float) -> Callable[[nn.Module], None]:
    return changed(lambda module: setattr(module, "inverse", st.nn.CholeskyInverse(size)))


TWINS = ("softmax", "softmax-free")
ARMS: dict[str, tuple[Attention, Callable[[nn.Module], None]]] = {
    "softmax": ("softmax", lambda _: None),
    "softmax-free": ("softmax_free", lambda _: None),
    "not normalised": ("softmax_free", changed(lambda module: setattr(module, "normalize", False))),
    "fixed bandwidth": ("softmax_free", changed(lambda module: setattr(module, "log_bandwidth", None))),
    "ridge 0.1": ("softmax_free", ridge(1e-1)),
    "ridge 0.001": ("softmax_free", ridge(1e-3)),
}


def run(task: str, arm: str, lr: float, seed: int, steps: int) -> Row:
    splits = resolve(Source(task)).load(0)
    train = splits.train
    torch.manual_seed(seed)
    attention, change = ARMS[arm]
    model = vit(WIDTH, DEPTH, attention=attention)(splits.shape)
    change(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(steps):
        index = torch.randint(len(train), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(train.inputs[index]), train.targets[index]).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    val_loss, _ = test(model, splits.val)
    loss, accuracy = test(model, splits.test)
    return {
        "task": task,
        "arm": arm,
        "lr": lr,
        "seed": seed,
        "val_loss": val_loss,
        "test_loss": loss,
        "accuracy": accuracy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
    }


@torch.no_grad()
def test(model: nn.Module, part: Split) -> tuple[float, float]:
    outputs = torch.cat([model(x) for x in part.inputs.split(500)])
    right = (outputs.argmax(1) == part.targets).float().mean()
    return float(F.cross_entropy(outputs, part.targets)), float(right)


def kept(path: Path, work: Callable[[], Row]) -> Row:
    if not path.exists():
        write_atomically(path, json.dumps(work()))
    row: Row = json.loads(path.read_text())
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def study(seeds: list[int], out: Path, steps: int) -> list[Row]:
    table: list[Row] = []
    for task in TASKS:
        lr = RATES[0]
        for arm in ARMS if task == TASKS[0] else TWINS:
            place = lambda lr, seed, task=task, arm=arm: (  # noqa: E731
                out / f"{task}-{arm.replace(' ', '-')}-{lr:g}-{seed}-{steps}.json"
            )
            do = partial(run, task, arm, steps=steps)
            if arm in TWINS:
                tuned = [kept(place(lr, TUNING_SEED), partial(do, lr=lr, seed=TUNING_SEED)) for lr in RATES]
                lr = min(tuned, key=lambda row: row["val_loss"])["lr"]
            rows = [kept(place(lr, seed), partial(do, lr=lr, seed=seed)) for seed in seeds]
            spread = lambda column, rows=rows: (  # noqa: E731
                statistics.stdev(row[column] for row in rows) if len(rows) > 1 else None
            )
            table.append({
                "task": task,
                "arm": arm,
                "parameters": rows[0]["parameters"],
                "lr": lr,
                "steps": steps,
                "seeds": len(rows),
                "accuracy": statistics.fmean(row["accuracy"] for row in rows),
                "accuracy_std": spread("accuracy"),
                "test_loss": statistics.fmean(row["test_loss"] for row in rows),
                "test_loss_std": spread("test_loss"),
            })
    return table


def step_time(build: Callable[[Attention], nn.Module], x: Tensor, y: Tensor, rounds: int) -> tuple[float, float]:
    """Median seconds of a softmax-free step, and of the ratio to a softmax step beside it."""
    kinds: tuple[Attention, ...] = ("softmax_free", "softmax")
    models = {attention: build(attention) for attention in kinds}
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}

    def step(name: Attention) -> float:
        start = time.perf_counter()
        optimizers[name].zero_grad()
        F.cross_entropy(models[name](x), y).backward()
        optimizers[name].step()
        return time.perf_counter() - start

    for name in models:
        step(name)
    pairs = [(step("softmax_free"), step("softmax")) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)


def speed(rounds: int) -> list[Row]:
    cases = (
        ("vision transformer, 32 x 32 x 3", vit, Shape((3, 32, 32), 10), (WIDTH, DEPTH), 64, BATCH),
        ("pixels, 28 x 28", pixels, Shape((1, 28, 28), 10), (32, 2), 784, 8),
        ("pixels, 32 x 32 x 3", pixels, Shape((3, 32, 32), 10), (32, 2), 3_072, 2),
    )
    rows: list[Row] = []
    for name, make, shape, size, tokens, batch in cases:
        build = lambda attention, make=make, shape=shape, size=size: make(*size, attention=attention)(shape)  # noqa: E731
        seconds, ratio = step_time(build, torch.randn(batch, *shape.inputs), torch.randint(10, (batch,)), rounds)
        rows.append({"model": name, "tokens": tokens, "batch": batch, "step_ms": 1e3 * seconds, "over_softmax": ratio})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/twins"))
    parser.add_argument("--quick", action="store_true", help="20 steps, one seed; no record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    times = speed(3 if given.quick else 15)
    if "STEEPEST_DATA" not in os.environ:
        print("STEEPEST_DATA is not set: no accuracies")
        return
    table = study(given.seeds[:1] if given.quick else given.seeds, given.out, 20 if given.quick else STEPS)
    if not given.quick:
        write("attention_steps", times)
        write("attention_twins", table)


if __name__ == "__main__":
    main()

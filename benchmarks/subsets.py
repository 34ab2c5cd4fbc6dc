"""Training on a part of the data: SAGE against random choice and other methods, at equal steps.

    STEEPEST_DATA=... python benchmarks/subsets.py [fashion cifar] [--seeds 0 1 2 3 4] [--out runs/subsets] [--quick]

For every seed, with clean labels and with 20 % of them replaced by a wrong one: a scorer is trained on everything for a
few epochs, every method chooses 5, 15 and 25 % with it, and a new model is trained on each choice for the same number
of steps, by AdamW at a rate that falls to 0 and is the same for all (the steps of the scorer are not counted). Test
labels are right. `wrong` is the share of wrong labels among those kept, `seconds` is for choosing.
Weights of a method are honoured by drawing in proportion. What is on disk (a file for each task, kind of labels and
seed, written after every row) is not repeated.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steepest as st
from records import write
from steepest._files import write_atomically
from steepest.selection.quotas import ClassPolicy
from steepest.selection.rules import Rule, keep_by_group
from steepest.training.data import Split
from steepest.training.models import cnn, hidden
from steepest.training.source import Source, resolve
from steepest.training.tasks.wrong_labels import wrong_labels

FRACTIONS = (0.05, 0.15, 0.25)
LOSS = partial(F.cross_entropy, reduction="none")
WRONG_SHARE = 0.2
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """One data set.

    Args:
        task: The task whose data it is: its training and validation parts together are the data to choose from.
        model: New model for a shape of data.
        steps: Of training on a choice.
        batch_size: Samples per step.
        lr: Of AdamW.
        scorer_epochs: Passes over everything before the choice.
    """

    task: str
    model: Callable[[Any], nn.Module]
    steps: int
    batch_size: int = 128
    lr: float = 2e-3
    scorer_epochs: int = 2


STUDIES = {
    "fashion": Study("fashion_mnist", hidden(256), steps=1000),
    "cifar": Study("cifar10", cnn(16, 32, 64), steps=500, batch_size=64),
}

# What gives every sample a score, once for all fractions: who ranks by order of choice has the smaller choices within
# the larger ones.
SCORERS: dict[str, st.selection.Method] = {
    "EL2N": st.EL2N(),
    "GraNd": st.GraNd(),
    "herding": st.Herding(),
    "k-center": st.KCenter(),
    "SAGE global": st.SAGE(class_policy="global"),
    "SAGE": st.SAGE(),
    "SAGE, paper's consensus": st.SAGE(consensus="sketch"),
}
# An arm: whose score, times a sign; the class policy; the rule.
Arm = tuple[str, int, ClassPolicy, Callable[[int], Rule]]
ARMS: dict[str, Arm] = {
    "EL2N top": ("EL2N", 1, "balanced", lambda _: st.Top()),
    "EL2N bottom": ("EL2N", -1, "balanced", lambda _: st.Top()),
    "GraNd top": ("GraNd", 1, "balanced", lambda _: st.Top()),
    "herding": ("herding", 1, "balanced", lambda _: st.Top()),
    "k-center": ("k-center", 1, "balanced", lambda _: st.Top()),
    "SAGE global top": ("SAGE global", 1, "global", lambda _: st.Top()),
    "SAGE top": ("SAGE", 1, "balanced", lambda _: st.Top()),
    "SAGE top, paper's consensus": ("SAGE, paper's consensus", 1, "balanced", lambda _: st.Top()),
    "SAGE strata": ("SAGE", 1, "balanced", lambda _: st.Strata(spread=None)),
    "SAGE cut 10 %, strata": ("SAGE", 1, "balanced", lambda _: st.Strata(tail_cut=0.1, spread=None)),
    "SAGE cut 20 %, strata": ("SAGE", 1, "balanced", lambda _: st.Strata(tail_cut=0.2, spread=None)),
    "SAGE spread 2, strata": ("SAGE", 1, "balanced", lambda _: st.Strata(spread=2.0)),
    "SAGE spread 3, strata": ("SAGE", 1, "balanced", lambda _: st.Strata(spread=3.0)),
    "SAGE spread 3, random": ("SAGE", 1, "balanced", lambda seed: st.RandomAboveCut(spread=3.0, seed=seed)),
}


NAMES = [*ARMS, "GradMatch"]
CHANCE = ("random", "random balanced", "random per epoch")


@dataclass(frozen=True, eq=False)
class Data:
    """Everything to choose from, and the test part."""

    inputs: Tensor
    labels: Tensor
    wrong: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    shape: Any


def load(study: Study, seed: int, *, noisy: bool) -> Data:
    """The training and validation parts together, for every seed the same; which labels are wrong is the seed's."""
    task = resolve(Source(study.task))
    splits = task.load(0)
    parts = splits.train, splits.val
    merged = replace(splits, train=Split(*(torch.cat([getattr(p, n) for p in parts]) for n in ("inputs", "targets"))))
    if noisy:
        merged = wrong_labels(replace(task, load=lambda _: merged), WRONG_SHARE).load(seed)
    train, test = merged.train, merged.test
    wrong = torch.zeros(len(train), dtype=torch.bool) if train.wrong is None else train.wrong
    return Data(train.inputs, train.targets, wrong, test.inputs, test.targets, merged.shape)


def stream(indices: Tensor, weights: Tensor | None, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end: pass after pass in a new order, or draws in proportion to weights."""
    if weights is not None and not bool((weights == weights[0]).all()):
        while True:
            yield indices[torch.multinomial(weights, batch_size, replacement=True, generator=generator)]
    left = indices[:0]
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, indices[torch.randperm(len(indices), generator=generator)]])
        yield left[:batch_size]
        left = left[batch_size:]


def redrawn(total: int, count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches from a part that is drawn anew after each pass over it."""
    while True:
        part = torch.randperm(total, generator=generator)[:count]
        yield from part[: len(part) // batch_size * batch_size].view(-1, batch_size)


def fit(study: Study, data: Data, model: nn.Module, order: Iterator[Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _, index in zip(range(steps), order, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(data.inputs[index]), data.labels[index]).backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(
            data.test_inputs.split(1000), data.test_labels.split(1000), strict=True
        ))  # fmt: skip
    return right / len(data.test_labels)


def new_model(study: Study, data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return study.model(data.shape)


@dataclass(frozen=True, eq=False)
class Choice:
    """Samples that a method kept.

    Args:
        indices: Of the samples.
        weights: None for equal ones.
        seconds: For choosing, the scoring of all fractions included.
    """

    indices: Tensor
    weights: Tensor | None
    seconds: float


def choices(
    study: Study, data: Data, scorer: nn.Module, seed: int, wanted: Callable[[str, float], bool]
) -> Iterator[tuple[str, float, Choice]]:
    """Every wanted arm at every fraction."""
    total = len(data.labels)
    pick = partial(st.select_subset, scorer, (data.inputs, data.labels), LOSS, batch_size=256, review=False)
    scores: dict[str, tuple[Tensor, float]] = {}
    for fraction in FRACTIONS:
        count = round(fraction * total)
        for policy, name in (("global", "random"), ("balanced", "random balanced")):
            if not wanted(name, fraction):
                continue
            kept = st.select_subset(
                None, (data.inputs, data.labels), count=count, method=st.Random(seed, class_policy=policy), review=False
            )
            yield name, fraction, Choice(kept.indices, None, 0.0)
        if wanted("GradMatch", fraction):
            start = time.perf_counter()
            kept = pick(count=count, method=st.GradMatch())
            yield "GradMatch", fraction, Choice(kept.indices, kept.weights, time.perf_counter() - start)
        for arm, (scoring, sign, policy, rule) in ARMS.items():
            if not wanted(arm, fraction):
                continue
            if scoring not in scores:
                start = time.perf_counter()
                found = pick(count=round(max(FRACTIONS) * total), method=SCORERS[scoring]).scores
                scores[scoring] = found, time.perf_counter() - start
            found, seconds = scores[scoring]
            indices = keep_by_group(sign * found, data.labels, count, policy, rule(seed))
            yield arm, fraction, Choice(indices, None, seconds)


def cell(study: Study, seed: int, *, noisy: bool, arms: Sequence[str], path: Path) -> list[Row]:
    """All methods and fractions for one seed: what the file has, and what it lacks."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    present = {(row["method"], row["fraction"]) for row in rows}
    wanted = lambda method, fraction: (  # noqa: E731
        (method not in NAMES or method in arms) and (method, fraction) not in present
    )
    if not any(wanted(method, fraction) for method in (*arms, *CHANCE) for fraction in FRACTIONS):
        return rows
    data = load(study, seed, noisy=noisy)
    total = len(data.labels)
    everything = torch.arange(total)
    generator = lambda purpose: torch.Generator().manual_seed(10_000 * purpose + seed)  # noqa: E731
    scorer = new_model(study, data, 5000 + seed)
    start = time.perf_counter()
    steps = study.scorer_epochs * (total // study.batch_size)
    fit(study, data, scorer, stream(everything, None, study.batch_size, generator(1)), steps)
    epoch_seconds = (time.perf_counter() - start) / study.scorer_epochs
    base = {"labels": "20 % wrong" if noisy else "clean", "seed": seed, "epoch_seconds": epoch_seconds}

    def train(order: Iterator[Tensor]) -> float:
        model = new_model(study, data, seed)
        fit(study, data, model, order, study.steps)
        return accuracy(model, data)

    def add(**row: Any) -> None:
        rows.append({**base, **row})
        print({key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
        write_atomically(path, json.dumps(rows))

    if wanted("scorer", 1.0):
        add(method="scorer", fraction=1.0, accuracy=accuracy(scorer, data))
    if wanted("everything", 1.0):
        found = train(stream(everything, None, study.batch_size, generator(2)))
        add(method="everything", fraction=1.0, accuracy=found, wrong=share(data.wrong))
    for fraction in FRACTIONS:
        if wanted("random per epoch", fraction):
            found = train(redrawn(total, round(fraction * total), study.batch_size, generator(3)))
            add(method="random per epoch", fraction=fraction, accuracy=found)
    for method, fraction, choice in choices(study, data, scorer, seed, wanted):
        add(
            method=method,
            fraction=fraction,
            accuracy=train(stream(choice.indices, choice.weights, study.batch_size, generator(4))),
            wrong=share(data.wrong[choice.indices]),
            seconds=choice.seconds,
            classes=len(data.labels[choice.indices].unique()),
        )
    return rows


def share(wrong: Tensor) -> float:
    return float(wrong.float().mean())


def gather(study: Study, rows: list[Row]) -> list[Row]:
    """Mean and spread over the seeds, with the difference from class-balanced random at the same seed."""
    reference = {
        (row["labels"], row["fraction"], row["seed"]): row["accuracy"]
        for row in rows
        if row["method"] == "random balanced"
    }
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["labels"], row["fraction"], row["method"]), []).append(row)
    table = []
    order = ["scorer", "everything", *CHANCE, *NAMES]
    place = lambda key: (key[0], key[1], order.index(key[2]))  # noqa: E731
    for labels, fraction, method in sorted(groups, key=place):
        mine = groups[labels, fraction, method]
        mean = lambda column, mine=mine: (  # noqa: E731
            statistics.fmean(row[column] for row in mine) if column in mine[0] else None
        )
        gains = [
            row["accuracy"] - reference[key] for row in mine if (key := (labels, fraction, row["seed"])) in reference
        ]
        table.append({
            "task": study.task,
            "labels": labels,
            "fraction": fraction,
            "method": method,
            "seeds": len(mine),
            "accuracy": mean("accuracy"),
            "std": statistics.stdev(row["accuracy"] for row in mine) if len(mine) > 1 else None,
            "gain": statistics.fmean(gains) if gains else None,
            "gain_std": statistics.stdev(gains) if len(gains) > 1 else None,
            "wrong": mean("wrong"),
            "classes": mean("classes"),
            "seconds": mean("seconds"),
            "epoch_seconds": mean("epoch_seconds"),
        })
    return table


def draw(table: list[Row], path: Path) -> None:
    """Gain over class-balanced random, a panel for each data set and kind of labels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["task"], row["labels"]) for row in table))
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.5, 3.6 * len(panels)), layout="constrained", squeeze=False)
    colours = {0.05: "#88ccee", 0.15: "#4477aa", 0.25: "#222255"}
    for (task, labels), axis in zip(panels, axes[:, 0], strict=True):
        mine = [row for row in table if (row["task"], row["labels"]) == (task, labels) and row["gain"] is not None]
        names = list(dict.fromkeys(row["method"] for row in mine))
        for offset, (fraction, colour) in enumerate(colours.items()):
            part = {row["method"]: row for row in mine if row["fraction"] == fraction}
            axis.bar(
                [number + 0.27 * (offset - 1) for number, name in enumerate(names) if name in part],
                [100 * part[name]["gain"] for name in names if name in part],
                0.25,
                yerr=[100 * (part[name]["gain_std"] or 0.0) for name in names if name in part],
                color=colour,
                error_kw={"elinewidth": 0.7},
                label=f"{fraction:.0%} kept",
            )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axis.set_ylim(bottom=max(-30, axis.get_ylim()[0]))
        axis.set(title=f"{task}, {labels} labels", ylabel="test accuracy, points over\nclass-balanced random")
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], metavar="study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=NAMES, default=NAMES, metavar="ARM", help="beside random choice")
    parser.add_argument("--out", type=Path, default=Path("runs/subsets"))
    parser.add_argument("--name", default="subsets", help="of the record")
    parser.add_argument("--quick", action="store_true", help="50 steps, one seed; no record")
    given = parser.parse_args()
    if "STEEPEST_DATA" not in os.environ:
        print("STEEPEST_DATA is not set")
        return
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    table: list[Row] = []
    for name in given.studies or STUDIES:
        study = STUDIES[name]
        if given.quick:
            study = replace(study, steps=50, scorer_epochs=1)
        rows: list[Row] = []
        for seed in given.seeds[:1] if given.quick else given.seeds:
            for noisy in (False, True):
                path = (
                    given.out / f"{name}-{'wrong' if noisy else 'clean'}-{seed}{'-quick' if given.quick else ''}.json"
                )
                rows += cell(study, seed, noisy=noisy, arms=given.arms, path=path)
        table += gather(study, rows)
    draw(table, given.out / "subsets.svg")
    if not given.quick:
        write(given.name, table)


if __name__ == "__main__":
    main()

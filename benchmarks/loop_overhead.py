"""What the training loop costs over a loop that one writes by hand, on the smallest models, where it shows most.

    python benchmarks/loop_overhead.py

Both take the same steps on the same batches in the same order, with a falling learning rate, the mean loss of every
epoch and one evaluation per epoch. They are timed in turn in one process; `ratio` is the median of the rounds.
"""

import time
from statistics import median

import torch

from records import write
from steepest.training.compare import resolve_options
from steepest.training.data import Splits
from steepest.training.evaluate import evaluate
from steepest.training.loop import Trainer
from steepest.training.registry import get_optimizer
from steepest.training.source import Source, resolve
from steepest.training.spec import RunSpec
from steepest.training.task import Task

ROUNDS, EPOCHS = 25, 10
CASES = [("digits", "sgd"), ("digits", "adam"), ("digits", "sven"), ("toy_1d", "adam")]


def by_hand(task: Task, splits: Splits, name: str, options: dict[str, object], epochs: int) -> float:
    torch.manual_seed(0)
    model, size = task.model(splits.shape), task.batch_size
    build = get_optimizer(name).constructor()
    optimizer = build(model if name == "sven" else model.parameters(), **options)
    base, done = optimizer.param_groups[0]["lr"], 0
    total = epochs * (len(splits.train) // size)
    start = time.perf_counter()
    evaluate(task, model, splits.val)
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(splits.train), generator=generator)
        losses = 0.0
        for first in range(0, len(order) - size + 1, size):
            index = order[first : first + size]
            x, y = splits.train.inputs[index], splits.train.targets[index]
            for group in optimizer.param_groups:
                group["lr"] = base * (1 - done / total)
            if name == "sven":
                loss = optimizer.step(lambda x=x, y=y: task.loss.per_sample(model(x), y))
            else:
                optimizer.zero_grad()
                loss = task.loss.per_sample(model(x), y).mean()
                loss.backward()
                optimizer.step()
            losses += loss.item()
            done += 1
        evaluate(task, model, splits.val)
    return time.perf_counter() - start


def by_trainer(task: Task, splits: Splits, name: str, options: dict[str, object], epochs: int) -> float:
    torch.manual_seed(0)
    model, entry = task.model(splits.shape), get_optimizer(name)
    spec = RunSpec(task.name, name, options, epochs=epochs, batch_size=task.batch_size)
    trainer = Trainer(spec, task, entry, model, entry.build(model, options), splits)
    start = time.perf_counter()
    trainer.run(lambda _point: None)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for task_name, name in CASES:
        task = resolve(Source(task_name))
        splits, options = task.load(0), resolve_options(task, get_optimizer(name), {})
        if name == "sven":
            options["rows"] = "losses"
        epochs = EPOCHS if task_name == "digits" else 1
        arguments = (task, splits, name, options, epochs)
        ratios = [by_trainer(*arguments) / by_hand(*arguments) for _ in range(ROUNDS + 2)][2:]
        rows.append({
            "task": task_name,
            "optimizer": name,
            "ratio": median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        })
        print(f"{task_name} {name}: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    write("loop_overhead", rows)


if __name__ == "__main__":
    main()

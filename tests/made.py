"""Run records made by hand, for tests that need no training."""

from __future__ import annotations

from steepest.training.records import SCHEMA, EpochPoint, Final, MetricNote, Problem, RunRecord

_KEEP = object()
_CLASSIFICATION = Problem(
    description="made by hand; MLP 64-64-10",
    kind="classification",
    loss="cross-entropy",
    metrics=(MetricNote("accuracy", "accuracy", higher_is_better=True),),
)
_REGRESSION = Problem(
    description="made by hand; MLP 1-16-16-16-1",
    kind="regression",
    loss="squared error",
    metrics=(MetricNote("r2", "R2", higher_is_better=True),),
)


def make_problem(task: str = "toy_1d", **changes: object) -> Problem:
    """The problem of a record made by hand."""
    problem = _CLASSIFICATION if task in {"digits", "breast_cancer"} else _REGRESSION
    return Problem(**{**vars(problem), **changes})  # type: ignore[arg-type]


def make_history(losses: list[float | None], *, seconds: float = 2.0, metric: str = "r2") -> tuple[EpochPoint, ...]:
    """One point per validation loss, the untrained model first, at equal distances in time."""
    last = max(len(losses) - 1, 1)
    return tuple(
        EpochPoint(
            epoch=epoch,
            steps=10 * epoch,
            seconds=seconds * epoch / last,
            train_loss=loss if epoch else None,
            val_loss=loss,
            val_metrics={metric: 0.5},
        )
        for epoch, loss in enumerate(losses)
    )


def make_record(
    *,
    task: str = "toy_1d",
    optimizer: str = "sgd",
    seed: int = 0,
    epochs: int = 3,
    loss: float = 0.1,
    seconds: float = 2.0,
    final: Final | object | None = _KEEP,
    **changes: object,
) -> RunRecord:
    """A finished run whose loss falls from 1 to `loss` in equal ratios."""
    problem = make_problem(task)
    metric = problem.metrics[0].name
    if final is _KEEP:
        final = Final(loss, 2 * loss, {metric: 0.9}, {metric: 0.8})
    fields: dict[str, object] = {
        "schema": SCHEMA,
        "select": None,
        "selections": (),
        "key": "0" * 12,
        "task": task,
        "problem": problem,
        "optimizer": optimizer,
        "options": {"lr": 0.1},
        "options_source": "chosen by hand",
        "seed": seed,
        "data_seed": 0,
        "epochs": epochs,
        "budget_seconds": None,
        "schedule": "linear",
        "batch_size": 32,
        "status": "finished",
        "error": None,
        "started": "2026-01-01T00:00:00+00:00",
        "environment": {
            "steepest": "0.1.0",
            "torch": "2.13.0",
            "cpu": "a processor",
            "threads": 1,
            "gpu": None,
            "device": "cpu",
        },
        "history": make_history(
            [loss ** (epoch / epochs) for epoch in range(epochs + 1)] if loss > 0 else [1.0] + [loss] * epochs,
            seconds=seconds,
            metric=metric,
        ),
        "final": final,
        "seconds": seconds,
        "steps": 10 * epochs,
        "peak_memory": 4096,
        "memory_kind": "made by hand",
        "num_parameters": 593,
        "samples": (100, 50, 50),
        "fingerprint": "f" * 16,
    }
    return RunRecord(**{**fields, **changes})  # type: ignore[arg-type]

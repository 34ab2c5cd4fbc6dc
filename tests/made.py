"""Run records made by hand, for tests that need no training."""

from __future__ import annotations

from steepest.training.records import SCHEMA, EpochPoint, Final, RunRecord

_KEEP = object()


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
    metric = "accuracy" if task in {"digits", "breast_cancer"} else "r2"
    history = tuple(
        EpochPoint(
            epoch=epoch,
            steps=10 * epoch,
            seconds=seconds * epoch / epochs,
            train_loss=loss if epoch else None,
            val_loss=loss ** (epoch / epochs),
            val_metrics={metric: 0.5},
        )
        for epoch in range(epochs + 1)
    )
    if final is _KEEP:
        final = Final(loss, 2 * loss, {metric: 0.9}, {metric: 0.8})
    fields: dict[str, object] = {
        "schema": SCHEMA,
        "key": "0" * 12,
        "task": task,
        "optimizer": optimizer,
        "options": {"lr": 0.1},
        "seed": seed,
        "data_seed": 0,
        "epochs": epochs,
        "budget_seconds": None,
        "schedule": "linear",
        "batch_size": 32,
        "status": "finished",
        "error": None,
        "started": "2026-01-01T00:00:00+00:00",
        "environment": {"cpu": "a processor", "threads": 1, "gpu": None},
        "history": history,
        "final": final,
        "seconds": seconds,
        "steps": 10 * epochs,
        "peak_memory": 4096,
        "memory_kind": "made by hand",
        "num_parameters": 593,
        "fingerprint": "f" * 16,
    }
    return RunRecord(**{**fields, **changes})  # type: ignore[arg-type]

"""Data sets that scikit-learn brings along: nothing is downloaded.

All are split 60/20/20 by a seeded generator; the split is the same for every seed of a comparison, so a
tuning seed sees no test sample of a reported one.
"""

import torch

from steepest.training.data import Splits, split_three_ways, standardise
from steepest.training.losses import CrossEntropy, SquaredError
from steepest.training.metrics import ACCURACY, R2
from steepest.training.models import hidden
from steepest.training.task import Task
from steepest.training.tuned import TUNED

__all__ = ["DIGITS", "ENTRIES"]


def _digits(data_seed: int) -> Splits:
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = torch.as_tensor(data.data, dtype=torch.float32) / 16.0
    return split_three_ways(inputs, torch.as_tensor(data.target), seed=data_seed)


def _breast_cancer(data_seed: int) -> Splits:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    inputs = torch.as_tensor(data.data, dtype=torch.float32)
    return standardise(split_three_ways(inputs, torch.as_tensor(data.target), seed=data_seed))


def _diabetes(data_seed: int) -> Splits:
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    inputs = torch.as_tensor(data.data, dtype=torch.float32)
    targets = torch.as_tensor(data.target, dtype=torch.float32).unsqueeze(1)
    return standardise(split_three_ways(inputs, targets, seed=data_seed), targets=True)


DIGITS = Task(
    name="digits",
    description="1,797 handwritten digits of 8 x 8 pixels, 10 classes; MLP 64-64-64-10",
    kind="classification",
    load=_digits,
    model=hidden(64, 64),
    loss=CrossEntropy(),
    metrics=(ACCURACY,),
    batch_size=64,
    epochs=20,
    options={
        "sven": {"lr": 1.0, "solver": {"type": "Damped", "damping": 0.1}},
        "sgd": {"lr": 0.316},
        "adam": {"lr": 0.03},
        "lbfgs": {"lr": 1.0},
    },
    options_source=TUNED,
)

ENTRIES = [
    DIGITS,
    Task(
        name="diabetes",
        description="442 patients, 10 measurements, disease progression a year later; MLP 10-16-16-1",
        kind="regression",
        load=_diabetes,
        model=hidden(16, 16),
        loss=SquaredError(),
        metrics=(R2,),
        batch_size=32,
        epochs=20,
        options={
            "sven": {"lr": 0.0215, "rows": "residuals", "solver": {"type": "Damped", "damping": 0.1}},
            "sgd": {"lr": 0.01},
            "adam": {"lr": 0.003},
            "lbfgs": {"lr": 0.001},
        },
        options_source=TUNED,
    ),
    Task(
        name="breast_cancer",
        description="569 tumours, 30 measurements, malignant or benign; MLP 30-16-16-2",
        kind="classification",
        load=_breast_cancer,
        model=hidden(16, 16),
        loss=CrossEntropy(),
        metrics=(ACCURACY,),
        batch_size=32,
        epochs=20,
        options={
            "sven": {"lr": 0.0464, "solver": {"type": "Damped", "damping": 0.1}},
            "sgd": {"lr": 0.0316},
            "adam": {"lr": 0.003},
            "lbfgs": {"lr": 0.001},
        },
        options_source=TUNED,
    ),
]

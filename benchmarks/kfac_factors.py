"""Time of the Kronecker factors of one batch against curvlinops, in turn in one process.

    make peers && python benchmarks/kfac_factors.py [--threads 1] [--cases mlp_small] [--quick]

Both do a forward and a backward of the mean loss and leave A and S of every Linear and convolution layer, positions
treated as samples ("expand"). `*_beyond_ms` is what that takes beyond a plain forward and backward. Two Fisher
informations: "empirical", and "mc" with one draw, whose factors no two libraries draw alike. There steepest does a
backward more: its time holds the training's own gradient too, and that of curvlinops does not.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import steepest as st
from models import Problem, make
from records import write

try:
    from curvlinops import KFACLinearOperator
except ImportError:
    sys.exit("curvlinops is not installed, and this benchmark compares with it: `make peers` installs it.")

# model, batch, rounds
CASES = (("mlp_small", 64, 200), ("mlp_wide", 512, 30), ("resnet_small", 128, 10))
FISHERS = {"empirical": st.Empirical(), "mc": st.MonteCarlo("categorical")}
Factors = dict[str, tuple[Tensor, Tensor]]
FACTORED = (nn.Linear, nn.Conv2d)


class Case:
    """A model whose Linear and convolution layers alone are trained, so that both differentiate the same parameters."""

    def __init__(self, problem: Problem, fisher: str) -> None:
        self.model, self.inputs, self.targets = problem.model, problem.inputs, problem.targets
        self.names = [name for name, module in self.model.named_modules() if isinstance(module, FACTORED)]
        layers = [self.model.get_submodule(name) for name in self.names]
        params = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
        self.model.requires_grad_(False)
        for parameter in params:
            parameter.requires_grad_()
        self.loss = nn.CrossEntropyLoss()
        self.optimizer = st.KFAC(self.model, lr=0.0, fisher=FISHERS[fisher])
        self.operator = KFACLinearOperator(
            self.model, self.loss, params, [(self.inputs, self.targets)], fisher_type=fisher, kfac_approx="expand",
            separate_weight_and_bias=False, check_deterministic=False, num_data=len(self.inputs),
            num_per_example_loss_terms=1,
        )  # fmt: skip

    def plain(self) -> None:
        """A forward and a backward, of a twin whose optimizer was closed."""
        self.model.zero_grad()
        self.loss(self.model(self.inputs), self.targets).backward()

    def ours(self) -> Factors:
        """The factors of the batch, as a step of the optimizer would blend them in."""
        gathering, recipe = self.optimizer._gathered(), self.optimizer._recipe
        self.optimizer.zero_grad()
        self.loss(self.model(self.inputs), self.targets).backward()
        scale = recipe.grad_scale(gathering.terms, 1.0)
        parts = {block.name: gathering.parts[key] for key, block in self.optimizer._blocks.items()}
        return {name: (part.input / part.positions, part.grad * scale) for name, part in parts.items()}

    def theirs(self) -> Factors:
        """The factors of the batch by curvlinops."""
        operator = self.operator
        operator._input_covariances, operator._gradient_covariances = {}, {}  # it would add to them
        operator.compute_kronecker_factors()
        return {name: (operator._input_covariances[name], operator._gradient_covariances[name]) for name in self.names}


def in_float64(problem: Problem, rows: int) -> Problem:
    return replace(
        problem,
        model=problem.model.double(),
        inputs=problem.inputs[:rows].double(),
        targets=problem.targets[:rows],
    )


def check_agreement(model: str) -> float:
    """Largest difference of the factors of a small batch in float64, relative to the largest entry of each."""
    case = Case(in_float64(make(model, 6), 6), "empirical")
    ours, theirs = case.ours(), case.theirs()
    case.optimizer.close()
    assert ours.keys() == theirs.keys()
    worst = max(
        float((a - b).abs().max() / b.abs().max())
        for name in ours
        for a, b in zip(ours[name], theirs[name], strict=True)
    )
    if not worst < 1e-12:
        sys.exit(f"{model}: the factors differ by {worst:.2g} in float64, so their times are not comparable.")
    return worst


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(model: str, batch: int, rounds: int, fisher: str) -> dict[str, object]:
    """One row of the record."""
    difference = check_agreement(model)
    # Twins, so that the plain one carries no hook.
    plain, case = Case(make(model, batch), fisher), Case(make(model, batch), fisher)
    plain.optimizer.close()
    actions = (plain.plain, case.ours, case.theirs)
    for _ in range(min(rounds, 3)):
        for action in actions:
            action()
    times = [tuple(timed(action) for action in actions) for _ in range(rounds)]
    case.optimizer.close()

    median = statistics.median
    return {
        "model": model,
        "batch": batch,
        "fisher": fisher,
        "float64_difference": difference,
        "plain_ms": 1e3 * median([p for p, _, _ in times]),
        "steepest_ms": 1e3 * median([o for _, o, _ in times]),
        "curvlinops_ms": 1e3 * median([t for _, _, t in times]),
        "steepest_beyond_ms": 1e3 * median([o - p for p, o, _ in times]),
        "curvlinops_beyond_ms": 1e3 * median([t - p for p, _, t in times]),
        "speedup": median([t / o for _, o, t in times]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="+", choices=[name for name, _, _ in CASES], help="only these; no record")
    parser.add_argument("--quick", action="store_true", help="batches of 8 and two rounds; no record")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    rows = []
    for model, batch, rounds in CASES:
        if given.cases and model not in given.cases:
            continue
        for fisher in FISHERS:
            rows.append(measure(model, 8 if given.quick else batch, 2 if given.quick else rounds, fisher))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if not given.cases and not given.quick:
        write("kfac_factors", rows)


if __name__ == "__main__":
    main()

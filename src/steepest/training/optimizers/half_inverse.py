"""Half-inverse gradients: Sven with the square root of the pseudo-inverse, as its paper has it."""

from dataclasses import replace

from steepest.training.optimizers.sven import ENTRIES as SVEN

# The paper solves for the gradient of the mean loss and uses a rate of 1 at 128 samples: its rate is this one times
# the batch size. It has neither a damping nor a norm guard.
_SOLVER = {"type": "TruncatedEigh", "rtol": 1e-6, "exponent": 0.5}

ENTRIES = [
    replace(
        SVEN[0],
        name="half-inverse",
        label="Half-inverse",
        description="half-inverse gradients (arXiv 2203.10131): steepest.Sven with exponent 1/2, no damping, no guard",
        lr_range=(1e-3, 1.0),
        options={"solver": _SOLVER, "max_norm_ratio": None},
        # A loss without residuals is a square all the same: that of its root.
        kind_options={"classification": {"kappa": 1.0}, "regression": {"rows": "residuals"}},
        colour="#D020C8",
    )
]

"""The Gram against another implementation: torchjd's autogram engine (install with `make peers`)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st

autogram = pytest.importorskip("torchjd.autogram", reason="torchjd is not installed: `make peers`")

MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), (5, 6)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.Linear(27, 4)
        ),
        (4, 2, 7, 7),
    ),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Flatten()), (5, 3, 6)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_gram_equals_torchjd(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    inputs = torch.randn(shape, dtype=torch.float64)

    def losses() -> Tensor:
        return F.cross_entropy(model(inputs), torch.arange(shape[0]) % 4, reduction="none")

    capture = st.Capture(model)
    with capture:
        rows = losses()
    ours = capture.jacobian(rows).gram()
    theirs = autogram.Engine(model, batch_dim=0).compute_gramian(losses())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

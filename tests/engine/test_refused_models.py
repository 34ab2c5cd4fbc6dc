"""Models that the engine refuses at construction: by qualified name, with the reason and a remedy."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from capturing import capture_rows, check
from steepest.errors import CaptureError, UnsupportedModelError
from zoo_parts import param, rows_of

Teaches = Callable[[Exception], None]
L = nn.Linear


def inside(child: nn.Module) -> nn.Module:
    """The child two levels down, so that only a qualified name finds it."""
    return nn.Sequential(
        OrderedDict(first=L(5, 5), body=nn.ModuleDict({"odd": child}), spare=nn.ParameterList([param(2)]))
    )


def quietly(make: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """Without torch's own deprecation warnings on the way."""

    def child() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(L(3, 3))

    return child


def complex_layer() -> nn.Module:
    return L(3, 3, dtype=torch.complex64)


CONSTRUCTION: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(3, 4),
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "rnn": lambda: nn.RNN(3, 4),
    "lstm_cell": lambda: nn.LSTMCell(3, 4),
    "gru_cell": lambda: nn.GRUCell(3, 4),
    "batch_norm_1d_training": lambda: nn.BatchNorm1d(3),
    "batch_norm_2d_training": lambda: nn.BatchNorm2d(3),
    "batch_norm_3d_without_affine": lambda: nn.BatchNorm3d(3, affine=False),
    "sync_batch_norm": lambda: nn.SyncBatchNorm(3),
    "batch_norm_without_statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(),
    "bilinear": lambda: nn.Bilinear(3, 3, 2),
    "embedding_bag": lambda: nn.EmbeddingBag(7, 3),
    "embedding_max_norm": lambda: nn.Embedding(7, 3, max_norm=1.0),
    "embedding_by_frequency": lambda: nn.Embedding(7, 3, scale_grad_by_freq=True),
    "conv_transpose_1d": lambda: nn.ConvTranspose1d(3, 4, 2),
    "conv_transpose_2d": lambda: nn.ConvTranspose2d(3, 4, 2),
    "scripted": quietly(torch.jit.script),
    "compiled": quietly(torch.compile),
    "lazy": lambda: nn.LazyLinear(3),
    "complex": complex_layer,
}


@pytest.mark.parametrize("name", CONSTRUCTION)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_refused_at_construction(name: str, teaches: Teaches) -> None:
    model = inside(CONSTRUCTION[name]())
    with pytest.raises(UnsupportedModelError, match=r"body\.odd") as caught:
        st.Capture(model)
    teaches(caught.value)


@pytest.mark.parametrize("name", ["lstm", "bilinear", "scripted", "compiled"])
def test_the_root_itself_is_refused(name: str, teaches: Teaches) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        st.Capture(CONSTRUCTION[name]())
    teaches(caught.value)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(), nn.ReLU(), L(3, 2).requires_grad_(False)],
    ids=["empty", "no_parameters", "all_frozen"],
)
@pytest.mark.parametrize("kind", [st.Capture, st.ReferenceCapture], ids=["fast", "reference"])
def test_nothing_to_train(kind: type, model: nn.Module, teaches: Teaches) -> None:
    with pytest.raises(UnsupportedModelError, match=r"(?i)trainable") as caught:
        kind(model)
    teaches(caught.value)


def test_a_parameter_of_another_model() -> None:
    with pytest.raises((UnsupportedModelError, CaptureError, ValueError), match=r"(?i)param"):
        st.Capture(L(3, 2), params=L(3, 2).parameters())


def test_batch_norm_switched_to_training_later(teaches: Teaches) -> None:
    model = nn.Sequential(OrderedDict(fc=L(5, 4), bn=nn.BatchNorm1d(4), out=L(4, 2))).eval()
    capture = st.Capture(model)
    model.train()
    mean = model.bn.running_mean.clone()
    with pytest.raises((UnsupportedModelError, CaptureError), match=r"\bbn\b") as caught, capture:
        rows_of(model(torch.randn(6, 5)))
    teaches(caught.value)
    assert torch.equal(model.bn.running_mean, mean), "refused before the statistics moved"


@pytest.mark.parametrize("name", ["lstm", "gru", "bilinear", "conv_transpose_1d", "batch_norm_1d_training"])
def test_the_reference_takes_refused_layers(name: str) -> None:
    torch.manual_seed(1)
    child = CONSTRUCTION[name]().double()
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    uses: dict[str, Callable[[], Tensor]] = {
        "lstm": lambda: rows_of(child(x.transpose(0, 1))[0].transpose(0, 1)),
        "gru": lambda: rows_of(child(x)[0]),
        "bilinear": lambda: rows_of(child(x, x.tanh())),
    }
    closure = uses.get(name, lambda: rows_of(child(x)))
    check(capture_rows(st.ReferenceCapture(child), closure), child, closure)

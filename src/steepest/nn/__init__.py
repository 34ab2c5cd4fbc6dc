"""Models and layers: softmax-free attention, and small networks of the usual kinds ready for per-sample gradients."""

from steepest.nn import functional
from steepest.nn.attention import SoftmaxFreeAttention
from steepest.nn.functional import AttentionDiagnostics
from steepest.nn.inverses import CholeskyInverse, NewtonInverse
from steepest.nn.resnet import ResNet

__all__ = [
    "AttentionDiagnostics",
    "CholeskyInverse",
    "NewtonInverse",
    "ResNet",
    "SoftmaxFreeAttention",
    "functional",
]

"""Models and layers: softmax-free attention, and small networks of the usual kinds ready for per-sample gradients."""

from steepest.nn import functional
from steepest.nn.attention import SoftmaxFreeAttention
from steepest.nn.functional import AttentionDiagnostics
from steepest.nn.inverses import CholeskyInverse, NewtonInverse
from steepest.nn.resnet import ResNet
from steepest.nn.soft import SOFT, soft_huge, soft_large, soft_medium, soft_small, soft_tiny
from steepest.nn.soft_weights import load_published_weights
from steepest.nn.softmax import SoftmaxAttention
from steepest.nn.transformer import SequenceTransformer, VisionTransformer

__all__ = [
    "SOFT",
    "AttentionDiagnostics",
    "CholeskyInverse",
    "NewtonInverse",
    "ResNet",
    "SequenceTransformer",
    "SoftmaxAttention",
    "SoftmaxFreeAttention",
    "VisionTransformer",
    "functional",
    "load_published_weights",
    "soft_huge",
    "soft_large",
    "soft_medium",
    "soft_small",
    "soft_tiny",
]

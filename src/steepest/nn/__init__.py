"""Models and layers: softmax-free attention, derivatives in the inputs, small networks of the usual kinds."""

from steepest.nn import functional
from steepest.nn.attention import SoftmaxFreeAttention
from steepest.nn.derivatives import WithDerivatives, differentiate
from steepest.nn.functional import AttentionDiagnostics
from steepest.nn.inverses import CholeskyInverse, NewtonInverse
from steepest.nn.jet_rules import propagate
from steepest.nn.jets import Jet
from steepest.nn.resnet import ResNet
from steepest.nn.smooth import Affine, FourierFeatures, Sine
from steepest.nn.soft import SOFT, soft_huge, soft_large, soft_medium, soft_small, soft_tiny
from steepest.nn.soft_weights import load_published_weights
from steepest.nn.softmax import SoftmaxAttention
from steepest.nn.transformer import SequenceTransformer, VisionTransformer

__all__ = [
    "SOFT",
    "Affine",
    "AttentionDiagnostics",
    "CholeskyInverse",
    "FourierFeatures",
    "Jet",
    "NewtonInverse",
    "ResNet",
    "SequenceTransformer",
    "Sine",
    "SoftmaxAttention",
    "SoftmaxFreeAttention",
    "VisionTransformer",
    "WithDerivatives",
    "differentiate",
    "functional",
    "load_published_weights",
    "propagate",
    "soft_huge",
    "soft_large",
    "soft_medium",
    "soft_small",
    "soft_tiny",
]

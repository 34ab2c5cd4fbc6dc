"""Models: small networks of the usual kinds, ready for per-sample gradients."""

from steepest.nn.resnet import ResNet

__all__ = ["ResNet"]

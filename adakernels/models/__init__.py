"""Networks built on the modules and policies of this package."""

from adakernels.models.adafuse import AdaFuseResNet, adafuse_resnet18, adafuse_resnet34, adafuse_resnet50
from adakernels.models.resnet import ResNet, resnet18, resnet34, resnet50

__all__ = [
    "AdaFuseResNet",
    "ResNet",
    "adafuse_resnet18",
    "adafuse_resnet34",
    "adafuse_resnet50",
    "resnet18",
    "resnet34",
    "resnet50",
]

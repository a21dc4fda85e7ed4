"""Networks built on the modules and policies of this package."""

from adakernels.models.ada3d import Ada3DResNet, ada3d_i3d_resnet50, ada3d_slowonly_resnet50
from adakernels.models.adafuse import AdaFuseResNet, adafuse_resnet18, adafuse_resnet34, adafuse_resnet50
from adakernels.models.resnet import ResNet, resnet18, resnet34, resnet50
from adakernels.models.video_resnet import VideoResNet

__all__ = [
    "Ada3DResNet",
    "AdaFuseResNet",
    "ResNet",
    "VideoResNet",
    "ada3d_i3d_resnet50",
    "ada3d_slowonly_resnet50",
    "adafuse_resnet18",
    "adafuse_resnet34",
    "adafuse_resnet50",
    "resnet18",
    "resnet34",
    "resnet50",
]

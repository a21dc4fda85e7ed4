"""Networks built on the modules and policies of this package."""

from adakernels.models.a3d import A3DSlow, A3DSlowFast, a3d_slow_resnet50, a3d_slowfast_resnet50
from adakernels.models.ada3d import Ada3DResNet, ada3d_i3d_resnet50, ada3d_slowonly_resnet50
from adakernels.models.adafuse import AdaFuseResNet, adafuse_resnet18, adafuse_resnet34, adafuse_resnet50
from adakernels.models.resnet import ResNet, resnet18, resnet34, resnet50
from adakernels.models.vared2 import VARed2R2Plus1d, VARed2X3d, vared2_r2plus1d_18, vared2_x3d_m
from adakernels.models.video_resnet import VideoResNet

__all__ = [
    "A3DSlow",
    "A3DSlowFast",
    "Ada3DResNet",
    "AdaFuseResNet",
    "ResNet",
    "VARed2R2Plus1d",
    "VARed2X3d",
    "VideoResNet",
    "a3d_slow_resnet50",
    "a3d_slowfast_resnet50",
    "ada3d_i3d_resnet50",
    "ada3d_slowonly_resnet50",
    "adafuse_resnet18",
    "adafuse_resnet34",
    "adafuse_resnet50",
    "resnet18",
    "resnet34",
    "resnet50",
    "vared2_r2plus1d_18",
    "vared2_x3d_m",
]

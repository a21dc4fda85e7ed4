"""Drop-in PyTorch operators and modules for video networks that decide per input what to compute."""

from adakernels import models, nn, policies
from adakernels.backends import available_backends, explain, use_backend
from adakernels.convert import convert
from adakernels.flops import count_flops
from adakernels.nn import (
    DynamicConv3d,
    GatedConv2d,
    PatchGather,
    SlicedConv3d,
    SlimConv2d,
    SlimConv3d,
)
from adakernels.ops import (
    Policy,
    dynamic_conv3d,
    gated_conv2d,
    patch_gather,
    sliced_conv3d,
    slim_conv2d,
    slim_conv3d,
    temporal_fuse,
)
from adakernels.policies import ChannelPolicy, SoftModulationGate

__all__ = [
    "ChannelPolicy",
    "DynamicConv3d",
    "GatedConv2d",
    "PatchGather",
    "Policy",
    "SlicedConv3d",
    "SlimConv2d",
    "SlimConv3d",
    "SoftModulationGate",
    "available_backends",
    "convert",
    "count_flops",
    "dynamic_conv3d",
    "explain",
    "gated_conv2d",
    "models",
    "nn",
    "patch_gather",
    "policies",
    "sliced_conv3d",
    "slim_conv2d",
    "slim_conv3d",
    "temporal_fuse",
    "use_backend",
]

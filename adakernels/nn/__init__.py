"""Modules built on the operators."""

from adakernels.nn.dynamic_conv3d import ChannelFilters, DynamicConv3d, FrameFilters, dynamic_conv_norm_act
from adakernels.nn.gated_conv2d import GatedConv2d, conv_norm_act, conv_norm_add_act
from adakernels.nn.packed_clips import PackedClips, select_frames
from adakernels.nn.patch_gather import PatchGather
from adakernels.nn.sliced_conv3d import SlicedConv3d, sliced_conv_norm_act
from adakernels.nn.slim_conv import SlimConv2d, SlimConv3d, SlimLinear
from adakernels.nn.temporal_shift import temporal_shift

__all__ = [
    "ChannelFilters",
    "DynamicConv3d",
    "FrameFilters",
    "GatedConv2d",
    "PackedClips",
    "PatchGather",
    "SlicedConv3d",
    "SlimConv2d",
    "SlimConv3d",
    "SlimLinear",
    "conv_norm_act",
    "conv_norm_add_act",
    "dynamic_conv_norm_act",
    "select_frames",
    "sliced_conv_norm_act",
    "temporal_shift",
]

"""Modules built on the operators."""

from adakernels.nn.gated_conv2d import GatedConv2d, conv_norm_act, conv_norm_add_act
from adakernels.nn.packed_clips import PackedClips, select_frames
from adakernels.nn.patch_gather import PatchGather
from adakernels.nn.sliced_conv3d import SlicedConv3d, sliced_conv_norm_act
from adakernels.nn.temporal_shift import temporal_shift

__all__ = [
    "GatedConv2d",
    "PackedClips",
    "PatchGather",
    "SlicedConv3d",
    "conv_norm_act",
    "conv_norm_add_act",
    "select_frames",
    "sliced_conv_norm_act",
    "temporal_shift",
]

"""Modules built on the operators."""

from adakernels.nn.gated_conv2d import GatedConv2d, conv_norm_act, conv_norm_add_act
from adakernels.nn.patch_gather import PatchGather
from adakernels.nn.temporal_shift import temporal_shift

__all__ = ["GatedConv2d", "PatchGather", "conv_norm_act", "conv_norm_add_act", "temporal_shift"]

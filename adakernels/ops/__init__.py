"""The operators. Each has a file with its schema, reference, gradient, FLOP formula and public function."""

from adakernels import _extension
from adakernels.ops import _dynamic_backward  # noqa: F401, registers an operator's gradient
from adakernels.ops.dynamic_conv3d import (
    dynamic_conv3d,
    dynamic_conv3d_flops,
    dynamic_conv3d_reference,
)
from adakernels.ops.gated_conv2d import gated_conv2d, gated_conv2d_flops, gated_conv2d_reference
from adakernels.ops.patch_gather import patch_gather, patch_gather_reference
from adakernels.ops.policy import Policy, needed_channels
from adakernels.ops.sliced_conv3d import sliced_conv3d, sliced_conv3d_flops, sliced_conv3d_reference
from adakernels.ops.slim_conv import slim_conv2d, slim_conv3d, slim_conv_reference
from adakernels.ops.temporal_fuse import temporal_fuse, temporal_fuse_reference

__all__ = [
    "Policy",
    "dynamic_conv3d",
    "dynamic_conv3d_flops",
    "dynamic_conv3d_reference",
    "gated_conv2d",
    "gated_conv2d_flops",
    "gated_conv2d_reference",
    "needed_channels",
    "patch_gather",
    "patch_gather_reference",
    "sliced_conv3d",
    "sliced_conv3d_flops",
    "sliced_conv3d_reference",
    "slim_conv2d",
    "slim_conv3d",
    "slim_conv_reference",
    "temporal_fuse",
    "temporal_fuse_reference",
]

_extension.load()

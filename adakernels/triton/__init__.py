"""The Triton kernels. Imported when a CUDA tensor comes, for it imports Triton.

Every function has the name and the arguments of the operator that it implements.
"""

from adakernels.triton.dynamic_conv3d import dynamic_conv3d, dynamic_conv3d_backward
from adakernels.triton.gated_conv2d import gated_conv2d, gated_conv2d_backward
from adakernels.triton.patch_gather import patch_gather, patch_gather_grad_input, patch_gather_grad_origin
from adakernels.triton.sliced_conv3d import sliced_conv3d, sliced_conv3d_backward
from adakernels.triton.slim_conv import slim_conv, slim_conv_backward
from adakernels.triton.temporal_fuse import temporal_fuse, temporal_fuse_backward

__all__ = [
    "dynamic_conv3d",
    "dynamic_conv3d_backward",
    "gated_conv2d",
    "gated_conv2d_backward",
    "patch_gather",
    "patch_gather_grad_input",
    "patch_gather_grad_origin",
    "sliced_conv3d",
    "sliced_conv3d_backward",
    "slim_conv",
    "slim_conv_backward",
    "temporal_fuse",
    "temporal_fuse_backward",
]

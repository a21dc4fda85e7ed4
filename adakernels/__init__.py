"""Drop-in PyTorch operators and modules for video networks that decide per input what to compute."""

from adakernels.backends import available_backends, explain, use_backend
from adakernels.ops import Policy, gated_conv2d, temporal_fuse

__all__ = [
    "Policy",
    "available_backends",
    "explain",
    "gated_conv2d",
    "temporal_fuse",
    "use_backend",
]

"""The Triton kernels. Imported when a CUDA tensor comes, for it imports Triton.

Every function has the name and the arguments of the operator that it implements.
"""

from adakernels.triton.temporal_fuse import temporal_fuse, temporal_fuse_backward

__all__ = ["temporal_fuse", "temporal_fuse_backward"]

"""What the kernels can address."""

import torch


def check_frame(op: str, shape: torch.Size | tuple[int, ...] | list[int]) -> None:
    """Raise ValueError unless 32 bits count the values of one frame of `shape` [N, C, H, W]."""
    values = shape[1] * shape[2] * shape[3]
    torch._check_value(
        values < 2**31, lambda: f"{op}: expected at most 2^31 - 1 values per frame, got {values}"
    )

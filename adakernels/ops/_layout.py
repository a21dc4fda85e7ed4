"""The two memory formats of the kernels: contiguous and channels last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(input: Tensor) -> torch.memory_format:
    """Channels last where the tensor is that and not contiguous too, else contiguous."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=CHANNELS_LAST[input.dim()]):
        return CHANNELS_LAST[input.dim()]
    return torch.contiguous_format


def is_dense(input: Tensor) -> bool:
    """Whether the tensor is in one of the two formats."""
    return input.is_contiguous() or input.is_contiguous(memory_format=CHANNELS_LAST[input.dim()])


def dense(input: Tensor, like: Tensor | None = None) -> Tensor:
    """The tensor itself if it is in the memory format of `like` (by default its own), else a copy that is."""
    if like is None and input.is_contiguous():
        return input
    return input.contiguous(memory_format=memory_format(input if like is None else like))


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one storage, be it of other parts of it."""
    result: bool = torch._C._is_alias_of(one, other)  # type: ignore[attr-defined]
    return result


def empty_in_format(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, with the device and, unless told otherwise, the dtype of `like`, and its format where
    the rank is the same."""
    same_rank = len(shape) == like.dim()
    return torch.empty(
        shape,
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=memory_format(like) if same_rank else torch.contiguous_format,
    )

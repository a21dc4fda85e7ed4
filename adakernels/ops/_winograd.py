"""Winograd's method on the CPU with kernels that are transformed once for many calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from adakernels.ops._layout import empty_in_format
from adakernels.ops._library import library

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library.define(
    "winograd_block(SymInt[2] size, SymInt in_channels, SymInt out_channels, SymInt stride, "
    "SymInt[2] padding) -> int",
    tags=_TAGS,
)
library.define("winograd_kernels(Tensor weight, int block, int stride) -> Tensor", tags=_TAGS)
library.define(
    "winograd_conv2d(Tensor input, Tensor kernels, Tensor? bias, Tensor? policy, Tensor? in_policy, "
    "int frames, int stride, SymInt[2] padding, int activation) -> Tensor",
    tags=_TAGS,
)
library.define(
    "winograd_conv2d_add_(Tensor(a!) target, Tensor input, Tensor kernels, Tensor? bias, Tensor? in_policy, "
    "int stride, SymInt[2] padding, int activation) -> ()",
    tags=_TAGS,
)
winograd_conv2d = torch.ops.adakernels.winograd_conv2d.default
winograd_conv2d_add_ = torch.ops.adakernels.winograd_conv2d_add_.default
_LINE = 16  # numbers of a cache line


@torch.library.register_fake("adakernels::winograd_kernels", lib=library)
def _kernels_fake(weight: Tensor, block: int, stride: int) -> Tensor:
    out_channels, channels = weight.shape[:2]
    points, apart = (block + 2) ** 2, (channels + _LINE - 1) // _LINE * _LINE + _LINE
    sizes, strides = (out_channels, points, channels), (points * apart, apart, 1)
    return torch.empty_strided(sizes, strides, dtype=torch.float32, device=weight.device)


@torch.library.register_fake("adakernels::winograd_conv2d", lib=library)
def _fake(
    input: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    in_policy: Tensor | None,
    frames: int,
    stride: int,
    padding: Sequence[int],
    activation: int,
) -> Tensor:
    size = [(n + 2 * p - 3) // stride + 1 for n, p in zip(input.shape[2:], padding, strict=True)]
    return empty_in_format(input, (input.shape[0], kernels.shape[0], *size))


@torch.library.register_fake("adakernels::winograd_conv2d_add_", lib=library)
def _add_fake(
    target: Tensor,
    input: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    in_policy: Tensor | None,
    stride: int,
    padding: Sequence[int],
    activation: int,
) -> None:
    pass


@lru_cache(maxsize=4096)
def winograd_block(
    size: tuple[int, ...],
    channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> int:
    """The side of the blocks of outputs to transform a convolution's kernels for, once for many calls with
    maps of `size`, where this package's kernels run it; 0 where they do best with the kernels as they are."""
    if kernel != (3, 3) or stride not in ((1, 1), (2, 2)) or dilation != (1, 1) or groups != 1:
        return 0
    if isinstance(padding, str):
        return 0
    block: int = torch.ops.adakernels.winograd_block(size, channels, out_channels, stride[0], padding)
    return block


def winograd_kernels(
    weight: Tensor,  # [C_out, C_in, 3, 3]
    block: int,
    stride: int,
) -> Tensor:  # [C_out, points, C_in]
    """The kernels of `weight` as Winograd's method multiplies with them to make blocks of outputs.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016).
    """
    kernels: Tensor = torch.ops.adakernels.winograd_kernels(weight, block, stride)
    return kernels

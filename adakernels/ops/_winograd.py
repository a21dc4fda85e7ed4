"""Winograd's method on the CPU with kernels that are transformed once for many calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

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
_LINE = 16  # numbers of a cache line, as csrc/cpu/kernels/winograd.h keeps points apart


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


class Transform(NamedTuple):
    """How kernels are transformed: to make outputs in blocks of a side, at a stride."""

    block: int
    stride: int


@lru_cache(maxsize=4096)
def winograd_transform(
    size: tuple[int, ...],
    channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Transform | None:
    """How to transform the kernels of a convolution that this package's CPU kernels run, once for many calls
    with maps of `size`; None where they do best with the kernels as they are."""
    if kernel != (3, 3) or stride not in ((1, 1), (2, 2)) or dilation != (1, 1) or groups != 1:
        return None
    block = torch.ops.adakernels.winograd_block(size, channels, out_channels, stride[0], padding)
    return Transform(block, stride[0]) if block > 0 else None


def winograd_kernels(
    weight: Tensor,  # [C_out, C_in, 3, 3]
    transform: Transform,
) -> Tensor:  # [C_out, points, C_in]
    """The kernels of `weight` as Winograd's method multiplies with them to make blocks of outputs.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016).
    """
    kernels: Tensor = torch.ops.adakernels.winograd_kernels(weight, *transform)
    return kernels


KernelSource: TypeAlias = Callable[[Tensor, Transform], "Tensor | None"]
"""Gives `winograd_kernels` of a weight that is likely to be used again, from where they are kept, or None."""


def kept_kernels(
    kernel_source: KernelSource | None,
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, kh, kw]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | None:  # [C_out, points, C_in]
    """The kernels to convolve `input` with instead of `weight`, where there are such."""
    if kernel_source is None:
        return None
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    transform = winograd_transform(
        input.shape[2:], input.shape[1], weight.shape[0], weight.shape[2:], *geometry
    )
    return None if transform is None else kernel_source(weight, transform)

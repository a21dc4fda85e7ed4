"""Plain convolutions on the CPU: which kernel is the fastest one for a call, and how it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adakernels.ops import _checks
from adakernels.ops._checks import Facts
from adakernels.ops._conv_arguments import ACTIVATIONS, ConvArguments, activate, conv_arguments
from adakernels.ops._layout import CHANNELS_LAST, memory_format
from adakernels.ops._library import below_autograd
from adakernels.ops._onednn import ONEDNN_ACTIVATIONS, has_onednn
from adakernels.ops._winograd import (
    KernelSource,
    Transform,
    winograd_conv2d,
    winograd_kernels,
    winograd_transform,
)


class Form(NamedTuple):
    """How the CPU does a convolution.

    Attributes:
        fold: "frames" and "columns" make two dimensions of three where the kernel has no extent in time, or
            in height and width, "pixels" a row of channels of each point; "" leaves the dimensions alone.
        kernel: "native" for the kernels of this package, "winograd" for those with a prepared weight,
            "onednn" for oneDNN's with a weight that may be prepared, "linear" for its matrix product with a
            prepared one, "torch" for the convolution that torch picks, "float" for that one in float32.
    """

    fold: str
    kernel: str


NATIVE_WORK = 1e6
"""Multiply-adds of a convolution that is worth the way to this package's kernels."""

NATIVE_POINTS = 196
"""Pixels of a map for which Winograd's method pays."""


def cpu_form(
    input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
    kernel: Sequence[int],
    conv: ConvArguments,
    out_channels: int,
) -> Form:
    """The form that a convolution of `input` takes, which depends on its shape, memory format and dtype."""
    shape = tuple(input.shape)
    return cpu_form_of(
        shape, memory_format(input), input.dtype, tuple(kernel), conv, out_channels, has_onednn(input.dtype)
    )


@lru_cache(maxsize=4096)
def cpu_form_of(
    shape: tuple[int, ...],
    format: torch.memory_format,
    dtype: torch.dtype,
    kernel: tuple[int, ...],
    conv: ConvArguments,
    out_channels: int,
    onednn: bool,
) -> Form:
    # The form that was measured to be the fastest one. oneDNN is fastest with the channels innermost, and its
    # two-dimensional convolutions take less time there than three-dimensional ones that do the same. It is
    # slower than Winograd's method in our kernels, once there is enough work for them to be worth starting.
    # Planar tensors it brings to another layout first, which ours do without.
    fold = ""
    if len(kernel) == 3 and conv.dilation[0] == 1:
        if kernel[0] == conv.stride[0] == 1 and conv.padding[0] == 0:
            fold = "frames"
        elif (*kernel[1:], *conv.stride[1:], *conv.padding[1:]) == (1, 1, 1, 1, 0, 0):
            fold = "columns"
    inner = format != torch.contiguous_format
    if fold == "frames" and not inner:
        fold = ""  # frames of planar clips are no stack of images
    native = False
    if dtype == torch.float32 and (fold or len(kernel) == 2 or not inner):
        work = shape[0] * math.prod(conv.output) * math.prod(kernel) * out_channels * shape[1] // conv.groups
        points = math.prod(conv.output[-2:])
        winograd = (
            conv.groups == 1
            and tuple(kernel[-2:]) == (3, 3)
            and conv.stride[-2:] == conv.dilation[-2:] == (1, 1)
            and points >= NATIVE_POINTS
            and shape[0] * math.prod(conv.output) > NATIVE_POINTS
        )
        native = work >= NATIVE_WORK and (winograd or not inner)
    if native:
        return Form(fold, "native")
    if dtype == torch.bfloat16 and conv.groups > 1 and out_channels != conv.groups:
        # oneDNN 3.12 writes wrong numbers for some of them.
        return Form(fold, "float")
    return Form(fold, "onednn" if inner and onednn else "torch")


def prepared_form(
    form: Form, shape: tuple[int, ...], kernel: tuple[int, ...], conv: ConvArguments, out_channels: int
) -> Form:
    """The form with a weight that is prepared once for many calls, where it is `form` with one as it is."""
    two = len(kernel) == 2 or form.fold == "frames"
    if form.kernel == "native" and two and _transform(shape, kernel[-2:], conv, out_channels) is not None:
        return Form(form.fold, "winograd")
    return form


def _transform(
    shape: tuple[int, ...], kernel: tuple[int, ...], conv: ConvArguments, out_channels: int
) -> Transform | None:
    """`winograd_transform` of a convolution over the last two dimensions."""
    geometry = conv.stride[-2:], conv.padding[-2:], conv.dilation[-2:], conv.groups
    return winograd_transform(shape[-2:], shape[1], out_channels, kernel, *geometry)


def folded(
    fold: str,
    tensor: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
) -> Tensor:  # [B * T, C, H, W], [B, C, T, H * W] or [N * H * W, C]
    if fold == "pixels":
        return tensor.movedim(1, -1).flatten(0, -2)
    if fold == "frames":
        return tensor.transpose(1, 2).flatten(0, 1)
    return tensor.flatten(3) if fold else tensor


def unfolded(
    fold: str,
    tensor: Tensor,  # [B * T, C, H, W] or [B, C, T, H * W]
    clips: int,
    size: Sequence[int],
) -> Tensor:  # [B, C, T, H, W]
    if fold == "frames":
        return tensor.view(clips, size[0], *tensor.shape[1:]).transpose(1, 2)
    return tensor.view(*tensor.shape[:3], *size[1:]) if fold else tensor


@lru_cache(maxsize=4096)
def folded_arguments(fold: str, conv: ConvArguments) -> tuple[list[int], list[int], list[int], int]:
    kept = {"": slice(None), "frames": slice(1, None), "columns": slice(None, 2), "pixels": slice(0)}[fold]
    return list(conv.stride[kept]), list(conv.padding[kept]), list(conv.dilation[kept]), conv.groups


def folded_weight(fold: str, weight: Tensor) -> Tensor:
    if fold == "pixels":
        return weight.flatten(1)
    return weight[:, :, 0] if fold == "frames" else weight[..., 0] if fold else weight


def prepared(
    run: CpuConv,
    weight: Tensor,  # [out_channels, C/groups, ...]
    bias: Tensor | None,  # [out_channels]
    conv: ConvArguments,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor | None]:  # [out_channels, ...], [out_channels]
    """Copies of weight and bias as `run` reads them fastest, again and again.

    Args:
        shape: of the input, which may later be another one.
    """
    form = run.form
    stride, padding, dilation, groups = folded_arguments(form.fold, conv)
    weight = folded_weight(form.fold, weight)
    bias = None if bias is None else bias.clone()
    if run.transform is not None:
        return winograd_kernels(weight, run.transform), bias
    if form.kernel not in ("onednn", "linear"):
        return weight.clone(memory_format=torch.contiguous_format), bias
    size = list(folded(form.fold, torch.empty(shape, device="meta")).shape)
    if form.kernel == "linear":
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), size[0]), bias
    weight = weight.contiguous(memory_format=CHANNELS_LAST[weight.dim()])
    blocked = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, size)
    return blocked, bias


class CpuConv:
    """A convolution on the CPU in one form, with all that can be known before tensors of a shape are there.

    Args:
        form: as of `cpu_form`.
        shape, format: of the input.
        conv: of the selected part of the weight.
        out_channels: how many output channels there are.
    """

    __slots__ = (
        "_activation",
        "_arguments",
        "_folded",
        "_operator",
        "_order",
        "_unfolded",
        "form",
        "transform",
    )

    def __init__(
        self,
        form: Form,
        shape: Sequence[int],
        format: torch.memory_format,
        conv: ConvArguments,
        out_channels: int,
    ) -> None:
        output = (shape[0], out_channels, *conv.output)
        self.form = form
        # Of the kernels that stand for a weight.
        winograd = form.kernel == "winograd"
        self.transform = _transform(tuple(shape), (3, 3), conv, out_channels) if winograd else None
        self._folded = _folded_geometry(form.fold, shape, format)
        self._unfolded = _geometry(output, format) if form.fold else None
        # The operator of one call, and what follows the tensors in it; None for torch's functions.
        self._operator: Any = None
        self._arguments: tuple[Any, ...] = folded_arguments(form.fold, conv)
        self._activation = conv.activation
        # What to bring the result to, where it may come otherwise.
        self._order: torch.memory_format | None = None
        stride, padding, dilation, groups = self._arguments
        rank = len(stride)
        pointwise = *ONEDNN_ACTIVATIONS[conv.activation], ""
        if form.kernel == "native":
            operator = torch.ops.adakernels.gated_conv2d if rank == 2 else torch.ops.adakernels.sliced_conv3d
            every_channel = (None, None, 1) if rank == 2 else (None, None)
            self._operator = operator.default
            self._arguments = *every_channel, *self._arguments, conv.activation
        elif form.kernel == "winograd":
            self._operator = winograd_conv2d
            self._arguments = None, None, 1, stride[0], padding, conv.activation
        elif form.kernel == "linear":
            self._operator = torch.ops.mkldnn._linear_pointwise.default
            self._arguments = pointwise
        else:
            planar = format == torch.contiguous_format
            self._order = torch.contiguous_format if planar else CHANNELS_LAST[2 + rank]
            if form.kernel == "onednn":
                self._operator = torch.ops.mkldnn._convolution_pointwise.default
                self._arguments = padding, stride, dilation, groups, *pointwise

    def __call__(
        self,
        input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
        weight: Tensor,  # [out_channels, C/groups, ...], folded, or [out_channels, ...], prepared
        bias: Tensor | None,  # [out_channels]
    ) -> Tensor:  # [N, out_channels, H', W'] or [B, out_channels, T', H', W']
        """activation(conv(input) + bias), without recording for backward."""
        if self._folded is not None:
            input = input.as_strided(*self._folded)
        if self._operator is None:
            output = self._on_torch(input, weight, bias)
        elif torch.is_inference_mode_enabled():
            output = self._operator(input, weight, bias, *self._arguments)
        else:
            output = below_autograd(self._operator, input, weight, bias, *self._arguments)
        if self._order is not None:
            output = output.contiguous(memory_format=self._order)
        if self._unfolded is None:
            return output
        # No view for autograd, to which it would be one that must not be written to.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return output.as_strided(*self._unfolded)

    def _on_torch(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = input.dtype
        if self.form.kernel == "float":
            input, weight, bias = input.float(), weight.float(), None if bias is None else bias.float()
        run = F.conv2d if input.dim() == 4 else F.conv3d
        output = run(input, weight, bias, *self._arguments)
        return activate(output, ACTIVATIONS[self._activation], inplace=True).to(dtype)


def _geometry(shape: Sequence[int], format: torch.memory_format) -> tuple[list[int], list[int]]:
    """Sizes and strides of a dense tensor."""
    like = torch.empty(tuple(shape), device="meta", memory_format=format)
    return list(shape), list(like.stride())


def _folded_geometry(
    fold: str, shape: Sequence[int], format: torch.memory_format
) -> tuple[list[int], list[int]] | None:
    if not fold:
        return None
    size = folded(fold, torch.empty(tuple(shape), device="meta")).shape
    planar = fold == "pixels" or format == torch.contiguous_format
    return _geometry(size, torch.contiguous_format if planar else torch.channels_last)


@lru_cache(maxsize=4096)
def cpu_conv(
    form: Form, shape: tuple[int, ...], format: torch.memory_format, conv: ConvArguments, out_channels: int
) -> CpuConv:
    """The same `CpuConv` for the same arguments."""
    return CpuConv(form, shape, format, conv, out_channels)


class _Choice(NamedTuple):
    """How to run a plain convolution: with its weight, or with kernels that are prepared for many calls."""

    plain: CpuConv
    prepared: CpuConv


@_checks.planned("input", "weight", "bias?")
def _fastest(
    requested: str,  # a part of what is remembered only
    op: str,
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    format: torch.memory_format,
    onednn: bool,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
) -> _Choice | None:
    shape, kernel, out_channels = tuple(input[0]), tuple(weight[0][2:]), weight[0][0]
    geometry = stride, padding, dilation, groups
    conv = conv_arguments(op, input, weight, bias, *geometry, activation, rank=len(kernel))
    if conv.pad or conv.groups not in (1, shape[1]):
        return None
    form = cpu_form_of(shape, format, input[1], kernel, conv, out_channels, onednn)
    prepared = prepared_form(form, shape, kernel, conv, out_channels)
    return _Choice(*(cpu_conv(each, shape, format, conv, out_channels) for each in (form, prepared)))


def conv_on_cpu(
    op: str,
    input: Tensor,  # [N, C_in, H, W] or [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    bias: Tensor | None,  # [C_out]
    kernel_source: KernelSource,
    *arguments: Any,
) -> Tensor | None:
    """A convolution by the CPU's fastest kernel for it, without recording for backward; None where only torch
    has one.

    Args:
        op: that errors are about.
        input: float32 or bfloat16, contiguous or channels last.
        kernel_source: gives transformed kernels.
        arguments: stride, padding, dilation, groups and activation.
    """
    choice = _fastest(op, input, weight, bias, memory_format(input), has_onednn(input.dtype), *arguments)
    if choice is None:
        return None
    weight = folded_weight(choice.plain.form.fold, weight)
    transform = choice.prepared.transform
    kernels = None if transform is None else kernel_source(weight, transform)
    return choice.plain(input, weight, bias) if kernels is None else choice.prepared(input, kernels, bias)

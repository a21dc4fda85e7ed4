"""slim_conv2d, slim_conv3d: a convolution with the first output channels and ranges of input channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from adakernels import backends, flops
from adakernels.ops import _checks
from adakernels.ops._checks import Facts, facts, optional_facts
from adakernels.ops._conv_arguments import (
    ACTIVATIONS,
    ConvArguments,
    activate,
    autocast,
    before_activation,
    can_run_on,
    check_operands,
    conv_arguments,
    empty_gradients,
    empty_output,
    kept_output,
)
from adakernels.ops._cpu_conv import (
    CpuConv,
    Form,
    cpu_conv,
    cpu_form,
    cpu_form_of,
    folded,
    folded_arguments,
    folded_weight,
    prepared,
    prepared_form,
    unfolded,
)
from adakernels.ops._layout import CHANNELS_LAST, dense, memory_format
from adakernels.ops._library import call, flop_formula, library, register_gradient, run_on_gpu
from adakernels.ops._onednn import has_onednn, onednn_enabled

Segments: TypeAlias = Sequence[tuple[int, int]]

library.define(
    "slim_conv(Tensor input, Tensor weight, Tensor? bias, SymInt out_channels, SymInt[] segments, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, int activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
library.define(
    "slim_conv_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt out_channels, "
    "SymInt[] segments, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "bool grad_input, bool grad_weight, bool grad_bias) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
run_on_gpu("slim_conv", "slim_conv_backward")
_operator = torch.ops.adakernels.slim_conv.default


def slim_weight(
    weight: Tensor,  # [C_out, C_in/groups, ...]
    out_channels: int,
    segments: Segments,
) -> Tensor:  # [out_channels, sum of the segments, ...]
    """The part of a weight that `out_channels` and `segments` select: a view where it is one segment."""
    parts = [weight[:out_channels, start:stop] for start, stop in segments]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def slim_conv_reference(
    input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw] or [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    *,
    out_channels: int | None = None,
    segments: Segments | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:  # [N, out_channels, H', W'] or [B, out_channels, T', H', W']
    """`slim_conv2d` and `slim_conv3d` in plain PyTorch, without validation: a convolution with a slice."""
    if out_channels is None:
        out_channels = weight.shape[0]
    group_in = weight.shape[1]
    if groups == 1:
        weight = slim_weight(weight, out_channels, segments or ((0, input.shape[1]),))
    else:
        weight = weight[:out_channels]
    bias = None if bias is None else bias[:out_channels]
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    used_groups = 1 if groups == 1 else input.shape[1] // group_in
    output = convolve(input, weight, bias, stride, padding, dilation, used_groups)
    return activate(output, activation)


def _pairs(segments: Sequence[int]) -> Segments:
    return tuple(zip(segments[::2], segments[1::2], strict=True))


def _spelled_out(
    input: Tensor,
    weight: Tensor,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> ConvArguments:
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sizes = zip(input.shape[2:], reach, stride, padding, strict=True)
    output = tuple((size + 2 * p - r - 1) // s + 1 for size, r, s, p in sizes)
    used_groups = 1 if groups == 1 else groups * out_channels // weight.shape[0]
    return ConvArguments(tuple(stride), tuple(padding), tuple(dilation), used_groups, (), activation, output)


@torch.library.impl(library, "slim_conv", "CPU")
def _cpu(
    input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    bias: Tensor | None,  # [C_out]
    out_channels: int,
    segments: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:
    conv = _spelled_out(input, weight, out_channels, stride, padding, dilation, groups, activation)
    form = cpu_form(input, weight.shape[2:], conv, out_channels)
    weight = folded_weight(form.fold, slim_weight(weight, out_channels, _pairs(segments)))
    if form.kernel == "native":
        weight = weight.contiguous()
    run = cpu_conv(form, tuple(input.shape), memory_format(input), conv, out_channels)
    return run(input, weight, None if bias is None else bias[:out_channels])


@torch.library.impl(library, "slim_conv_backward", "CPU")
def _cpu_backward(
    grad_output: Tensor,  # [N, out_channels, H', W'] or [B, out_channels, T', H', W']
    input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    out_channels: int,
    segments: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grad_input: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    conv = _spelled_out(input, weight, out_channels, stride, padding, dilation, groups, 0)
    form = cpu_form(input, weight.shape[2:], conv, out_channels)
    pairs = _pairs(segments)
    # oneDNN's gradients are faster in three dimensions than over columns, and of a dense weight.
    fold = "" if form.fold == "columns" else form.fold
    strides, paddings, dilations, used_groups = folded_arguments(fold, conv)
    part = folded_weight(fold, slim_weight(weight, out_channels, pairs))
    operands = [
        folded(fold, grad_output),
        folded(fold, input),
        part.contiguous(memory_format=CHANNELS_LAST[part.dim()]) if form.kernel == "onednn" else part,
    ]
    reaches = zip(operands[1].shape[2:], operands[2].shape[2:], dilations, strict=True)
    longer = any(size <= d * (k - 1) for size, k, d in reaches)
    if form.kernel == "float" or (longer and weight.dtype == torch.bfloat16):
        # In bfloat16, oneDNN 3.12 gets weight gradients wrong where a kernel is longer than the input.
        operands = [operand.float() for operand in operands]
    grads = torch.ops.aten.convolution_backward.default(
        *operands,
        [out_channels],
        strides,
        paddings,
        dilations,
        False,
        [0] * len(strides),
        used_groups,
        [grad_input, grad_weight, grad_bias],
    )
    to_input, to_weight, to_bias = weight.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if grad_input:
        grad = unfolded(fold, grads[0], input.shape[0], input.shape[2:])
        to_input = dense(grad.to(input.dtype), like=input)
    if grad_weight:
        to_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        target = folded_weight(fold, to_weight)
        begin = 0
        for start, stop in pairs:
            target[:out_channels, start:stop] = grads[1][:, begin : begin + stop - start]
            begin += stop - start
    if grad_bias:
        to_bias = weight.new_zeros(weight.shape[:1])
        to_bias[:out_channels] = grads[2]
    return to_input, to_weight, to_bias


@torch.library.register_fake("adakernels::slim_conv", lib=library)
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    segments: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:
    return empty_output(input, weight, stride, padding, dilation, out_channels)


@torch.library.register_fake("adakernels::slim_conv_backward", lib=library)
def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    out_channels: int,
    segments: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grad_input: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(input, weight, grad_input, grad_weight, grad_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.conv, activation = inputs
    ctx.activation = ACTIVATIONS[activation]
    saved = kept_output(output, ctx.activation)
    ctx.save_for_backward(input, weight, bias, saved)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, output = ctx.saved_tensors

    def linear() -> Tensor:
        result: Tensor = _operator(input, weight, bias, *ctx.conv, ACTIVATIONS.index(None))
        return result

    grad_output = before_activation(grad_output, ctx.activation, output, linear)
    wanted = ctx.needs_input_grad[:3]
    grads = torch.ops.adakernels.slim_conv_backward.default(
        dense(grad_output, like=input), input, weight, *ctx.conv, *wanted
    )
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 7


register_gradient("slim_conv", _backward, _setup_context)


@flop_formula(torch.ops.adakernels.slim_conv)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    out_channels: int,
    segments: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return 2 * math.prod(out_shape) * _reduction(input_shape, weight_shape, groups)


@flop_formula(torch.ops.adakernels.slim_conv_backward)
def _backward_flops(
    grad_shape: Sequence[int],
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    groups, grad_input, grad_weight = args[-4:-1]
    products = 2 * math.prod(grad_shape) * _reduction(input_shape, weight_shape, groups)
    return (grad_input + grad_weight) * products


def _reduction(input_shape: Sequence[int], weight_shape: Sequence[int], groups: int) -> int:
    """How many products an output sums."""
    return (input_shape[1] if groups == 1 else weight_shape[1]) * math.prod(weight_shape[2:])


class SlimArguments(NamedTuple):
    """A call's arguments in normal form.

    Attributes:
        conv: of the convolution with the selected part of the weight.
        out_channels: how many of the output channels there are, from the first.
        segments: the input channels, (start, stop) pairs as one flat tuple, neighbours merged.
        groups: of the whole weight; 1 also where one of its groups is used, which is no other convolution.
    """

    conv: ConvArguments
    out_channels: int
    segments: tuple[int, ...]
    groups: int


def _check(
    op: str,
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    out_channels: Any,
    segments: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
) -> SlimArguments:
    rank = 2 if op == "slim_conv2d" else 3
    check_operands(op, input, weight, rank)
    channels, (all_out, group_in) = input[0][1], weight[0][:2]
    groups = _checks.integer(op, "groups", groups, 1)
    _checks.check_value(
        all_out % groups == 0,
        lambda: f"{op}: expected groups to divide C_out = {all_out}, got {groups}",
    )
    count = all_out if out_channels is None else _checks.integer(op, "out_channels", out_channels, 1)
    _checks.check_value(
        count <= all_out,
        lambda: f"{op}: expected out_channels of at most C_out = {all_out}, got {count}",
    )
    if bias is not None:
        _checks.check_shape(op, "bias", bias[0], (all_out,), "C_out")
        _checks.check_same(op, "bias", bias, "input", input)
    used_groups = 1
    if groups == 1:
        ranges = _ranges(op, segments, channels, group_in)
    else:
        group_out = all_out // groups
        _checks.check_value(
            segments is None, lambda: f"{op}: expected no segments with groups = {groups}, got {segments}"
        )
        _checks.check_value(
            count % group_out == 0,
            lambda: f"{op}: expected out_channels to be whole groups of {group_out}, got {count}",
        )
        used_groups = count // group_out
        _checks.check_value(
            channels == used_groups * group_in,
            lambda: (
                f"{op}: expected input with the {used_groups * group_in} channels of {used_groups} groups, "
                f"got {channels}"
            ),
        )
        ranges = (0, group_in)
    selected = torch.Size((count, group_in if groups > 1 else channels, *weight[0][2:])), *weight[1:]
    conv = conv_arguments(op, input, selected, None, stride, padding, dilation, used_groups, activation, rank)
    return SlimArguments(conv, count, ranges, groups if used_groups > 1 else 1)


def _ranges(op: str, segments: Any, channels: int, limit: int) -> tuple[int, ...]:
    """`segments` as a flat tuple with neighbours merged, which must suit the input and the weight."""
    if segments is None:
        _checks.check_value(
            1 <= channels <= limit,
            lambda: f"{op}: expected input of 1 to C_in = {limit} channels, got {channels}",
        )
        return (0, channels)
    _checks.check_type(
        isinstance(segments, (tuple, list))
        and all(isinstance(segment, (tuple, list)) and len(segment) == 2 for segment in segments),
        lambda: f"{op}: expected segments to be (start, stop) pairs, got {segments!r}",
    )
    merged: list[int] = []
    for start, stop in segments:
        begin = _checks.integer(op, "a segment's start", start, 0)
        end = _checks.integer(op, "a segment's stop", stop, 1)
        _checks.check_value(
            begin < end <= limit,
            lambda: f"{op}: expected segments within C_in = {limit} channels, got {segments!r}",
        )
        _checks.check_value(
            not merged or begin >= merged[-1],
            lambda: f"{op}: expected segments in order and without overlap, got {segments!r}",
        )
        merged[-1:] = [end] if merged and begin == merged[-1] else [*merged[-1:], begin, end]
    width = sum(merged[1::2]) - sum(merged[::2])
    _checks.check_value(
        width == channels,
        lambda: f"{op}: expected segments as wide as the input's C = {channels}, got {segments!r} of {width}",
    )
    return tuple(merged)


def _can_run_cpu(op: str, input: Facts, conv: ConvArguments, *, raise_error: bool = False) -> bool:
    """Whether the CPU's convolutions can run a call on such tensors."""
    if not backends.can_run_cpu(op, input[2], input[1], raise_error=raise_error):
        return False
    reason = f"it takes groups = 1 or as many as input channels, {input[0][1]}, not {conv.groups}"
    return conv.groups in (1, input[0][1]) or backends.refuse(op, "cpu", reason, raise_error)


def _predicates(
    op: str, input: Facts, weight: Facts, arguments: SlimArguments
) -> Mapping[str, backends.Predicate]:
    conv = arguments.conv
    predicates = can_run_on(op, input, conv.groups) | {"cpu": partial(_can_run_cpu, op, input, conv)}
    return backends.in_order("slim_conv", predicates, input, weight[0], arguments.groups)


class Plan(NamedTuple):
    """The backend of a call, and its arguments in normal form."""

    backend: str
    arguments: SlimArguments


def _plan(requested: str, op: str, input: Facts, weight: Facts, *arguments: Any) -> Plan:
    checked = _check(op, input, weight, *arguments)
    return Plan(backends.choose(requested, _predicates(op, input, weight, checked)), checked)


plan = _checks.planned("input", "weight", "bias?")(_plan)
"""Validate a call of the operator of that name and choose its backend.

out_channels, segments, stride, padding, dilation, groups and activation follow the tensors.
"""


def prepare(
    run: CpuConv,
    weight: Tensor,  # [C_out, C_in/groups, ...]
    bias: Tensor | None,  # [C_out]
    arguments: SlimArguments,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor | None]:  # [out_channels, C/groups, ...], [out_channels]
    """The selected part of weight and bias as `run` reads them fastest: see `prepared`."""
    conv, out_channels, segments, _ = arguments
    part = slim_weight(weight, out_channels, _pairs(segments))
    return prepared(run, part, None if bias is None else bias[:out_channels], conv, shape)


class CpuCall(NamedTuple):
    """What a call on the CPU with a prepared weight needs besides its tensors."""

    arguments: SlimArguments
    run: CpuConv


def cpu_call(
    op: str,
    input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    bias: Tensor | None,  # [C_out]
    *arguments: Any,
) -> CpuCall | None:
    """Validate a call of `op` as `plan` does; None where the CPU's convolutions are not to run it.

    Args:
        input: contiguous or channels last.
        arguments: as of `plan`.
    """
    return _cpu_call(op, input, weight, bias, memory_format(input), has_onednn(input.dtype), *arguments)


@_checks.planned("input", "weight", "bias?")
def _cpu_call(
    requested: str,
    op: str,
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    format: torch.memory_format,
    onednn: bool,
    *arguments: Any,
) -> CpuCall | None:
    backend, slim = _plan(requested, op, input, weight, bias, *arguments)
    if backend != "cpu" or slim.conv.pad:
        return None
    shape, kernel = tuple(input[0]), tuple(weight[0][2:])
    form = cpu_form_of(shape, format, input[1], kernel, slim.conv, slim.out_channels, onednn)
    conv = slim.conv
    form = prepared_form(form, shape, kernel, conv, slim.out_channels)
    if form.kernel == "onednn" and {*kernel, *conv.stride, conv.groups} == {1} and not any(conv.padding):
        # With the weight prepared, oneDNN's matrix product takes less time than its convolution,
        form = Form("pixels", "linear")
    elif form == Form("columns", "onednn"):
        # and its three-dimensional convolution than a two-dimensional one.
        form = Form("", "onednn")
    return CpuCall(slim, cpu_conv(form, shape, format, slim.conv, slim.out_channels))


def cpu_settings() -> tuple[Any, ...]:
    """What `cpu_call` depends on besides its arguments and may change between calls."""
    return backends.requested_backend(), onednn_enabled()


def record_work(
    op: str,
    arguments: SlimArguments,
    input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, ...]
) -> None:
    """Add a call to the count of multiply-adds under way: of all channels, and of those that are used."""
    if flops.counting and not torch.compiler.is_compiling():
        points = math.prod(arguments.conv.output)
        products = _reduction(input.shape, weight.shape, arguments.groups)
        used = float(points * arguments.out_channels * products)
        flops.record(op, float(points * weight.numel()), flops.every_row(input, used))


def _slim_conv(
    op: str,
    input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    bias: Tensor | None,  # [C_out]
    *arguments: Any,
) -> Tensor:  # [N, out_channels, H', W'] or [B, out_channels, T', H', W']
    input, weight, bias = autocast(input, weight, bias)
    backend, slim = plan(op, input, weight, bias, *arguments)
    record_work(op, slim, input, weight)
    conv, out_channels, segments, groups = slim
    if conv.pad:
        input = F.pad(input, conv.pad)
    if backend == "reference":
        output = slim_conv_reference(
            input,
            weight,
            bias,
            out_channels=out_channels,
            segments=_pairs(segments),
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=groups,
            activation=ACTIVATIONS[conv.activation],
        )
        return dense(output, like=input)
    return call(
        _operator,
        dense(input),
        weight,
        bias,
        out_channels,
        segments,
        *conv[:3],
        groups,
        conv.activation,
    )


def slim_conv2d(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    *,
    out_channels: int | None = None,
    segments: Segments | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:  # [N, out_channels, H', W']
    """2D convolution with a part of its weight: the first output channels, and ranges of input channels.

    The result is activation(conv2d(input, weight[:out_channels, ranges]) + bias[:out_channels]). Gradients
    have the shapes of the whole `weight` and `bias`, with exact zeros where these were not used. A weight
    that is used many times is better held by a `SlimConv2d`, which prepares a width once, not in every call.
    Source: A3D (Zhu et al., 2021), §3.2, Fig. 3, after slimmable networks (Yu et al., 2019).

    Args:
        input: [N, C, H, W], contiguous or channels last, with the channels of `segments` next to each other.
        weight: [C_out, C_in/groups, kh, kw], of the input's dtype.
        bias: [C_out] or None.
        out_channels: how many output channels to compute, counted from the first; None for all C_out.
        segments: (start, stop) of ranges of the weight's input channels, in order and without overlap, as
            many channels as the input has; None for one range from 0.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.
        groups: number of groups of the whole weight. With more than one, `out_channels` takes whole groups,
            the input has the channels of these, and there are no `segments`.
        activation: None, "relu", "relu6" or "silu".

    Returns:
        [N, out_channels, H', W'] in the input's dtype and memory format.

    Raises:
        ValueError, TypeError: for a wrong rank, shape, dtype, device, range or combination.
    """
    arguments = (out_channels, segments, stride, padding, dilation, groups, activation)
    return _slim_conv("slim_conv2d", input, weight, bias, *arguments)


def slim_conv3d(
    input: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    *,
    out_channels: int | None = None,
    segments: Segments | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, out_channels, T', H', W']
    """3D convolution with a part of its weight: the first output channels, and ranges of input channels.

    As `slim_conv2d`, with one more dimension: input [B, C, T, H, W], contiguous or channels last (3D), weight
    [C_out, C_in/groups, kt, kh, kw], result [B, out_channels, T', H', W'].

    Raises:
        ValueError, TypeError: for a wrong rank, shape, dtype, device, range or combination.
    """
    arguments = (out_channels, segments, stride, padding, dilation, groups, activation)
    return _slim_conv("slim_conv3d", input, weight, bias, *arguments)


def _explain(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int | None = None,
    segments: Segments | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Mapping[str, backends.Predicate]:
    tensors = facts(op, "input", input), facts(op, "weight", weight), optional_facts(op, "bias", bias)
    checked = _check(op, *tensors, out_channels, segments, stride, padding, dilation, groups, activation)
    return _predicates(op, *tensors[:2], checked)


for _op in (slim_conv2d, slim_conv3d):
    backends.explains(_op)(partial(_explain, _op.__name__))

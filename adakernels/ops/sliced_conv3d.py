"""sliced_conv3d: a 3D convolution that takes only its temporal centre tap where a clip needs no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

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
    conv_arguments,
    conv_predicates,
    dense_backward_flops,
    dense_flops,
    empty_gradients,
    empty_output,
    kept_output,
)
from adakernels.ops._layout import dense
from adakernels.ops._library import call, flop_formula, library, register_gradient, run_on_gpu

library.define(
    "sliced_conv3d(Tensor input, Tensor weight, Tensor? bias, Tensor? temporal, Tensor? frame_offsets, "
    "SymInt[3] stride, SymInt[3] padding, SymInt[3] dilation, SymInt groups, int activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
library.define(
    "sliced_conv3d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? temporal, "
    "Tensor? frame_offsets, SymInt[3] stride, SymInt[3] padding, SymInt[3] dilation, SymInt groups, "
    "bool grad_input, bool grad_weight, bool grad_bias) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
run_on_gpu("sliced_conv3d", "sliced_conv3d_backward")
_operator = torch.ops.adakernels.sliced_conv3d.default


def sliced_conv3d_reference(
    input: Tensor,  # [B, C_in, T, H, W] | [sum T, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    temporal: Tensor | None = None,  # [B]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    frame_offsets: Tensor | None = None,  # [B + 1]
    activation: str | None = None,
) -> Tensor:  # [B, C_out, T', H', W'] | [sum T, C_out, H', W']
    """`sliced_conv3d` in plain PyTorch, without validation: everything is computed, then masked.

    With `frame_offsets` padding and dilation are given as numbers, as they come from the public function.
    """
    centre = weight.shape[2] // 2
    pads, steps, strides = (_three(value) for value in (padding, dilation, stride))
    if frame_offsets is None:
        if temporal is None:
            output = F.conv3d(input, weight, bias, stride, padding, dilation, groups)
        else:
            whole = temporal[:, None, None, None, None]
            # Zeros rather than masks on the results: what a clip does not read may be no number.
            output = F.conv3d(torch.where(whole, input, 0), weight, bias, stride, padding, dilation, groups)
            reach = steps[0] * (weight.shape[2] - 1)
            before = {"valid": 0, "same": reach // 2}[padding] if isinstance(padding, str) else pads[0]
            seen = _every_frame(
                torch.where(whole, 0, input), centre * steps[0] - before, strides[0], output.shape[2]
            )
            sliced = F.conv3d(
                seen,
                weight[:, :, centre : centre + 1],
                bias,
                (1, *strides[1:]),
                padding if isinstance(padding, str) else (0, *pads[1:]),
                dilation,
                groups,
            )
            output = torch.where(whole, output, sliced)
        return activate(output, activation)
    frames = torch.arange(input.shape[0], device=input.device)
    clip = torch.searchsorted(frame_offsets, frames, right=True) - 1
    begin, end = frame_offsets[clip], frame_offsets[clip + 1]
    taps = []
    for j in range(weight.shape[2]):
        source = frames + j * steps[0] - pads[0]
        live = (source >= begin) & (source < end)
        if temporal is not None and j != centre:
            live = live & temporal[clip]
        shifted = input[torch.where(live, source, frames)]
        shifted = torch.where(live[:, None, None, None], shifted, 0)
        taps.append(F.conv2d(shifted, weight[:, :, j], None, strides[1:], pads[1:], steps[1:], groups))
    output = torch.stack(taps).sum(0)
    return activate(output if bias is None else output + bias[:, None, None], activation)


def _three(value: Any) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)


def _every_frame(
    input: Tensor,  # [B, C, T, H, W]
    first: int,
    step: int,
    count: int,
) -> Tensor:  # [B, C, count, H, W]
    """So many frames from number `first` on, `step` apart; zeros where the input has none."""
    last = first + (count - 1) * step
    before, after = max(0, -first), max(0, last + 1 - input.shape[2])
    padded = F.pad(input, (0, 0, 0, 0, before, after))
    return padded[:, :, first + before :: step][:, :, :count]


@torch.library.register_fake("adakernels::sliced_conv3d", lib=library)
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temporal: Tensor | None,
    frame_offsets: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:
    if frame_offsets is None:
        return empty_output(input, weight, stride, padding, dilation)
    return empty_output(input, weight[:, :, 0], stride[1:], padding[1:], dilation[1:])


@torch.library.register_fake("adakernels::sliced_conv3d_backward", lib=library)
def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    temporal: Tensor | None,
    frame_offsets: Tensor | None,
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
    input, weight, bias, temporal, frame_offsets, *ctx.conv, activation = inputs
    ctx.activation = ACTIVATIONS[activation]
    saved = kept_output(output, ctx.activation)
    ctx.save_for_backward(input, weight, bias, temporal, frame_offsets, saved)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, temporal, frame_offsets, output = ctx.saved_tensors

    def linear() -> Tensor:
        none = ACTIVATIONS.index(None)
        result: Tensor = _operator(input, weight, bias, temporal, frame_offsets, *ctx.conv, none)
        return result

    grad_output = before_activation(grad_output, ctx.activation, output, linear)
    wanted = ctx.needs_input_grad[:3]
    grads = torch.ops.adakernels.sliced_conv3d_backward.default(
        dense(grad_output, like=input), input, weight, temporal, frame_offsets, *ctx.conv, *wanted
    )
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 7


register_gradient("sliced_conv3d", _backward, _setup_context)


flop_formula(torch.ops.adakernels.sliced_conv3d)(dense_flops)
flop_formula(torch.ops.adakernels.sliced_conv3d_backward)(dense_backward_flops)


def sliced_conv3d_flops(
    weight_shape: Sequence[int],
    temporal: Tensor | None = None,  # [B]
    *,
    batch: int,
    output_size: Sequence[int],
    frame_offsets: Tensor | None = None,  # [B + 1]
) -> tuple[float, Tensor]:  # [B]
    """Multiply-adds of one clip (of mean length) computed densely, and those of every clip.

    A frame costs H' W' times the size of the weight, of which a clip whose `temporal` is False takes one of
    kt parts. Products with zero padding count.

    Args:
        weight_shape: [C_out, C_in/groups, kt, kh, kw].
        temporal: as in `sliced_conv3d`.
        batch: number of clips B.
        output_size: (T', H', W'), with `frame_offsets` (sum T, H', W').
        frame_offsets: as in `sliced_conv3d`.

    Returns:
        The dense count of a clip, and a float64 [B] tensor of the counts that remain.
    """
    frame = float(math.prod(weight_shape) * math.prod(output_size[1:]))
    if frame_offsets is not None:
        frames, length = frame_offsets.diff().double(), output_size[0] / max(1, batch)
    else:
        length = output_size[0]
        device = None if temporal is None else temporal.device
        frames = torch.full((batch,), float(output_size[0]), dtype=torch.float64, device=device)
    share = torch.ones_like(frames)
    if temporal is not None:
        share = torch.where(temporal, share, 1 / weight_shape[2])
    return frame * length, frame * frames * share


def _predicates(
    input: Facts, weight: Facts, temporal: Facts | None, frame_offsets: Facts | None, groups: int
) -> Mapping[str, backends.Predicate]:
    if temporal is None and frame_offsets is None:
        return {}
    return conv_predicates("sliced_conv3d", input, weight, groups)


def _check(
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    temporal: Facts | None,
    frame_offsets: Facts | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
) -> ConvArguments:
    op = "sliced_conv3d"
    arguments = weight, bias, stride, padding, dilation, groups, activation
    if frame_offsets is None:
        conv = conv_arguments(op, input, *arguments, rank=3)
        batch = input[0][0]
    else:
        _checks.check_rank(op, "packed input", input[0], "sum T, C_in, H, W")
        rows, channels, *image = input[0]
        # The length of the clips is not known here.
        clips = torch.Size((rows, channels, 1, *image)), *input[1:]
        conv = conv_arguments(op, clips, *arguments, rank=3, unchecked=1)
        taps = weight[0][2]
        _checks.check_value(
            conv.stride[0] == 1 and 2 * conv.padding[0] == conv.dilation[0] * (taps - 1),
            lambda: (
                f"{op}: expected a convolution that keeps the number of frames with frame_offsets, got "
                f"stride {conv.stride[0]}, padding {conv.padding[0]} and dilation {conv.dilation[0]} in time "
                f"for {taps} taps"
            ),
        )
        _checks.check_rank(op, "frame_offsets", frame_offsets[0], "B + 1")
        _checks.check_type(
            frame_offsets[1] == torch.int32,
            lambda: (
                f"{op}: expected frame_offsets of dtype int32, got {_checks.dtype_name(frame_offsets[1])}"
            ),
        )
        _checks.check_value(
            frame_offsets[0][0] >= 1, lambda: f"{op}: expected frame_offsets of shape [B + 1], got [0]"
        )
        _checks.check_same(op, "frame_offsets", frame_offsets, "input", input, dtype=False)
        batch = frame_offsets[0][0] - 1
    if temporal is not None:
        _checks.check_type(
            temporal[1] == torch.bool,
            lambda: f"{op}: expected temporal of dtype bool, got {_checks.dtype_name(temporal[1])}",
        )
        _checks.check_shape(op, "temporal", temporal[0], (batch,), "B")
        _checks.check_same(op, "temporal", temporal, "input", input, dtype=False)
    return conv


class _Plan(NamedTuple):
    backend: str
    conv: ConvArguments


@_checks.planned("input", "weight", "bias?", "temporal?", "frame_offsets?")
def _plan(
    requested: str,
    op: str,
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    temporal: Facts | None,
    frame_offsets: Facts | None,
    *arguments: Any,
) -> _Plan:
    """Validate a call and choose its backend."""
    conv = _check(input, weight, bias, temporal, frame_offsets, *arguments)
    predicates = _predicates(input, weight, temporal, frame_offsets, conv.groups)
    return _Plan(backends.choose(requested, predicates), conv)


@_checks.planned("input", "weight", "bias?", "temporal?", "frame_offsets")
def _check_packed_clips(requested: str, op: str, *arguments: Any) -> ConvArguments:
    """Validate a call, whatever backend is asked for."""
    return _check(*arguments)


def checked_packed_clips(
    input: Tensor,  # [sum T, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    temporal: Tensor | None,  # [B]
    frame_offsets: Tensor,  # [B + 1]
    *arguments: Any,
) -> Tensor:  # [B + 1]
    """The frame offsets of a call of `sliced_conv3d`, all of whose arguments are checked as it does.

    Args:
        arguments: stride, padding, dilation, groups and activation.
    """
    _check_packed_clips("sliced_conv3d", input, weight, bias, temporal, frame_offsets, *arguments)
    if frame_offsets.device.type == "cpu" or _checks.debugging():
        return checked_offsets(frame_offsets, input.shape[0])
    return frame_offsets


def sliced_conv3d(
    input: Tensor,  # [B, C_in, T, H, W] | [sum T, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    temporal: Tensor | None = None,  # [B]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    frame_offsets: Tensor | None = None,  # [B + 1]
    activation: str | None = None,
) -> Tensor:  # [B, C_out, T', H', W'] | [sum T, C_out, H', W']
    """3D convolution of which clips take all temporal taps or only the centre one, as a 2D convolution would.

    A clip whose `temporal` is False gets what the same convolution gives with all temporal taps of the weight
    but number kt // 2 set to zero, so its output has the same shape; the other taps are neither computed nor
    given a gradient by it.
    Source: Ada3D (Li et al., CVPR 2021), §3.2.

    Args:
        input: [B, C_in, T, H, W], contiguous or channels last; or, with `frame_offsets`, the frames of all
            clips one after the other, [sum T, C_in, H, W].
        weight: [C_out, C_in/groups, kt, kh, kw], of the input's dtype.
        bias: [C_out] or None.
        temporal: bool [B]; None stands for True throughout.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv3d`. With `frame_offsets` the
            convolution has to keep the number of frames: in time, stride 1 and
            2 * padding = dilation * (kt - 1).
        frame_offsets: int32 [B + 1], increasing from 0 to sum T: clip b has the rows from frame_offsets[b] to
            frame_offsets[b + 1], of which there may be none. Frames outside of its own count as zeros to it.
        activation: None, "relu", "relu6" or "silu".

    Returns:
        [B, C_out, T', H', W'], or packed [sum T, C_out, H', W'], in the input's dtype and memory format.

    Raises:
        ValueError, TypeError: for a wrong rank, shape, dtype, device, range or combination, or offsets that
            are none (looked at on the CPU always, elsewhere with `ADAKERNELS_DEBUG=1`).
    """
    op = "sliced_conv3d"
    input, weight, bias = autocast(input, weight, bias)
    backend, conv = _plan(
        op,
        input,
        weight,
        bias,
        temporal,
        frame_offsets,
        stride,
        padding,
        dilation,
        groups,
        activation,
    )
    if flops.counting and not torch.compiler.is_compiling():
        batch, size = len(input), conv.output
        if frame_offsets is not None:
            batch, size = len(frame_offsets) - 1, (len(input), *size[1:])
        counts = sliced_conv3d_flops(
            weight.shape, temporal, batch=batch, output_size=size, frame_offsets=frame_offsets
        )
        flops.record(op, *counts)
    if conv.pad:
        input = F.pad(input, conv.pad if frame_offsets is None else conv.pad[:4])
    return _run(backend, conv, input, weight, bias, temporal, frame_offsets)


def _run(
    backend: str,
    conv: ConvArguments,
    input: Tensor,  # [B, C_in, T, H, W] | [sum T, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    temporal: Tensor | None,  # [B]
    frame_offsets: Tensor | None,  # [B + 1]
) -> Tensor:  # [B, C_out, T', H', W'] | [sum T, C_out, H', W']
    if backend == "reference":
        if frame_offsets is not None:
            frame_offsets = checked_offsets(frame_offsets, input.shape[0])
        output = sliced_conv3d_reference(
            input,
            weight,
            bias,
            temporal,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            frame_offsets=frame_offsets,
            activation=ACTIVATIONS[conv.activation],
        )
        return dense(output, like=input)
    return call(
        _operator,
        dense(input),
        weight,
        bias,
        None if temporal is None else temporal.contiguous(),
        None if frame_offsets is None else frame_offsets.contiguous(),
        *conv[:4],
        conv.activation,
    )


# An operator, so that the check also runs inside a compiled graph.
library.define("checked_offsets(Tensor offsets, SymInt rows) -> Tensor")


@torch.library.impl(library, "checked_offsets", "CompositeExplicitAutograd")
def _checked_offsets(offsets: Tensor, rows: int) -> Tensor:
    if offsets.device.type == "cpu" or _checks.debugging():
        values = offsets.tolist()
        expected = "sliced_conv3d: expected frame_offsets"
        _checks.check_value(values[0] == 0, lambda: f"{expected} to start at 0, got {values[0]}")
        falls = [(after, before) for before, after in pairwise(values) if after < before]
        _checks.check_value(
            not falls, lambda: "{} that do not decrease, got {} after {}".format(expected, *falls[0])
        )
        _checks.check_value(
            values[-1] == rows,
            lambda: f"{expected} to end at the number of frames, {rows}, got {values[-1]}",
        )
    return offsets.clone()


@torch.library.register_fake("adakernels::checked_offsets", lib=library)
def _checked_offsets_fake(offsets: Tensor, rows: int) -> Tensor:
    return torch.empty_like(offsets)


def checked_offsets(
    offsets: Tensor,  # [B + 1]
    rows: int,
) -> Tensor:  # [B + 1]
    """Frame offsets, looked at on the CPU always, elsewhere with `ADAKERNELS_DEBUG=1`.

    Raises:
        ValueError: unless they start at 0, do not decrease and end at the number of rows.
    """
    result: Tensor = torch.ops.adakernels.checked_offsets.default(offsets, rows)
    return result


@backends.explains(sliced_conv3d)
def _explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temporal: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    frame_offsets: Tensor | None = None,
    activation: str | None = None,
) -> Mapping[str, backends.Predicate]:
    op = "sliced_conv3d"
    tensors = (
        facts(op, "input", input),
        facts(op, "weight", weight),
        optional_facts(op, "bias", bias),
        optional_facts(op, "temporal", temporal),
        optional_facts(op, "frame_offsets", frame_offsets),
    )
    _check(*tensors, stride, padding, dilation, groups, activation)
    return _predicates(*tensors[:2], *tensors[3:], groups)

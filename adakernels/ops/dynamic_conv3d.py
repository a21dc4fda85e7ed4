"""dynamic_conv3d: a 3D convolution that computes some frames and channels and makes the others from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
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
    dense_flops,
    empty_output,
    kept_output,
)
from adakernels.ops._layout import dense, empty_in_format
from adakernels.ops._library import call, flop_formula, library, register_gradient, run_on_gpu

MAX_LEVELS = 3

library.define(
    "dynamic_conv3d(Tensor input, Tensor weight, Tensor? bias, Tensor? temporal_gate, Tensor? channel_gate, "
    "Tensor? temporal_weight, Tensor? channel_weight, SymInt[3] stride, SymInt[3] padding, "
    "SymInt[3] dilation, SymInt groups, int activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
library.define(
    "dynamic_conv3d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, "
    "Tensor? temporal_gate, Tensor? channel_gate, Tensor? temporal_weight, Tensor? channel_weight, "
    "SymInt[3] stride, SymInt[3] padding, SymInt[3] dilation, SymInt groups, bool grad_input, "
    "bool grad_weight, bool grad_bias, bool grad_temporal_gate, bool grad_channel_gate, "
    "bool grad_temporal_weight, bool grad_channel_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
run_on_gpu("dynamic_conv3d", "dynamic_conv3d_backward")
_operator = torch.ops.adakernels.dynamic_conv3d.default


def computed_channels(channels: int, level: int) -> int:
    """How many of the first output channels a channel level computes: C / 2^level, rounded up."""
    return -(-channels // 2**level)


def reconstruct_channels(
    input: Tensor,  # [B, C, T, H, W]
    channel_weight: Tensor | None,  # [C, k, k]
    level: int,
) -> Tensor:  # [B, C, T, H, W]
    """What a channel level makes of features whose first channels are given: channel c beyond these is
    channel c mod their number, filtered by `channel_weight[c]`."""
    if level == 0:
        return input
    assert channel_weight is not None
    given = computed_channels(input.shape[1], level)
    source = torch.arange(given, input.shape[1], device=input.device) % given
    made = filtered(input[:, source], channel_weight[given:])
    return torch.cat((input[:, :given], made), 1)


def reconstruct_frames(
    input: Tensor,  # [B, C, T, H, W]
    temporal_weight: Tensor | None,  # [2^(S_t-1) - 1, C, k, k]
    level: int,
) -> Tensor:  # [B, C, T, H, W]
    """What a temporal level makes of features whose every 2^level-th frame is given: the j-th frame after
    one of these is that frame, filtered by `temporal_weight[j - 1]`."""
    step, frames = 2**level, input.shape[2]
    output = []
    for t in range(frames):
        given = input[:, :, t - t % step].unsqueeze(2)
        if t % step > 0:
            assert temporal_weight is not None
            given = filtered(given, temporal_weight[t % step - 1])
        output.append(given)
    return torch.cat(output, 2) if output else input


def filtered(
    input: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C, k, k]
) -> Tensor:  # [B, C, T, H, W]
    """Every channel of every frame filtered by a kernel of its own."""
    channels, size = weight.shape[:2]
    if channels == 0:
        return input
    return F.conv3d(input, weight[:, None, None], padding=(0, size // 2, size // 2), groups=channels)


def dynamic_conv3d_reference(
    input: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    temporal_gate: Tensor | None = None,  # [B, S_t]
    channel_gate: Tensor | None = None,  # [B, S_c]
    *,
    temporal_weight: Tensor | None = None,  # [2^(S_t-1) - 1, C_out, k, k]
    channel_weight: Tensor | None = None,  # [C_out, k, k]
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, C_out, T', H', W']
    """`dynamic_conv3d` in plain PyTorch, without validation: everything is computed, then every branch takes
    what it needs of that."""
    output = F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    if channel_gate is not None:
        output = _weighted_sum(
            channel_gate,
            [reconstruct_channels(output, channel_weight, i) for i in range(channel_gate.shape[1])],
        )
    if temporal_gate is not None:
        output = _weighted_sum(
            temporal_gate,
            [reconstruct_frames(output, temporal_weight, j) for j in range(temporal_gate.shape[1])],
        )
    return activate(output, activation)


def _weighted_sum(
    gate: Tensor,  # [B, S]
    branches: Sequence[Tensor],  # S of [B, C, T, H, W]
) -> Tensor:  # [B, C, T, H, W]
    total = torch.zeros_like(branches[0])
    for weight, branch in zip(gate.to(total.dtype).unbind(1), branches, strict=True):
        # Dead branches take no part, so they give their gate no gradient.
        live = (weight > 0)[:, None, None, None, None]
        total = total + torch.where(live, weight[:, None, None, None, None] * branch, 0)
    return total


@torch.library.register_fake("adakernels::dynamic_conv3d", lib=library)
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temporal_gate: Tensor | None,
    channel_gate: Tensor | None,
    temporal_weight: Tensor | None,
    channel_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:
    return empty_output(input, weight, stride, padding, dilation)


@torch.library.register_fake("adakernels::dynamic_conv3d_backward", lib=library)
def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temporal_gate: Tensor | None,
    channel_gate: Tensor | None,
    temporal_weight: Tensor | None,
    channel_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    tensors = (weight, bias, temporal_gate, channel_gate, temporal_weight, channel_weight)

    def gradient(of: Tensor | None, want: bool) -> Tensor:
        if of is None:
            return weight.new_empty(0)
        return of.new_empty(of.shape if want else (0,))

    return (
        empty_in_format(input, input.shape if wanted[0] else (0,)),
        *(gradient(of, want) for of, want in zip(tensors, wanted[1:], strict=True)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, stride, padding, dilation, groups, activation = inputs
    ctx.conv = stride, padding, dilation, groups
    ctx.activation = ACTIVATIONS[activation]
    ctx.save_for_backward(*tensors, kept_output(output, ctx.activation))


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, output = ctx.saved_tensors
    linear = partial(_operator, *tensors, *ctx.conv, ACTIVATIONS.index(None))
    grad_output = before_activation(grad_output, ctx.activation, output, linear)
    wanted = ctx.needs_input_grad[:7]
    grads = torch.ops.adakernels.dynamic_conv3d_backward.default(
        dense(grad_output, like=tensors[0]), *tensors, *ctx.conv, *wanted
    )
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 5


register_gradient("dynamic_conv3d", _backward, _setup_context)


flop_formula(torch.ops.adakernels.dynamic_conv3d)(dense_flops)


@flop_formula(torch.ops.adakernels.dynamic_conv3d_backward)
def _dense_backward_flops(
    grad_shape: Sequence[int],
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    grad_input, grad_weight = args[9:11]
    return (grad_input + grad_weight) * 2 * math.prod(grad_shape) * math.prod(weight_shape[1:])


def dynamic_conv3d_flops(
    weight_shape: Sequence[int],
    temporal_gate: Tensor | None = None,  # [B, S_t]
    channel_gate: Tensor | None = None,  # [B, S_c]
    *,
    batch: int,
    output_size: Sequence[int],
    taps: int = 0,
) -> tuple[float, Tensor]:  # [B]
    """Multiply-adds of one clip computed densely, and those of every clip at its levels.

    A clip computes the frames and channels of its largest live branch (VA-RED², Eq. 8): about r / R of the
    dense work. Each frame and channel that another one is made from then costs `taps` per pixel and branch.

    Args:
        weight_shape: [C_out, C_in/groups, kt, kh, kw].
        temporal_gate, channel_gate: as in `dynamic_conv3d`.
        batch: number of clips B.
        output_size: (T', H', W').
        taps: k² of the reconstruction; 0 leaves it out.

    Returns:
        The dense count of a clip, and a float64 [B] tensor of the counts that remain.
    """
    channels, reduction = weight_shape[0], math.prod(weight_shape[1:])
    frames, pixels = output_size[0], math.prod(output_size[1:])
    gates = [gate for gate in (temporal_gate, channel_gate) if gate is not None]
    device = gates[0].device if gates else None

    def live(gate: Tensor | None) -> Tensor:
        one = torch.ones(batch, 1, dtype=torch.bool, device=device)
        return one if gate is None else gate > 0

    temporal, channel = live(temporal_gate), live(channel_gate)
    strides = [2**j for j in range(temporal.shape[1])]
    given_frames = torch.tensor([-(-frames // step) for step in strides], dtype=torch.float64, device=device)
    given_channels = torch.tensor(
        [computed_channels(channels, i) for i in range(channel.shape[1])], dtype=torch.float64, device=device
    )
    # A branch without frames or channels of its own has none to make either.
    computed_frames = (temporal * given_frames).amax(1)
    computed = (channel * given_channels).amax(1)
    anything = (computed_frames > 0) & (computed > 0)
    made_channels = (channel * (channels - given_channels)).sum(1) * computed_frames
    made_frames = (temporal * (frames - given_frames)).sum(1) * channels
    actual = computed_frames * computed * reduction + taps * (made_channels + made_frames)
    return float(channels * frames * pixels * reduction), actual * anything * pixels


def clips_alike(
    batch: int,
    temporal_gate: Tensor | None,  # [B, S_t]
    channel_gate: Tensor | None,  # [B, S_c]
) -> Iterator[tuple[Tensor, list[int], list[int]]]:
    """The clips of each set of live levels, with these levels of either gate; not those without any."""
    clips = defaultdict(list)
    patterns = (
        [(True,)] * batch if gate is None else [tuple(row) for row in (gate > 0).tolist()]
        for gate in (temporal_gate, channel_gate)
    )
    for clip, pattern in enumerate(zip(*patterns, strict=True)):
        clips[pattern].append(clip)
    for pattern, alike in clips.items():
        temporal, channel = ([level for level, live in enumerate(lives) if live] for lives in pattern)
        if temporal and channel:
            yield torch.tensor(alike), temporal, channel


class ComputedBox(NamedTuple):
    """The arguments of the convolution that computes every so many frames of the first few channels.

    Attributes:
        input: [B, C_in of the groups that these channels are in, T, H, W].
        weight: [C, C_in/groups, kt, kh, kw] for the C channels of these groups: maybe a few more than wanted.
        bias: [C] or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv3d`.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def computed_box(
    input: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    step: int,
    channels: int,
) -> ComputedBox:
    """What computes every `step`-th frame of the first `channels` output channels."""
    per_group = weight.shape[0] // groups
    live_groups = -(-channels // per_group)
    rows = channels if groups == 1 else live_groups * per_group
    return ComputedBox(
        input[:, : live_groups * weight.shape[1]],
        weight[:rows],
        None if bias is None else bias[:rows],
        (stride[0] * step, *stride[1:]),
        padding,
        dilation,
        live_groups,
    )


def _predicates(
    input: Facts, weight: Facts, temporal_gate: Facts | None, channel_gate: Facts | None, groups: int
) -> Mapping[str, backends.Predicate]:
    if temporal_gate is None and channel_gate is None:
        return {}
    return conv_predicates("dynamic_conv3d", input, weight, groups)


def _check(
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    temporal_gate: Facts | None,
    channel_gate: Facts | None,
    temporal_weight: Facts | None,
    channel_weight: Facts | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
) -> ConvArguments:
    op = "dynamic_conv3d"
    conv = conv_arguments(op, input, weight, bias, stride, padding, dilation, groups, activation, rank=3)
    channels = weight[0][0]
    for name, gate, letter in (
        ("temporal_gate", temporal_gate, "S_t"),
        ("channel_gate", channel_gate, "S_c"),
    ):
        if gate is not None:
            _check_gate(op, name, gate, letter, input)
    _check_filters(op, "temporal_weight", temporal_weight, temporal_gate, channels, input)
    _check_filters(op, "channel_weight", channel_weight, channel_gate, channels, input)
    if temporal_weight is not None and channel_weight is not None:
        sizes = temporal_weight[0][-1], channel_weight[0][-1]
        _checks.check_value(
            sizes[0] == sizes[1],
            lambda: (
                f"{op}: expected one k of temporal_weight and channel_weight, got {sizes[0]} and {sizes[1]}"
            ),
        )
    return conv


def _check_gate(op: str, name: str, gate: Facts, letter: str, input: Facts) -> None:
    _checks.check_float(op, name, gate[1])
    _checks.check_rank(op, name, gate[0], f"B, {letter}")
    _checks.check_value(
        gate[0][0] == input[0][0] and 1 <= gate[0][1] <= MAX_LEVELS,
        lambda: (
            f"{op}: expected {name} of shape [B, {letter}] = [{input[0][0]}, 1 to {MAX_LEVELS}], "
            f"got {list(gate[0])}"
        ),
    )
    _checks.check_same(op, name, gate, "input", input, dtype=False)


def _check_filters(
    op: str, name: str, filters: Facts | None, gate: Facts | None, channels: int, input: Facts
) -> None:
    levels = 1 if gate is None else gate[0][1]
    if filters is None:
        _checks.check_value(levels == 1, lambda: f"{op}: expected {name} with {levels} levels, got None")
        return
    temporal = name == "temporal_weight"
    letters = "2^(S_t-1) - 1, C_out, k, k" if temporal else "C_out, k, k"
    _checks.check_rank(op, name, filters[0], letters)
    size = filters[0][-1]
    _checks.check_value(size in (1, 3), lambda: f"{op}: expected {name} of k = 1 or 3, got {size}")
    expected: tuple[int, ...] = (channels, size, size)
    if temporal:
        expected = (filters[0][0] if gate is None else 2 ** (levels - 1) - 1, *expected)
    _checks.check_shape(op, name, filters[0], expected, letters)
    _checks.check_same(op, name, filters, "input", input)


class _Plan(NamedTuple):
    backend: str
    conv: ConvArguments


@_checks.planned(
    "input", "weight", "bias?", "temporal_gate?", "channel_gate?", "temporal_weight?", "channel_weight?"
)
def _plan(
    requested: str,
    op: str,
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    temporal_gate: Facts | None,
    channel_gate: Facts | None,
    temporal_weight: Facts | None,
    channel_weight: Facts | None,
    *arguments: Any,
) -> _Plan:
    """Validate a call and choose its backend."""
    tensors = (input, weight, bias, temporal_gate, channel_gate, temporal_weight, channel_weight)
    conv = _check(*tensors, *arguments)
    predicates = _predicates(input, weight, temporal_gate, channel_gate, conv.groups)
    return _Plan(backends.choose(requested, predicates), conv)


def dynamic_conv3d(
    input: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    temporal_gate: Tensor | None = None,  # [B, S_t]
    channel_gate: Tensor | None = None,  # [B, S_c]
    *,
    temporal_weight: Tensor | None = None,  # [2^(S_t-1) - 1, C_out, k, k]
    channel_weight: Tensor | None = None,  # [C_out, k, k]
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, C_out, T', H', W']
    """3D convolution over clips that computes some output frames and channels and makes the others from them.

    At temporal level j only every 2^j-th output frame is computed, and frame i · 2^j + m of channel c is
    computed frame i filtered by `temporal_weight[m - 1, c]`. At channel level i only the first C' channels
    are computed, C_out / 2^i rounded up, and channel c >= C' is channel c mod C' filtered by
    `channel_weight[c]`. With RT_j and RC_i for these two, the result is
    activation(Σ_j temporal_gate[j] · RT_j(Σ_i channel_gate[i] · RC_i(conv3d(input)))): each clip
    computes what the largest of its live branches (those of weights above 0) needs, once.
    Source: VA-RED² (Pan et al., ICLR 2021), Eq. 1-3, 5, 7 and 8.

    Args:
        input: [B, C_in, T, H, W], contiguous or channels last.
        weight: [C_out, C_in/groups, kt, kh, kw], of the input's dtype.
        bias: [C_out] or None, of the computed features.
        temporal_gate: floating point [B, S_t] non-negative weights of the temporal levels 0, 1, 2 (as many as
            S_t says, 1 to 3); a one-hot row picks a level, a row of zeros makes the clip's output zero. None
            is level 0. Frames that a group at the end of a clip does not have are left out.
        channel_gate: [B, S_c], the same for the channel levels.
        temporal_weight: [2^(S_t-1) - 1, C_out, k, k] filters, k = 1 or 3, zero padding; of the input's dtype.
            May be None where there is one temporal level.
        channel_weight: [C_out, k, k] likewise, with the same k; those of the first C' channels are not used.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv3d`.
        activation: None, "relu", "relu6" or "silu", of the final sum.

    Returns:
        [B, C_out, T', H', W'] in the input's dtype and memory format. Gradients go to every tensor that is
        used, to gates where they are above 0: a dead branch is not computed, so its gate gets zero.

    Raises:
        ValueError, TypeError: for a wrong rank, shape, dtype, device, range or combination, or a negative
            gate (looked at on the CPU always, elsewhere with `ADAKERNELS_DEBUG=1`).
    """
    op = "dynamic_conv3d"
    input, weight, bias, temporal_weight, channel_weight = autocast(
        input, weight, bias, temporal_weight, channel_weight
    )
    backend, conv = _plan(
        op,
        input,
        weight,
        bias,
        temporal_gate,
        channel_gate,
        temporal_weight,
        channel_weight,
        stride,
        padding,
        dilation,
        groups,
        activation,
    )
    if flops.counting and not torch.compiler.is_compiling():
        filters = channel_weight if temporal_weight is None else temporal_weight
        flops.record(
            op,
            *dynamic_conv3d_flops(
                weight.shape,
                temporal_gate,
                channel_gate,
                batch=input.shape[0],
                output_size=conv.output,
                taps=0 if filters is None else filters.shape[-1] ** 2,
            ),
        )
    if conv.pad:
        input = F.pad(input, conv.pad)
    if temporal_gate is None and channel_gate is None:
        output = activate(F.conv3d(input, weight, bias, *conv[:4]), ACTIVATIONS[conv.activation])
        return dense(output, like=input)
    # Filters without their gate serve nothing.
    temporal_weight = None if temporal_gate is None else temporal_weight
    channel_weight = None if channel_gate is None else channel_weight
    # The kernels for the CPU look at the values themselves, those for GPUs do not.
    if backend == "reference" or _checks.debugging():
        temporal_gate, channel_gate = (
            None if gate is None else _checks.checked_weights(gate, op, name)
            for gate, name in ((temporal_gate, "temporal_gate"), (channel_gate, "channel_gate"))
        )
    if backend == "reference":
        output = dynamic_conv3d_reference(
            input,
            weight,
            bias,
            temporal_gate,
            channel_gate,
            temporal_weight=temporal_weight,
            channel_weight=channel_weight,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            activation=ACTIVATIONS[conv.activation],
        )
        return dense(output, like=input)
    return call(
        _operator,
        dense(input),
        weight,
        bias,
        _plain(temporal_gate),
        _plain(channel_gate),
        temporal_weight,
        channel_weight,
        *conv[:4],
        conv.activation,
    )


def _plain(gate: Tensor | None) -> Tensor | None:  # [B, S]
    """A gate as the kernels take it, float32 and contiguous."""
    if gate is None or (gate.dtype is torch.float32 and gate.is_contiguous()):
        return gate
    return gate.to(torch.float32).contiguous()


@backends.explains(dynamic_conv3d)
def _explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temporal_gate: Tensor | None = None,
    channel_gate: Tensor | None = None,
    *,
    temporal_weight: Tensor | None = None,
    channel_weight: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Mapping[str, backends.Predicate]:
    op = "dynamic_conv3d"
    tensors = (
        facts(op, "input", input),
        facts(op, "weight", weight),
        optional_facts(op, "bias", bias),
        optional_facts(op, "temporal_gate", temporal_gate),
        optional_facts(op, "channel_gate", channel_gate),
        optional_facts(op, "temporal_weight", temporal_weight),
        optional_facts(op, "channel_weight", channel_weight),
    )
    conv = _check(*tensors, stride, padding, dilation, groups, activation)
    return _predicates(*tensors[:2], *tensors[3:5], conv.groups)

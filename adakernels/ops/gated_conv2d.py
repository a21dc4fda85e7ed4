"""gated_conv2d: a convolution over a clip that computes only the output channels somebody reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from adakernels.ops._winograd import KernelSource, kept_kernels, winograd_conv2d
from adakernels.ops.policy import Policy, as_index, checked_policy, is_soft, needed_channels
from adakernels.ops.temporal_fuse import temporal_fuse, temporal_fuse_reference

library.define(
    "gated_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? policy, Tensor? in_policy, int frames, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, int activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
library.define(
    "gated_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? policy, "
    "Tensor? in_policy, int frames, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
    "bool grad_input, bool grad_weight, bool grad_bias) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
run_on_gpu("gated_conv2d", "gated_conv2d_backward")
_operator = torch.ops.adakernels.gated_conv2d.default


def gated_conv2d_reference(
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    policy: Tensor | None = None,  # [N, C_out] | [N, C_out, 3]
    *,
    frames: int = 1,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    in_policy: Tensor | None = None,  # [N, C_in]
    activation: str | None = None,
) -> Tensor:  # [N, C_out, H', W']
    """`gated_conv2d` in plain PyTorch, without validation: everything is computed, then mixed by masks."""
    if in_policy is not None:
        input = torch.where(in_policy[..., None, None] == Policy.SKIP.value, 0, input)
    output = activate(F.conv2d(input, weight, bias, stride, padding, dilation, groups), activation)
    return output if policy is None else temporal_fuse_reference(output, policy, frames=frames)


@torch.library.register_fake("adakernels::gated_conv2d", lib=library)
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    in_policy: Tensor | None,
    frames: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:
    return empty_output(input, weight, stride, padding, dilation)


@torch.library.register_fake("adakernels::gated_conv2d_backward", lib=library)
def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    policy: Tensor | None,
    in_policy: Tensor | None,
    frames: int,
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
    input, weight, bias, policy, in_policy, ctx.frames, *ctx.conv, activation = inputs
    ctx.activation = ACTIVATIONS[activation]
    saved = kept_output(output, ctx.activation)
    ctx.save_for_backward(input, weight, bias, policy, in_policy, saved)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, policy, in_policy, output = ctx.saved_tensors

    def linear() -> Tensor:
        none = ACTIVATIONS.index(None)
        result: Tensor = _operator(input, weight, bias, policy, in_policy, ctx.frames, *ctx.conv, none)
        return result

    # Activations map 0 to 0, so activating before the mixing is the same as activating the mixed features.
    grad_output = before_activation(grad_output, ctx.activation, output, linear)
    wanted = ctx.needs_input_grad[:3]
    grads = torch.ops.adakernels.gated_conv2d_backward.default(
        dense(grad_output, like=input), input, weight, policy, in_policy, ctx.frames, *ctx.conv, *wanted
    )
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 8


register_gradient("gated_conv2d", _backward, _setup_context)


flop_formula(torch.ops.adakernels.gated_conv2d)(dense_flops)
flop_formula(torch.ops.adakernels.gated_conv2d_backward)(dense_backward_flops)


def gated_conv2d_flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    policy: Tensor | None = None,  # [N, C_out] | [N, C_out, 3]
    *,
    frames: int = 1,
    output_size: Sequence[int],
    groups: int = 1,
    in_policy: Tensor | None = None,  # [N, C_in]
) -> tuple[float, Tensor]:  # [N]
    """Multiply-adds of one frame computed densely, and those of every frame under its policies.

    Frame t costs H' W' kh kw times the pairs of an output channel that is kept at t or reused at t+1
    (AdaFuse, Eq. 5) and an input channel of its group that is not marked SKIP. The count is differentiable in
    a float policy.

    Args:
        input_shape: [N, C_in, H, W].
        weight_shape: [C_out, C_in/groups, kh, kw].
        policy: as in `gated_conv2d`.
        frames: clip length.
        output_size: (H', W').
        groups: number of channel groups.
        in_policy: as in `gated_conv2d`.

    Returns:
        The dense count of a frame, and a float64 [N] tensor of the counts that remain.
    """
    batch, channels = input_shape[:2]
    out_channels = weight_shape[0]
    taps = math.prod(weight_shape[2:]) * math.prod(output_size)
    device = policy.device if policy is not None else in_policy.device if in_policy is not None else None
    needed = torch.full((batch, groups), out_channels / groups, dtype=torch.float64, device=device)
    live = torch.full((batch, groups), channels / groups, dtype=torch.float64, device=device)
    if policy is not None:
        needed = needed_channels(policy, frames).double().unflatten(1, (groups, -1)).sum(-1)
    if in_policy is not None:
        live = (in_policy != Policy.SKIP.value).double().unflatten(1, (groups, -1)).sum(-1)
    return float(out_channels * (channels // groups) * taps), (needed * live).sum(1) * taps


def _predicates(
    input: Facts, weight: Facts, policy: Facts | None, in_policy: Facts | None, groups: int
) -> Mapping[str, backends.Predicate]:
    if in_policy is None and (policy is None or policy[1].is_floating_point):
        return {}
    return conv_predicates("gated_conv2d", input, weight, groups)


def _check(
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    policy: Facts | None,
    in_policy: Facts | None,
    frames: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
) -> ConvArguments:
    op = "gated_conv2d"
    conv = conv_arguments(op, input, weight, bias, stride, padding, dilation, groups, activation, rank=2)
    _checks.check_frames(op, frames, input[0][0])
    if policy is not None:
        _checks.check_channel_policy(op, "policy", policy, input, weight[0][0], "C_out", soft=True)
    if in_policy is not None:
        _checks.check_channel_policy(op, "in_policy", in_policy, input, input[0][1], "C_in", soft=False)
    return conv


class _Plan(NamedTuple):
    backend: str
    conv: ConvArguments


@_checks.planned("input", "weight", "bias?", "policy?", "in_policy?")
def _plan(
    requested: str,
    op: str,
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    policy: Facts | None,
    in_policy: Facts | None,
    *arguments: Any,
) -> _Plan:
    """Validate a call and choose its backend."""
    conv = _check(input, weight, bias, policy, in_policy, *arguments)
    predicates = _predicates(input, weight, policy, in_policy, conv.groups)
    return _Plan(backends.choose(requested, predicates), conv)


def gated_conv2d(
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None = None,  # [C_out]
    policy: Tensor | None = None,  # [N, C_out] | [N, C_out, 3]
    *,
    frames: int = 1,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    in_policy: Tensor | None = None,  # [N, C_in]
    activation: str | None = None,
) -> Tensor:  # [N, C_out, H', W']
    """2D convolution over clips whose output channels are kept, reused from the previous frame or skipped.

    With y = activation(conv2d(input, weight) + bias), channel c of frame t of a clip is y_t where `policy` is
    KEEP, y_{t-1} where it is REUSE (zero in the first frame) and 0 where it is SKIP. Only the channels
    of frame t that are kept at t or reused at t+1 are computed, forward and backward.
    Source: AdaFuse (Meng et al., ICLR 2021), Eq. 2 and 5.

    Args:
        input: [N, C_in, H, W], contiguous or channels last; N = clips * frames with frame t of clip b in row
            b * frames + t.
        weight: [C_out, C_in/groups, kh, kw], of the input's dtype.
        bias: [C_out] or None.
        policy: None for a plain convolution; integer [N, C_out] of `Policy` values, through which no gradient
            flows; or floating point [N, C_out, 3] weights in the order keep, reuse, skip (one-hot or soft),
            which get gradients, are converted to the input's dtype and make the computation dense.
        frames: clip length T.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        in_policy: integer [N, C_in]; input channels marked SKIP count as zeros, are not read and get zero
            gradient.
        activation: None, "relu", "relu6" or "silu".

    Returns:
        [N, C_out, H', W'] in the input's dtype and memory format.

    Raises:
        ValueError, TypeError: for a wrong rank, shape, dtype, device, range or combination, or a policy value
            outside 0..2 (looked at on the CPU always, elsewhere with `ADAKERNELS_DEBUG=1`).
    """
    return gated_conv2d_with(
        None,
        input,
        weight,
        bias,
        policy,
        frames=frames,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        in_policy=in_policy,
        activation=activation,
    )


def gated_conv2d_with(
    kernel_source: KernelSource | None,
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None,  # [C_out]
    policy: Tensor | None,  # [N, C_out] | [N, C_out, 3]
    *,
    frames: int,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    in_policy: Tensor | None,  # [N, C_in]
    activation: str | None,
) -> Tensor:  # [N, C_out, H', W']
    """`gated_conv2d`, in inference on the CPU with the kernels that `kernel_source` gives for `weight`."""
    input, weight, bias = autocast(input, weight, bias)
    backend, conv = _plan(
        "gated_conv2d",
        input,
        weight,
        bias,
        policy,
        in_policy,
        frames,
        stride,
        padding,
        dilation,
        groups,
        activation,
    )
    if flops.counting and not torch.compiler.is_compiling():
        flops.record(
            "gated_conv2d",
            *gated_conv2d_flops(
                input.shape,
                weight.shape,
                policy,
                frames=frames,
                output_size=conv.output,
                groups=groups,
                in_policy=in_policy,
            ),
        )
    if conv.pad:
        input = F.pad(input, conv.pad)
    return _run(backend, conv, kernel_source, input, weight, bias, policy, in_policy, frames)


def _run(
    backend: str,
    conv: ConvArguments,
    kernel_source: KernelSource | None,
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None,  # [C_out]
    policy: Tensor | None,  # [N, C_out] | [N, C_out, 3]
    in_policy: Tensor | None,  # [N, C_in]
    frames: int,
) -> Tensor:  # [N, C_out, H', W']
    if policy is None and in_policy is None:
        output = activate(F.conv2d(input, weight, bias, *conv[:4]), ACTIVATIONS[conv.activation])
        return dense(output, like=input)
    if policy is not None and is_soft(policy):
        output = _run(backend, conv, kernel_source, input, weight, bias, None, in_policy, frames)
        return temporal_fuse(output, policy, frames=frames)
    if backend == "reference":
        output = gated_conv2d_reference(
            input,
            weight,
            bias,
            None if policy is None else checked_policy(policy, "gated_conv2d", "policy"),
            frames=frames,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            in_policy=None if in_policy is None else checked_policy(in_policy, "gated_conv2d", "in_policy"),
            activation=ACTIVATIONS[conv.activation],
        )
        return dense(output, like=input)
    policies = tuple(None if given is None else as_index(given) for given in (policy, in_policy))
    kernels = kept_kernels(kernel_source, input, weight, *conv[:4])
    if kernels is not None:
        stride, padding = conv.stride[0], conv.padding
        return call(
            winograd_conv2d, dense(input), kernels, bias, *policies, frames, stride, padding, conv.activation
        )
    return call(_operator, dense(input), weight, bias, *policies, frames, *conv[:4], conv.activation)


@backends.explains(gated_conv2d)
def _explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    policy: Tensor | None = None,
    *,
    frames: int = 1,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    in_policy: Tensor | None = None,
    activation: str | None = None,
) -> Mapping[str, backends.Predicate]:
    op = "gated_conv2d"
    tensors = (
        facts(op, "input", input),
        facts(op, "weight", weight),
        optional_facts(op, "bias", bias),
        optional_facts(op, "policy", policy),
        optional_facts(op, "in_policy", in_policy),
    )
    _check(*tensors, frames, stride, padding, dilation, groups, activation)
    return _predicates(*tensors[:2], *tensors[3:], groups)

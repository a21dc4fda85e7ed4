"""gated_conv2d in Triton: the policies become the domain of the convolution core."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adakernels.ops._conv_arguments import empty_output
from adakernels.triton.convolve import (
    Geometry,
    bias_gradient,
    convolve,
    input_gradient,
    weight_gradient,
)
from adakernels.triton.domain import Domain, build_domain
from adakernels.triton.temporal_fuse import temporal_fuse_backward


def gated_conv2d(
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None,  # [C_out]
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    frames: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:  # [N, C_out, H', W']
    output = empty_output(input, weight, stride, padding, dilation)
    geometry = Geometry(weight.shape[2:], stride, padding, dilation, groups)
    convolve(
        output,
        input,
        weight,
        bias,
        geometry,
        build_domain(policy, in_policy, frames) if groups == 1 else Domain(),
        policy=policy,
        in_policy=in_policy,
        frames=frames,
        activation=activation,
    )
    return output


def gated_conv2d_backward(
    grad_output: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    frames: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grad_input: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, C_in, H, W], [C_out, C_in/groups, kh, kw], [C_out]
    # From here on a frame's gradient is that of what it computed, also of what the next frame reused.
    grad = grad_output
    if policy is not None:
        grad = temporal_fuse_backward(grad_output, grad_output, policy, frames, True, False)[0]
    geometry = Geometry(weight.shape[2:], stride, padding, dilation, groups)
    domain = build_domain(policy, in_policy, frames) if groups == 1 else Domain()
    to_input, to_weight = input.new_empty(0), weight.new_empty(0)
    if grad_input:
        swapped = Domain(*domain[2:4], *domain[:2])
        to_input = input_gradient(grad, input, weight, geometry, swapped, in_policy=in_policy)
    if grad_weight:
        policies = {"policy": policy, "in_policy": in_policy}
        to_weight = weight_gradient(grad, input, weight, geometry, domain, frames=frames, **policies)
    return to_input, to_weight, bias_gradient(grad, domain) if grad_bias else weight.new_empty(0)

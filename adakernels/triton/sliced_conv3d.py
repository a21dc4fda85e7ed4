"""sliced_conv3d in Triton: flags and clip bounds become the taps in time that each frame visits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adakernels.triton.convolve import (
    Geometry,
    bias_gradient,
    convolve,
    input_gradient,
    weight_gradient,
)


def sliced_conv3d(
    input: Tensor,  # [B, C_in, T, H, W] | [sum T, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    temporal: Tensor | None,  # [B]
    frame_offsets: Tensor | None,  # [B + 1]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:  # [B, C_out, T', H', W'] | [sum T, C_out, H', W']
    geometry = Geometry(weight.shape[2:], stride, padding, dilation, groups, frame_offsets is not None)
    output = geometry.empty_output(input, weight)
    domain = geometry.domain(output, input, temporal, frame_offsets)
    convolve(output, input, weight, bias, geometry, domain, activation=activation)
    return output


def sliced_conv3d_backward(
    grad_output: Tensor,  # [B, C_out, T', H', W'] | [sum T, C_out, H', W']
    input: Tensor,  # [B, C_in, T, H, W] | [sum T, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    temporal: Tensor | None,  # [B]
    frame_offsets: Tensor | None,  # [B + 1]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grad_input: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # as input, as weight, [C_out]
    geometry = Geometry(weight.shape[2:], stride, padding, dilation, groups, frame_offsets is not None)
    domain = geometry.domain(grad_output, input, temporal, frame_offsets)
    to_input, to_weight = input.new_empty(0), weight.new_empty(0)
    if grad_input:
        swapped = geometry.domain(input, grad_output, temporal, frame_offsets, TRANSPOSED=True)
        to_input = input_gradient(grad_output, input, weight, geometry, swapped)
    if grad_weight:
        to_weight = weight_gradient(grad_output, input, weight, geometry, domain)
    return to_input, to_weight, bias_gradient(grad_output, domain) if grad_bias else weight.new_empty(0)

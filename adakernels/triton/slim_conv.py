"""slim_conv in Triton: the convolution core reads the selected part of the weight where it lies."""

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


def slim_conv(
    input: Tensor,  # [N, C, H, W] | [B, C, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    bias: Tensor | None,  # [C_out]
    out_channels: int,
    segments: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:  # [N, out_channels, H', W'] | [B, out_channels, T', H', W']
    geometry = Geometry(weight.shape[2:], stride, padding, dilation, groups)
    weight, bias = weight[:out_channels], None if bias is None else bias[:out_channels]
    output = geometry.empty_output(input, weight)
    domain = geometry.domain(output, input)
    convolve(output, input, weight, bias, geometry, domain, activation=activation, segments=segments)
    return output


def slim_conv_backward(
    grad_output: Tensor,  # [N, out_channels, H', W'] | [B, out_channels, T', H', W']
    input: Tensor,  # [N, C, H, W] | [B, C, T, H, W]
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
) -> tuple[Tensor, Tensor, Tensor]:  # as input, weight and bias
    geometry = Geometry(weight.shape[2:], stride, padding, dilation, groups)
    domain = geometry.domain(grad_output, input)
    to_input, to_weight, to_bias = input.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if grad_input:
        swapped = geometry.domain(input, grad_output, TRANSPOSED=True)
        used = weight[:out_channels]
        to_input = input_gradient(grad_output, input, used, geometry, swapped, segments=segments)
    if grad_weight:
        # What is not used has no gradient.
        to_weight = weight.new_zeros(weight.shape)
        used = weight[:out_channels, : input.shape[1]]
        found = weight_gradient(grad_output, input, used, geometry, domain)
        for start, stop in zip(segments[::2], segments[1::2], strict=True):
            to_weight[:out_channels, start:stop], found = found.tensor_split([stop - start], 1)
    if grad_bias:
        to_bias = weight.new_zeros(len(weight))
        to_bias[:out_channels] = bias_gradient(grad_output, domain)
    return to_input, to_weight, to_bias

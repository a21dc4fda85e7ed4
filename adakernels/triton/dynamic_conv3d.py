"""dynamic_conv3d in Triton: gates become the frames and channels that are computed; the others are made."""

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
from adakernels.triton.reconstruction import Reconstruction


def _computed(
    input: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    gates: tuple[Tensor | None, Tensor | None],  # [B, S_t], [B, S_c]
    geometry: Geometry,
) -> Tensor:  # [B, C_out, T', H', W']
    """The convolution for the frames and first channels that some live branch takes; the rest is left."""
    output = geometry.empty_output(input, weight)
    domain = geometry.domain(output, input, gates=gates)
    convolve(output, input, weight, bias, geometry, domain)
    return output


def dynamic_conv3d(
    input: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    temporal_gate: Tensor | None,  # [B, S_t]
    channel_gate: Tensor | None,  # [B, S_c]
    temporal_weight: Tensor | None,  # [2^(S_t-1) - 1, C_out, k, k]
    channel_weight: Tensor | None,  # [C_out, k, k]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:  # [B, C_out, T', H', W']
    geometry = Geometry(weight.shape[2:], stride, padding, dilation, groups)
    computed = _computed(input, weight, bias, (temporal_gate, channel_gate), geometry)
    made = Reconstruction(temporal_gate, channel_gate, temporal_weight, channel_weight)
    return made.output(computed, activation)


def dynamic_conv3d_backward(
    grad_output: Tensor,  # [B, C_out, T', H', W']
    input: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    temporal_gate: Tensor | None,  # [B, S_t]
    channel_gate: Tensor | None,  # [B, S_c]
    temporal_weight: Tensor | None,  # [2^(S_t-1) - 1, C_out, k, k]
    channel_weight: Tensor | None,  # [C_out, k, k]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grad_input: bool,
    grad_weight: bool,
    grad_bias: bool,
    grad_temporal_gate: bool,
    grad_channel_gate: bool,
    grad_temporal_weight: bool,
    grad_channel_weight: bool,
) -> tuple[Tensor, ...]:  # as input, weight, bias, both gates and both of their weights
    geometry, gates = (
        Geometry(weight.shape[2:], stride, padding, dilation, groups),
        (temporal_gate, channel_gate),
    )
    made = Reconstruction(*gates, temporal_weight, channel_weight)
    none = weight.new_empty(0)
    grads: list[Tensor] = [none] * 7
    of_features = made.feature_gradient(grad_output)
    of_frames = grad_temporal_gate, grad_temporal_weight
    of_channels = grad_channel_gate, grad_channel_weight
    if any(of_frames) or any(of_channels):
        computed = _computed(input, weight, bias, gates, geometry)
        for first, wanted, grad in ((3, of_frames, grad_output), (4, of_channels, of_features)):
            if any(wanted):
                found = made.gradients(grad, computed, CHANNELS=first == 4)
                grads[first::2] = [grad if want else none for grad, want in zip(found, wanted, strict=True)]
    grad = made.computed_gradient(of_features)
    domain = geometry.domain(grad, input, gates=gates)
    if grad_input:
        swapped = geometry.domain(input, grad, gates=gates, TRANSPOSED=True)
        grads[0] = input_gradient(grad, input, weight, geometry, swapped)
    if grad_weight:
        grads[1] = weight_gradient(grad, input, weight, geometry, domain)
    if grad_bias:
        grads[2] = bias_gradient(grad, domain)
    return tuple(grads)

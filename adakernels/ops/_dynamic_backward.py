"""Gradients of dynamic_conv3d on the CPU, from torch's operators on just what each clip has computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adakernels.ops._layout import dense
from adakernels.ops._library import library
from adakernels.ops.dynamic_conv3d import clips_alike, computed_box, computed_channels, filtered


@torch.library.impl(library, "dynamic_conv3d_backward", "CPU")
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
    *wanted: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the seven tensors, each empty where it is not wanted."""
    tensors = (input, weight, bias, temporal_gate, channel_gate, temporal_weight, channel_weight)
    # Sums are kept in float32, whatever the dtype.
    grads = [
        torch.zeros((0,) if tensor is None or not want else tensor.shape)
        for tensor, want in zip(tensors, wanted, strict=True)
    ]
    weight_, bias_, frame_filters, channel_filters = (
        None if tensor is None else tensor.float() for tensor in (weight, bias, *tensors[5:])
    )
    assert weight_ is not None
    channels = weight.shape[0]

    for clips, temporal_levels, channel_levels in clips_alike(input.shape[0], temporal_gate, channel_gate):
        step, given = 2 ** temporal_levels[0], computed_channels(channels, channel_levels[0])
        conv = (stride, padding, dilation, groups)
        box = computed_box(input[clips].float(), weight_, bias_, *conv, step=step, channels=given)
        frame_gate = torch.ones(len(clips), 1) if temporal_gate is None else temporal_gate[clips].float()
        channel_gate_ = torch.ones(len(clips), 1) if channel_gate is None else channel_gate[clips].float()
        grad = grad_output[clips].float()

        features = mixed = None
        if any(wanted[3:]):
            features = F.conv3d(*box)[:, :given]
            branches = [
                _per_clip(channel_gate_, i) * _all_channels(features, channel_filters, i, channels)
                for i in channel_levels
            ]
            mixed = torch.stack(branches).sum(0)

        grad_mixed = grad.new_zeros(*grad.shape[:2], -(-grad.shape[2] // step), *grad.shape[3:])
        for j in temporal_levels:
            for m in range(min(2**j, grad.shape[2])):
                above = grad[:, :, m :: 2**j]
                # Where the frames that these are made from lie among the computed ones.
                computed = slice(None, above.shape[2] * 2**j // step, 2**j // step)
                kernel = None if m == 0 or frame_filters is None else frame_filters[m - 1]
                grad_mixed[:, :, computed] += _per_clip(frame_gate, j) * _unfiltered(above, kernel)
                if mixed is not None:
                    seen = _correlation(above, mixed[:, :, computed], 1 if kernel is None else len(kernel[0]))
                    _add_to_gate(grads[3], clips, j, seen, kernel)
                    if m > 0 and wanted[5]:
                        grads[5][m - 1] += (frame_gate[:, j, None, None, None] * seen).sum(0)

        grad_features = grad.new_zeros(len(clips), len(box.weight), *grad_mixed.shape[2:])
        for i in channel_levels:
            own = computed_channels(channels, i)
            scale = _per_clip(channel_gate_, i)
            grad_features[:, :own] += scale * grad_mixed[:, :own]
            source = torch.arange(own, channels) % own
            kernel = None if channel_filters is None else channel_filters[own:]
            if len(source) > 0:
                grad_features.index_add_(1, source, scale * _unfiltered(grad_mixed[:, own:], kernel))
            if features is not None:
                _add_to_gate(
                    grads[4], clips, i, _correlation(grad_mixed[:, :own], features[:, :own], 1), None
                )
                if kernel is not None and len(source) > 0:
                    seen = _correlation(grad_mixed[:, own:], features[:, source], len(kernel[0]))
                    _add_to_gate(grads[4], clips, i, seen, kernel)
                    if wanted[6]:
                        grads[6][own:] += (channel_gate_[:, i, None, None, None] * seen).sum(0)

        rows = len(box.weight)
        found = torch.ops.aten.convolution_backward(
            grad_features,
            box.input,
            box.weight,
            None if bias is None else [rows],
            box.stride,
            box.padding,
            box.dilation,
            False,
            [0, 0, 0],
            box.groups,
            wanted[:3],
        )
        if wanted[0]:
            grads[0][clips, : box.input.shape[1]] = found[0]
        for total, part in zip(grads[1:3], found[1:], strict=True):
            if total.numel() > 0:
                total[:rows] += part
    dtypes = ((weight if tensor is None else tensor).dtype for tensor in tensors)
    results = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    if wanted[0]:
        results[0] = dense(results[0], like=input)
    return tuple(results)


def _per_clip(
    gate: Tensor,  # [B, S]
    level: int,
) -> Tensor:  # [B, 1, 1, 1, 1]
    return gate[:, level, None, None, None, None]


def _all_channels(
    features: Tensor,  # [B, C', T, H, W]
    filters: Tensor | None,  # [C, k, k]
    level: int,
    channels: int,
) -> Tensor:  # [B, C, T, H, W]
    """`reconstruct_channels` of features of which there are only those that were computed."""
    given = computed_channels(channels, level)
    if given == channels:
        return features
    assert filters is not None
    made = filtered(features[:, torch.arange(given, channels) % given], filters[given:])
    return torch.cat((features[:, :given], made), 1)


def _unfiltered(
    grad: Tensor,  # [B, C, T, H, W]
    kernel: Tensor | None,  # [C, k, k]
) -> Tensor:  # [B, C, T, H, W]
    """The gradient of what was filtered, from that of the result."""
    return grad if kernel is None else filtered(grad, kernel.flip(1, 2))


def _correlation(
    grad: Tensor,  # [B, C, T, H, W]
    source: Tensor,  # [B, C, T, H, W]
    size: int,
) -> Tensor:  # [B, C, k, k]
    """The sums over a clip of the products of a result's gradient and what each tap of its filter read."""
    half = size // 2
    padded = F.pad(source, (half, half, half, half))
    height, width = source.shape[3:]
    taps = [
        (grad * padded[..., y : y + height, x : x + width]).sum((2, 3, 4))
        for y in range(size)
        for x in range(size)
    ]
    return torch.stack(taps, -1).unflatten(-1, (size, size))


def _add_to_gate(
    total: Tensor,  # [B, S], or empty where it is not wanted
    clips: Tensor,  # [N]
    level: int,
    seen: Tensor,  # [N, C, k, k]
    kernel: Tensor | None,  # [C, k, k]
) -> None:
    if total.numel() > 0:
        total[clips, level] += (seen if kernel is None else seen * kernel).sum((1, 2, 3))

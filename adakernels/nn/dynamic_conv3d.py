"""3D convolution that computes some frames and channels of a clip and makes the others from them."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakernels import flops
from adakernels.nn._conv_norm_act import ACTIVATIONS, ConvNormAct
from adakernels.ops import _checks, dynamic_conv3d, dynamic_conv3d_flops
from adakernels.ops._conv_arguments import autocast
from adakernels.ops._layout import dense
from adakernels.ops.dynamic_conv3d import (
    MAX_LEVELS,
    clips_alike,
    computed_box,
    computed_channels,
    filtered,
)

_Triple: TypeAlias = int | tuple[int, int, int]


class ChannelFilters(nn.Module):
    """The default Φ_c of VA-RED²: channel c is channel c mod C', of C' computed ones, filtered by a kernel of
    its own.

    Args:
        channels: output channels C of the convolution.
        size: 1 or 3, of the kernels. They start as copies of what they filter.
    """

    def __init__(
        self,
        channels: int,
        size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(_identity((channels, size, size), device, dtype))

    def forward(
        self,
        computed: Tensor,  # [B, C', T, H, W]
        level: int,
    ) -> Tensor:
        """The channels that are not computed at this level, [B, C - C', T, H, W]."""
        channels, given = len(self.weight), computed.shape[1]
        source = torch.arange(given, channels, device=computed.device) % given
        return filtered(computed[:, source], self.weight[given:])


class FrameFilters(nn.Module):
    """The default Φ_t of VA-RED²: a frame between computed ones is the one before it, filtered.

    Args:
        channels: output channels C of the convolution.
        levels: temporal levels, 2 or 3.
        size: 1 or 3, of the kernels. They start as copies of what they filter.
    """

    def __init__(
        self,
        channels: int,
        levels: int = 2,
        size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(_identity((2 ** (levels - 1) - 1, channels, size, size), device, dtype))

    def forward(
        self,
        computed: Tensor,  # [B, C, T', H, W]
        level: int,
    ) -> Tensor:
        """The 2^level - 1 frames after each computed one, [B, C, T', 2^level - 1, H, W]."""
        return torch.stack([filtered(computed, kernels) for kernels in self.weight[: 2**level - 1]], 3)


def _identity(shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    weight = torch.zeros(shape, device=device, dtype=dtype)
    weight[..., shape[-1] // 2, shape[-1] // 2] = 1
    return weight


class DynamicConv3d(ConvNormAct, nn.Conv3d):
    """`torch.nn.Conv3d` that computes, per clip, some frames and channels and makes the others from them.

    Takes the constructor arguments of `torch.nn.Conv3d`, has its `state_dict` keys next to those of the
    reconstruction, and is that module when called without gates (in inference on the CPU, by the fastest
    kernel there is, which may round otherwise).
    Source: VA-RED² (Pan et al., ICLR 2021), Eq. 1-5 and 7.

    Args:
        temporal_levels: 1 to 3; at level j every 2^j-th frame is computed.
        channel_levels: 1 to 3; at level i the first C_out / 2^i channels, rounded up, are computed.
        filter_size: 1 or 3, of the kernels of `FrameFilters` and `ChannelFilters`.
        temporal_phi: what makes frames instead of `FrameFilters`: any module that takes features
            [B, C_out, T', H, W] and a level and gives the 2^level - 1 frames after each, [B, C_out, T',
            2^level - 1, H, W]. Those behind the end of the clip are dropped.
        channel_phi: what makes channels instead of `ChannelFilters`: any module that takes features
            [B, C', T', H, W] and a level and gives the other channels, [B, C_out - C', T', H, W].
        norm: normalisation of the computed features, before the others are made from them: a module, or a
            callable that makes one from the number of channels (`torch.nn.BatchNorm3d`). Its keys are
            `norm.*`. A batch normalisation in evaluation mode is folded into the weights.
        activation: None, "relu", "relu6" or "silu", applied to the sum of all branches.

    Raises:
        ValueError: for an unknown activation, or a number of levels or a filter size out of range.
    """

    temporal_phi: nn.Module | None
    channel_phi: nn.Module | None

    def __init__(
        self,
        *args: Any,
        temporal_levels: int = 2,
        channel_levels: int = 2,
        filter_size: int = 3,
        temporal_phi: nn.Module | None = None,
        channel_phi: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, levels in (("temporal_levels", temporal_levels), ("channel_levels", channel_levels)):
            if not 1 <= levels <= MAX_LEVELS:
                raise ValueError(f"DynamicConv3d: expected {name} to be 1 to {MAX_LEVELS}, got {levels}")
        if filter_size not in (1, 3):
            raise ValueError(f"DynamicConv3d: expected filter_size to be 1 or 3, got {filter_size}")
        made = self.weight.device, self.weight.dtype
        if temporal_phi is None and temporal_levels > 1:
            temporal_phi = FrameFilters(self.out_channels, temporal_levels, filter_size, *made)
        if channel_phi is None and channel_levels > 1:
            channel_phi = ChannelFilters(self.out_channels, filter_size, *made)
        self.temporal_levels = temporal_levels
        self.channel_levels = channel_levels
        self.temporal_phi = temporal_phi
        self.channel_phi = channel_phi

    def forward(
        self,
        input: Tensor,  # [B, C_in, T, H, W]
        temporal_gate: Tensor | None = None,  # [B, temporal_levels]
        channel_gate: Tensor | None = None,  # [B, channel_levels]
    ) -> Tensor:
        """Convolution, normalisation, reconstruction and activation, as `ak.dynamic_conv3d`.

        With a Φ of another class than the default ones, clips of one set of live levels are computed together
        by torch's operators, which have to read the gates.

        Args:
            temporal_gate, channel_gate: non-negative weights of the levels; None is level 0.

        Returns:
            [B, C_out, T', H', W'].
        """
        return dynamic_conv_norm_act(self, self.norm, self.activation, input, temporal_gate, channel_gate)

    def extra_repr(self) -> str:
        """The arguments of the convolution, the activation if there is one, and the levels."""
        return f"{super().extra_repr()}, levels={self.temporal_levels}x{self.channel_levels}"


def dynamic_conv_norm_act(
    conv: DynamicConv3d,
    norm: nn.Module | None,
    activation: str | None,
    input: Tensor,  # [B, C_in, T, H, W]
    temporal_gate: Tensor | None = None,  # [B, S_t]
    channel_gate: Tensor | None = None,  # [B, S_c]
) -> Tensor:
    """`conv` with a norm and an activation that it need not hold itself.

    Where `norm` is an affine map with fixed coefficients it is folded into the weights, and only what the
    gates ask for is computed. Batch statistics need every frame and channel: then the convolution is dense.

    Returns:
        [B, C_out, T', H', W'].
    """
    gates = temporal_gate, channel_gate
    folded = conv.with_norm(norm)
    if folded is not None:
        return _conv_act(conv, *folded, activation, input, *gates)
    assert norm is not None
    features = norm(_conv_act(conv, conv.weight, conv.bias, None, input, None, None))
    if temporal_gate is None and channel_gate is None:
        return ACTIVATIONS[activation](features)
    # A convolution that copies what is there: the reconstruction alone.
    copy = features.new_ones(features.shape[1], 1, 1, 1, 1)
    return _reconstructed(conv, features, copy, None, activation, *gates, {"groups": len(copy)})


def _conv_act(
    conv: DynamicConv3d,
    weight: Tensor,  # [C_out, C_in / groups, k_t, k_h, k_w]
    bias: Tensor | None,  # [C_out]
    activation: str | None,
    input: Tensor,  # [B, C_in, T, H, W]
    temporal_gate: Tensor | None,  # [B, S_t]
    channel_gate: Tensor | None,  # [B, S_c]
) -> Tensor:
    if temporal_gate is None and channel_gate is None:
        return conv.conv_act("dynamic_conv3d", input, weight, bias, activation)
    arguments: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        arguments["padding"] = 0
    return _reconstructed(conv, input, weight, bias, activation, temporal_gate, channel_gate, arguments)


def _reconstructed(
    conv: DynamicConv3d,
    input: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in / groups, k_t, k_h, k_w]
    bias: Tensor | None,  # [C_out]
    activation: str | None,
    temporal_gate: Tensor | None,  # [B, S_t]
    channel_gate: Tensor | None,  # [B, S_c]
    arguments: dict[str, Any],
) -> Tensor:  # [B, C_out, T', H', W']
    frames, channels = conv.temporal_phi, conv.channel_phi
    if type(frames) in (FrameFilters, type(None)) and type(channels) in (ChannelFilters, type(None)):
        return dynamic_conv3d(
            input,
            weight,
            bias,
            temporal_gate,
            channel_gate,
            temporal_weight=frames.weight if isinstance(frames, FrameFilters) else None,
            channel_weight=channels.weight if isinstance(channels, ChannelFilters) else None,
            activation=activation,
            **arguments,
        )
    return _by_modules(conv, input, weight, bias, activation, temporal_gate, channel_gate, arguments)


def _by_modules(
    conv: DynamicConv3d,
    input: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in / groups, k_t, k_h, k_w]
    bias: Tensor | None,  # [C_out]
    activation: str | None,
    temporal_gate: Tensor | None,  # [B, S_t]
    channel_gate: Tensor | None,  # [B, S_c]
    arguments: dict[str, Any],
) -> Tensor:  # [B, C_out, T', H', W']
    """What the operator does, by torch's operators and with the modules that `conv` has as Φ."""
    for gate, name in ((temporal_gate, "temporal_gate"), (channel_gate, "channel_gate")):
        if gate is not None:
            _checks.checked_weights(gate, "DynamicConv3d", name)
    given = input
    input, weight, bias = autocast(input, weight, bias)
    padding = arguments.get("padding", 0)
    if isinstance(padding, str):
        input, padding = F.pad(input, conv._reversed_padding_repeated_twice), 0
    geometry: dict[str, Any] = (
        {"stride": (1, 1, 1), "dilation": (1, 1, 1), "groups": 1} | arguments | {"padding": padding}
    )
    shape = F.conv3d(input.to("meta"), weight.to("meta"), **geometry).shape
    if flops.counting:
        work = dynamic_conv3d_flops(
            weight.shape, temporal_gate, channel_gate, batch=len(input), output_size=shape[2:]
        )
        flops.record("dynamic_conv3d", *work)
    one = input.new_ones(len(input), 1)
    output = input.new_zeros(shape)
    for clips, temporal, channel in clips_alike(len(input), temporal_gate, channel_gate):
        step, channels = 2 ** temporal[0], computed_channels(len(weight), channel[0])
        box = computed_box(input[clips], weight, bias, **geometry, step=step, channels=channels)
        features = F.conv3d(*box)[:, :channels]
        frame_weights, channel_weights = (
            (one if gate is None else gate)[clips].to(input.dtype)[..., None, None, None, None]
            for gate in (temporal_gate, channel_gate)
        )
        mixed = torch.stack([channel_weights[:, i] * _with_channels(conv, features, i) for i in channel]).sum(
            0
        )
        made = [
            frame_weights[:, j] * _with_frames(conv, mixed[:, :, :: 2**j // step], j, shape[2])
            for j in temporal
        ]
        clips = clips.to(output.device)
        output = output.index_copy(0, clips, torch.stack(made).sum(0).to(output.dtype))
    if torch.is_grad_enabled() and not output.requires_grad:
        # Where no clip has a live level there are gradients all the same, of zero.
        tensors = [x for x in (input, weight, bias, temporal_gate, channel_gate) if x is not None]
        output = output + torch.stack([x[:0].sum().to(output) for x in tensors]).sum()
    return ACTIVATIONS[activation](dense(output, like=given))


def _with_channels(
    conv: DynamicConv3d,
    computed: Tensor,  # [B, C', T, H, W]
    level: int,
) -> Tensor:  # [B, C_out, T, H, W]
    computed = computed[:, : computed_channels(conv.out_channels, level)]
    if level == 0:
        return computed
    assert conv.channel_phi is not None
    return torch.cat((computed, conv.channel_phi(computed, level)), 1)


def _with_frames(
    conv: DynamicConv3d,
    computed: Tensor,  # [B, C_out, T', H, W]
    level: int,
    frames: int,
) -> Tensor:  # [B, C_out, frames, H, W]
    if level == 0:
        return computed
    assert conv.temporal_phi is not None
    groups = torch.cat((computed.unsqueeze(3), conv.temporal_phi(computed, level)), 3)
    return groups.flatten(2, 3)[:, :, :frames]

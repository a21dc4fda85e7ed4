"""3D convolution that takes only its temporal centre tap for the clips that need no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias, cast, overload

import torch.nn.functional as F
from torch import Tensor, nn

from adakernels import flops
from adakernels.nn._conv_norm_act import ACTIVATIONS, ConvNormAct
from adakernels.nn.packed_clips import PackedClips
from adakernels.ops import sliced_conv3d, sliced_conv3d_flops
from adakernels.ops._conv_arguments import autocast
from adakernels.ops.sliced_conv3d import checked_packed_clips

_Triple: TypeAlias = int | tuple[int, int, int]


class SlicedConv3d(ConvNormAct, nn.Conv3d):
    """`torch.nn.Conv3d` that a clip may have with all temporal taps or with the centre one (Ada3D, §3.2).

    Takes the constructor arguments of `torch.nn.Conv3d`, has its `state_dict` keys, and is that module when
    called with a tensor alone (in inference on the CPU, by the fastest kernel for it, which may round
    otherwise).

    Args:
        norm: normalisation of the computed features: a module, or a callable that makes one from the number
            of channels (`torch.nn.BatchNorm3d`). Its keys are `norm.*`. A batch normalisation in evaluation
            mode is folded into the weights.
        activation: None, "relu", "relu6" or "silu", applied after `norm`.

    Raises:
        ValueError: for an unknown activation.
    """

    @overload
    def forward(self, input: Tensor, temporal: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, input: PackedClips, temporal: Tensor | None = None) -> PackedClips: ...

    def forward(
        self,
        input: Tensor | PackedClips,  # [B, C_in, T, H, W] | [sum T, C_in, H, W]
        temporal: Tensor | None = None,  # [B]
    ) -> Tensor | PackedClips:
        """Convolution, normalisation and activation, as `ak.sliced_conv3d`.

        Args:
            input: clips of one length, or packed ones.
            temporal: bool [B]; False takes the centre tap only. None takes all taps.

        Returns:
            [B, C_out, T', H', W'], or packed [sum T, C_out, H', W'].

        Raises:
            ValueError, TypeError: as `ak.sliced_conv3d`; for packed clips with a padding of other than zeros.
        """
        return sliced_conv_norm_act(self, self.norm, self.activation, input, temporal)


@overload
def sliced_conv_norm_act(
    conv: SlicedConv3d, norm: nn.Module | None, activation: str | None, input: Tensor, temporal: Tensor | None
) -> Tensor: ...


@overload
def sliced_conv_norm_act(
    conv: SlicedConv3d,
    norm: nn.Module | None,
    activation: str | None,
    input: PackedClips,
    temporal: Tensor | None,
) -> PackedClips: ...


def sliced_conv_norm_act(
    conv: SlicedConv3d,
    norm: nn.Module | None,
    activation: str | None,
    input: Tensor | PackedClips,  # [B, C_in, T, H, W] | [sum T, C_in, H, W]
    temporal: Tensor | None = None,  # [B]
) -> Tensor | PackedClips:
    """`activation(norm(conv(input, temporal)))`, for a norm that `conv` need not hold itself.

    Where `norm` is an affine map with fixed coefficients it is folded into the weights.

    Returns:
        [B, C_out, T', H', W'], or packed [sum T, C_out, H', W'].
    """
    folded = conv.with_norm(norm)
    if folded is not None:
        if isinstance(input, Tensor):
            return _clips(conv, *folded, activation, input, temporal)
        return _packed(conv, *folded, activation, input, temporal)
    assert norm is not None
    if isinstance(input, Tensor):
        return ACTIVATIONS[activation](norm(_clips(conv, conv.weight, conv.bias, None, input, temporal)))
    output = _packed(conv, conv.weight, conv.bias, None, input, temporal)
    # As clips of one frame, which a normalisation over all of a batch does not tell apart.
    return output.map(lambda frames: ACTIVATIONS[activation](norm(frames.unsqueeze(2)).squeeze(2)))


def _clips(
    conv: SlicedConv3d,
    weight: Tensor,  # [C_out, C_in / groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    activation: str | None,
    input: Tensor,  # [B, C_in, T, H, W]
    temporal: Tensor | None,  # [B]
) -> Tensor:  # [B, C_out, T', H', W']
    if temporal is None:
        return conv.conv_act("sliced_conv3d", input, weight, bias, activation)
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    return sliced_conv3d(
        input,
        weight,
        bias,
        temporal,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        activation=activation,
    )


def _packed(
    conv: SlicedConv3d,
    weight: Tensor,  # [C_out, C_in / groups, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    activation: str | None,
    clips: PackedClips,
    temporal: Tensor | None,  # [B]
) -> PackedClips:
    if conv.padding_mode != "zeros":
        raise ValueError(
            f"SlicedConv3d: expected padding_mode 'zeros' with packed clips, got {conv.padding_mode!r}"
        )
    pads_in_time = not isinstance(conv.padding, str) and conv.padding[0] > 0
    if conv.kernel_size[0] == 1 and conv.stride[0] == 1 and not pads_in_time:
        clips = _frame_by_frame(conv, weight, bias, activation, clips, temporal)
    else:
        frames = sliced_conv3d(
            clips.frames,
            weight,
            bias,
            temporal,
            stride=conv.stride,
            padding=cast(Any, conv.padding),
            dilation=conv.dilation,
            groups=conv.groups,
            frame_offsets=clips.offsets,
            activation=activation,
        )
        clips = replace(clips, frames=frames)
    if flops.counting and clips.length is not None:
        flops.stretch_last(clips.length * clips.batch / max(1, len(clips.frames)))
    return clips


def _frame_by_frame(
    conv: SlicedConv3d,
    weight: Tensor,  # [C_out, C_in / groups, 1, kh, kw]
    bias: Tensor | None,  # [C_out]
    activation: str | None,
    clips: PackedClips,
    temporal: Tensor | None,  # [B]
) -> PackedClips:
    frames, weight, bias = autocast(clips.frames, weight, bias)
    # Nothing here depends on the flags and offsets, but what comes later may.
    arguments = *conv.geometry(3), activation
    offsets = checked_packed_clips(frames, weight, bias, temporal, clips.offsets, *arguments)
    taps = weight.squeeze(2)
    output = conv.conv_act_on_cpu("sliced_conv3d", frames, taps, bias, activation)
    if output is None:
        output = ACTIVATIONS[activation](F.conv2d(frames, taps, bias, *conv.geometry(2)))
    if flops.counting:
        counts = sliced_conv3d_flops(
            weight.shape,
            batch=clips.batch,
            output_size=(len(output), *output.shape[2:]),
            frame_offsets=offsets,
        )
        flops.record("conv3d", *counts)
    return replace(clips, frames=output, offsets=offsets)

"""The cheap reconstruction of dynamic_conv3d: channels made from channels, frames made from frames."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adakernels.triton.configurations import configuration
from adakernels.triton.convolution import activate
from adakernels.triton.convolve import Geometry, format_name
from adakernels.triton.domain import lowest_live_level

# Frames are split so that there are about that many programs of a gradient of the filters.
PROGRAMS = 512


@triton.jit
def _is_plain(p_gate, i_clip, levels):
    """Whether no other level than 0 is live, so that the features are those computed, times a number."""
    plain = tl.load(p_gate + i_clip * levels) > 0
    for level in range(1, levels):
        plain = plain & (tl.load(p_gate + i_clip * levels + level) <= 0)
    return plain


@triton.jit
def _given_features(p_features, p_computed, p_channel_gate, i_clip, channel_levels):
    """Where a clip's features with all channels are, and the factor that they lack."""
    factor = 1.0
    if p_computed is not None:
        plain = _is_plain(p_channel_gate, i_clip, channel_levels)
        p_features = tl.where(plain, p_computed, p_features)
        factor = tl.where(plain, tl.load(p_channel_gate + i_clip * channel_levels), 1.0)
    return p_features, factor


@triton.jit
def reconstruction_kernel(
    p_output,  # [B, C, T, H, W]
    p_features,  # [B, C, T, H, W]
    p_computed,  # [B, C, T, H, W]
    p_filters,  # [C, k, k] | [2^(S_t-1) - 1, C, k, k]
    p_temporal_gate,  # [B, S_t]
    p_channel_gate,  # [B, S_c]
    temporal_levels,
    channel_levels,
    channels,
    frames,
    height,
    width,
    step_clip,
    step_frame,
    step_channel,
    step_pixel,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    b_pixel: tl.constexpr,
    b_channel: tl.constexpr,
):
    """A program has a block of pixels and channels of a frame, of channels with CHANNELS, else of frames.

    Without LAST, only frames that are computed are written, and none of a clip that `_is_plain`.
    With TRANSPOSED it is the gradient of what is computed, given that of everything.
    """
    pixels = height * width
    pixel_blocks = tl.cdiv(pixels, b_pixel)
    channel_blocks = tl.cdiv(channels, b_channel)
    i_pixel = tl.program_id(0) % pixel_blocks * b_pixel + tl.arange(0, b_pixel)
    i_channel = tl.program_id(0) // pixel_blocks % channel_blocks * b_channel + tl.arange(0, b_channel)
    i_row = tl.program_id(0) // pixel_blocks // channel_blocks
    i_clip, i_frame = (i_row // frames).to(tl.int64), i_row % frames
    wanted = i_frame >= 0
    if not LAST:
        level = lowest_live_level(p_temporal_gate, i_clip, temporal_levels, True)
        wanted = (level < temporal_levels) & (i_frame % (1 << level) == 0)
        if CHANNELS:
            if not TRANSPOSED:
                wanted = wanted & (_is_plain(p_channel_gate, i_clip, channel_levels) == 0)
    if CHANNELS:
        p_gate, levels = p_channel_gate + i_clip * channel_levels, channel_levels
    else:
        p_gate, levels = p_temporal_gate + i_clip * temporal_levels, temporal_levels
    p_given, factor = _given_features(p_features, p_computed, p_channel_gate, i_clip, channel_levels)
    p_given += i_clip * step_clip
    y, x = i_pixel // width, i_pixel % width
    value = tl.zeros([b_pixel, b_channel], tl.float32)
    for level in range(tl.where(wanted, levels, 0)):
        weight = tl.load(p_gate + level)
        # How far a made channel or frame is from the given one, at most.
        given = 1 << level
        if CHANNELS:
            given = (channels + given - 1) >> level
        targets = tl.where(weight > 0, 1, 0)
        if TRANSPOSED:
            if CHANNELS:
                targets = tl.where(weight > 0, tl.cdiv(channels, given), 0)
            else:
                targets = tl.where((weight > 0) & (i_frame % given == 0), given, 0)
        for target in range(targets):
            i_read, t = i_channel, i_frame
            m_read = i_channel < channels
            if CHANNELS:
                if TRANSPOSED:
                    i_read = i_channel + target * given
                    m_read = (i_channel < given) & (i_read < channels)
                    made = (i_channel >= 0) & (target > 0)
                    i_filter = i_read
                else:
                    i_read = i_channel % given
                    made = i_channel >= given
                    i_filter = i_channel
            else:
                if TRANSPOSED:
                    t = i_frame + target
                    m_read = m_read & (t < frames)
                    distance = target
                else:
                    distance = i_frame % given
                    t = i_frame - distance
                made = (i_channel >= 0) & (distance > 0)
                i_filter = (distance - 1) * channels + i_channel
            p_frame = p_given + t.to(tl.int64) * step_frame
            some_made = tl.max(made.to(tl.int32), 0) > 0
            for tap in range(tl.where(some_made, SIZE * SIZE, 1)):
                i_tap = tl.where(some_made, tap, SIZE * SIZE // 2)
                tap_y, tap_x = i_tap // SIZE - SIZE // 2, i_tap % SIZE - SIZE // 2
                if TRANSPOSED:
                    in_y, in_x = y - tap_y, x - tap_x
                else:
                    in_y, in_x = y + tap_y, x + tap_x
                m_inside = (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
                m_inside = m_inside & (i_pixel < pixels)
                i_value = ((in_y * width + in_x) * step_pixel)[:, None] + (i_read * step_channel)[None, :]
                kept = tl.where(i_tap == SIZE * SIZE // 2, 1.0, 0.0)
                filter = kept
                if p_filters is not None:
                    p_filter = p_filters + i_filter * (SIZE * SIZE) + i_tap
                    filter = tl.load(p_filter, mask=m_read & made, other=0)
                    filter = tl.where(made, filter.to(tl.float32), kept)
                given_value = tl.load(p_frame + i_value, mask=m_inside[:, None] & m_read[None, :], other=0)
                value += given_value.to(tl.float32) * (filter * (weight * factor))
    i_value = (i_pixel * step_pixel)[:, None] + (i_channel * step_channel)[None, :]
    p_frame = p_output + i_clip * step_clip + i_frame.to(tl.int64) * step_frame
    value = activate(value, ACTIVATION).to(p_output.dtype.element_ty)
    m_value = (i_pixel < pixels)[:, None] & ((i_channel < channels) & wanted)[None, :]
    tl.store(p_frame + i_value, value, mask=m_value)


@triton.jit
def reconstruction_bwd_filters_kernel(
    p_partial,  # [splits, B, branches, k * k, C]
    p_grad,  # [B, C, T, H, W]
    p_features,  # [B, C, T, H, W]
    p_computed,  # [B, C, T, H, W]
    p_temporal_gate,  # [B, S_t]
    p_channel_gate,  # [B, S_c]
    temporal_levels,
    channel_levels,
    clips,
    splits,
    branches,
    channels,
    frames,
    height,
    width,
    step_clip,
    step_frame,
    step_channel,
    step_pixel,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    b_pixel: tl.constexpr,
    b_channel: tl.constexpr,
):
    """A program has a block of channels, a tap, some frames of a clip and a branch of the reconstruction.

    The sum over these frames of the gradient times what the tap reads. With CHANNELS a branch is a level;
    else those of a level are the frames as far behind the given one, of level 0 first.
    """
    channel_blocks = tl.cdiv(channels, b_channel)
    i_channel = tl.program_id(0) % channel_blocks * b_channel + tl.arange(0, b_channel)
    i_unit = tl.program_id(0) // channel_blocks
    i_tap = i_unit % (SIZE * SIZE)
    i_branch = i_unit // (SIZE * SIZE) % branches
    i_clip = (i_unit // (SIZE * SIZE) // branches % clips).to(tl.int64)
    i_split = i_unit // (SIZE * SIZE) // branches // clips
    m_channel = i_channel < channels
    is_centre = i_tap == SIZE * SIZE // 2
    if CHANNELS:
        weight = tl.load(p_channel_gate + i_clip * channel_levels + i_branch)
        given = (channels + (1 << i_branch) - 1) >> i_branch
        i_read = i_channel % given
        m_channel = m_channel & ((i_channel >= given) | is_centre)
        lowest = lowest_live_level(p_temporal_gate, i_clip, temporal_levels, True)
        weight = tl.where(lowest < temporal_levels, weight, 0)
        first, distance = 0, 1 << lowest
    else:
        level = 0
        for next in range(1, temporal_levels):
            level += tl.where(i_branch + 1 >= (1 << next), 1, 0)
        weight = tl.load(p_temporal_gate + i_clip * temporal_levels + level)
        i_read = i_channel
        distance = 1 << level
        first = i_branch + 1 - distance
        m_channel = m_channel & ((first > 0) | is_centre)
    p_given, factor = _given_features(p_features, p_computed, p_channel_gate, i_clip, channel_levels)
    p_given += i_clip * step_clip
    # The frame that is read lies as far before as the branch says.
    back = first
    first += i_split * distance
    frame_count = tl.cdiv(tl.maximum(frames - first, 0), distance * splits)
    frame_count = tl.where((weight > 0) & (tl.max(m_channel.to(tl.int32), 0) > 0), frame_count, 0)
    tap_y, tap_x = i_tap // SIZE - SIZE // 2, i_tap % SIZE - SIZE // 2
    pixels = height * width
    value = tl.zeros([b_pixel, b_channel], tl.float32)
    for i_frame in range(frame_count):
        t = first + i_frame * (distance * splits)
        p_grad_frame = p_grad + i_clip * step_clip + t.to(tl.int64) * step_frame
        p_frame = p_given + (t - back).to(tl.int64) * step_frame
        for start in range(0, pixels, b_pixel):
            i_pixel = start + tl.arange(0, b_pixel)
            y, x = i_pixel // width + tap_y, i_pixel % width + tap_x
            m_pixel = (i_pixel < pixels) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            m_value = m_pixel[:, None] & m_channel[None, :]
            i_grad = (i_pixel * step_pixel)[:, None] + (i_channel * step_channel)[None, :]
            i_value = ((y * width + x) * step_pixel)[:, None] + (i_read * step_channel)[None, :]
            grad = tl.load(p_grad_frame + i_grad, mask=m_value, other=0).to(tl.float32)
            value += grad * tl.load(p_frame + i_value, mask=m_value, other=0).to(tl.float32)
    p_sum = p_partial + i_unit.to(tl.int64) * channels
    tl.store(p_sum + i_channel, tl.sum(value, 0) * factor, mask=i_channel < channels)


class Reconstruction:
    """The levels of every clip and the filters, and what they make of [B, C, T, H, W] features.

    Args:
        temporal_gate: [B, S_t] or None.
        channel_gate: [B, S_c] or None.
        temporal_weight: [2^(S_t-1) - 1, C, k, k] or None.
        channel_weight: [C, k, k] or None.
    """

    def __init__(
        self,
        temporal_gate: Tensor | None,
        channel_gate: Tensor | None,
        temporal_weight: Tensor | None,
        channel_weight: Tensor | None,
    ) -> None:
        self.gates = temporal_gate, channel_gate
        self.temporal_weight = None if temporal_weight is None else temporal_weight.contiguous()
        self.channel_weight = None if channel_weight is None else channel_weight.contiguous()

    def features(
        self,
        computed: Tensor,  # [B, C, T, H, W]
    ) -> Tensor:  # [B, C, T, H, W]
        """All channels of the frames that are computed, where frames are made of these."""
        if None in self.gates:
            return computed
        return self._run(computed, None, CHANNELS=True, LAST=False)

    def output(
        self,
        computed: Tensor,  # [B, C, T, H, W]
        activation: int,
    ) -> Tensor:  # [B, C, T, H, W]
        given = self.features(computed)
        channels = self.gates[0] is None
        plain = None if None in self.gates else computed
        return self._run(given, plain, CHANNELS=channels, LAST=True, ACTIVATION=activation)

    def feature_gradient(
        self,
        grad: Tensor,  # [B, C, T, H, W]
    ) -> Tensor:  # [B, C, T, H, W]
        """That of all channels of the frames that are computed."""
        if self.gates[0] is None:
            return grad
        return self._run(grad, None, CHANNELS=False, TRANSPOSED=True, LAST=False)

    def computed_gradient(
        self,
        grad: Tensor,  # [B, C, T, H, W]
    ) -> Tensor:  # [B, C, T, H, W]
        """That of what is computed, given that of its features."""
        if self.gates[1] is None:
            return grad
        return self._run(grad, None, CHANNELS=True, TRANSPOSED=True, LAST=False)

    def gradients(
        self,
        grad: Tensor,  # [B, C, T, H, W]
        computed: Tensor,  # [B, C, T, H, W]
        *,
        CHANNELS: bool,
    ) -> tuple[Tensor, Tensor]:  # as the gate, as its filters
        """Those of the channels' gate and filters, given that of the features, or else of the frames'."""
        gate = self.gates[CHANNELS]
        filters = self.channel_weight if CHANNELS else self.temporal_weight
        assert gate is not None
        levels = gate.shape[1]
        sums = self._sums(grad, computed, levels if CHANNELS else 2**levels - 1, CHANNELS=CHANNELS)
        channels, taps = computed.shape[1], sums.shape[2]
        kept = sums.new_zeros(1, taps, channels)
        kept[:, taps // 2] = 1
        if filters is None:
            made = kept[:0]
        else:
            made = filters.float().reshape(-1, channels, taps).transpose(1, 2)
        grad_gate, grad_made = torch.zeros_like(gate), torch.zeros_like(made)
        # A branch that is not live has zeros for sums, but its weight could be anything.
        live = torch.where(gate > 0, gate, 0)
        for level in range(levels):
            if CHANNELS:
                given = triton.cdiv(channels, 2**level)
                products = sums[:, level, :, :given] * kept[0, :, :given]
                grad_gate[:, level] = products.sum((1, 2))
                if level > 0:
                    rest = sums[:, level, :, given:]
                    grad_gate[:, level] += (rest * made[0, :, given:]).sum((1, 2))
                    grad_made[0, :, given:] += (rest * live[:, level, None, None]).sum(0)
            else:
                own = sums[:, 2**level - 1 : 2 ** (level + 1) - 1]
                all_filters = torch.cat((kept, made[: 2**level - 1]))
                grad_gate[:, level] = (own * all_filters).sum((1, 2, 3))
                grad_made[: 2**level - 1] += (own[:, 1:] * live[:, level, None, None, None]).sum(0)
        if filters is None:
            return grad_gate, computed.new_empty(0)
        return grad_gate, grad_made.transpose(1, 2).reshape(filters.shape).to(filters.dtype)

    def _sums(
        self,
        grad: Tensor,  # [B, C, T, H, W]
        computed: Tensor,  # [B, C, T, H, W]
        branches: int,
        *,
        CHANNELS: bool,
    ) -> Tensor:  # [B, branches, k * k, C]
        clips, channels, frames = computed.shape[:3]
        given = computed if CHANNELS else self.features(computed)
        size = self._size(CHANNELS)
        chosen = configuration("depthwise weight gradient", format_name(computed))
        programs = clips * branches * size * size * triton.cdiv(channels, chosen["b_channel"])
        splits = max(1, min(frames, PROGRAMS // max(1, programs)))
        sums = torch.zeros(splits, clips, branches, size * size, channels, device=computed.device)
        if computed.numel() > 0:
            reconstruction_bwd_filters_kernel[(splits * programs,)](
                sums,
                grad,
                given,
                None if CHANNELS or self.gates[1] is None else computed,
                *self._gate_arguments(),
                clips=clips,
                splits=splits,
                branches=branches,
                **self._image(computed),
                SIZE=size,
                CHANNELS=CHANNELS,
                **chosen,
            )
        return sums.sum(0)

    def _run(
        self,
        given: Tensor,  # [B, C, T, H, W]
        computed: Tensor | None,  # [B, C, T, H, W]
        *,
        CHANNELS: bool,
        LAST: bool,
        TRANSPOSED: bool = False,
        ACTIVATION: int = 0,
    ) -> Tensor:  # [B, C, T, H, W]
        output = torch.empty_like(given)
        if output.numel() == 0:
            return output
        chosen = configuration("reconstruction", format_name(given))
        clips, channels, frames, height, width = given.shape
        blocks = triton.cdiv(height * width, chosen["b_pixel"]) * triton.cdiv(channels, chosen["b_channel"])
        reconstruction_kernel[(clips * frames * blocks,)](
            output,
            given,
            computed,
            self.channel_weight if CHANNELS else self.temporal_weight,
            *self._gate_arguments(),
            **self._image(given),
            SIZE=self._size(CHANNELS),
            CHANNELS=CHANNELS,
            TRANSPOSED=TRANSPOSED,
            LAST=LAST,
            ACTIVATION=ACTIVATION,
            **chosen,
        )
        return output

    def _size(self, channels: bool) -> int:
        filters = self.channel_weight if channels else self.temporal_weight
        return 1 if filters is None else filters.shape[-1]

    def _gate_arguments(self) -> tuple[Tensor | int | None, ...]:
        return *self.gates, *(1 if gate is None else gate.shape[1] for gate in self.gates)

    @staticmethod
    def _image(features: Tensor) -> dict[str, int]:
        image = Geometry((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)).image("", features)
        return {name.removeprefix("_"): size for name, size in image.items()}

"""The cheap reconstruction of dynamic_conv3d: channels made from channels, frames made from frames."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adakernels.ops._layout import empty_in_format, memory_format
from adakernels.triton.configurations import configuration
from adakernels.triton.convolution import activated
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
    size,
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
    m_value = (i_pixel < pixels)[:, None] & (i_channel < channels)[None, :]
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
            m_read = m_value
            if CHANNELS:
                if TRANSPOSED:
                    i_read = i_channel + target * given
                    m_read = m_read & ((i_channel < given) & (i_read < channels))[None, :]
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
            for tap in range(tl.where(some_made, size * size, 1)):
                i_tap = tl.where(some_made, tap, size * size // 2)
                tap_y, tap_x = i_tap // size - size // 2, i_tap % size - size // 2
                if TRANSPOSED:
                    in_y, in_x = y - tap_y, x - tap_x
                else:
                    in_y, in_x = y + tap_y, x + tap_x
                m_inside = (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
                i_value = ((in_y * width + in_x) * step_pixel)[:, None] + (i_read * step_channel)[None, :]
                kept = tl.where(i_tap == size * size // 2, 1.0, 0.0)
                filter = kept
                if p_filters is not None:
                    m_filter = made & (i_channel < channels) & (i_read < channels)
                    filter = tl.load(p_filters + i_filter * (size * size) + i_tap, mask=m_filter, other=0)
                    filter = tl.where(made, filter.to(tl.float32), kept)
                given_value = tl.load(p_frame + i_value, mask=m_read & m_inside[:, None], other=0)
                value += given_value.to(tl.float32) * (filter * (weight * factor))
    i_value = (i_pixel * step_pixel)[:, None] + (i_channel * step_channel)[None, :]
    p_frame = p_output + i_clip * step_clip + i_frame.to(tl.int64) * step_frame
    value = activated(value, ACTIVATION).to(p_output.dtype.element_ty)
    tl.store(p_frame + i_value, value, mask=m_value & wanted)

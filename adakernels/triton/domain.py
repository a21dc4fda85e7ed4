"""The domain of a convolution: per frame, the channels and the taps in time to visit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
BLOCK_ROWS = 128


class Domain(NamedTuple):
    """What each frame of the output visits; None is everything.

    A list is a permutation of all channels whose first `count` are those to visit, in ascending order. So a
    block of it is filled up with real channels, and its rest tells which channels nobody computes.
    A count without a list is that of the first channels. Taps in time lie a constant distance apart.
    """

    outputs: Tensor | None = None  # [N, C_out]
    output_count: Tensor | None = None  # [N]
    inputs: Tensor | None = None  # [N, C_in]
    input_count: Tensor | None = None  # [N]
    taps: Tensor | None = None  # [N, 3]: first, distance, number


@triton.jit
def source(i_out, i_tap, stride, padding, dilation, size, TRANSPOSED: tl.constexpr):
    """Where a tap reads along one side for an output, and whether there is such a place."""
    if TRANSPOSED:
        reach = i_out + padding - i_tap * dilation
        i_in = reach // stride
        m_in = (reach >= 0) & (reach % stride == 0) & (i_in < size)
    else:
        i_in = i_out * stride - padding + i_tap * dilation
        m_in = (i_in >= 0) & (i_in < size)
    return i_in, m_in


@triton.jit
def needed_channels(p_policy, i_row, frames, channels, i_channel, m_channel):
    """Channels that are kept in this frame or reused in the next one of the clip (AdaFuse, Eq. 5)."""
    p_own = p_policy + i_row * channels + i_channel
    own = tl.load(p_own, mask=m_channel, other=2)
    next = tl.load(p_own + channels, mask=m_channel & (i_row % frames + 1 < frames), other=2)
    return m_channel & ((own == 0) | (next == 1))


@triton.jit
def live_channels(p_policy, i_row, channels, i_channel, m_channel):
    """Input channels that are not known to be zero."""
    return m_channel & (tl.load(p_policy + i_row * channels + i_channel, mask=m_channel, other=2) != 2)


@triton.jit
def _list_channels(
    p_list, p_count, p_policy, i_row, frames, channels, INPUTS: tl.constexpr, b_channel: tl.constexpr
):
    count = 0
    for first in range(0, channels, b_channel):
        i_channel = first + tl.arange(0, b_channel)
        m_channel = i_channel < channels
        if INPUTS:
            chosen = live_channels(p_policy, i_row, channels, i_channel, m_channel)
        else:
            chosen = needed_channels(p_policy, i_row, frames, channels, i_channel, m_channel)
        # Those chosen up to here, itself included.
        place = count + tl.cumsum(chosen.to(tl.int32), 0)
        # The others are filled in from the end.
        place = tl.where(chosen, place - 1, channels - 1 - (i_channel - place))
        tl.store(p_list + i_row * channels + place, i_channel, mask=m_channel)
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.store(p_count + i_row, count)


@triton.jit
def domain_kernel(
    p_outputs,  # [N, C_out]
    p_output_count,  # [N]
    p_inputs,  # [N, C_in]
    p_input_count,  # [N]
    p_policy,  # [N, C_out]
    p_in_policy,  # [N, C_in]
    frames,
    out_channels,
    in_channels,
    b_channel: tl.constexpr,
):
    """Program (t, 0) lists the output channels of frame t, program (t, last) its input channels."""
    i_row = tl.program_id(0).to(tl.int64)
    if p_policy is not None:
        if tl.program_id(1) == 0:
            _list_channels(p_outputs, p_output_count, p_policy, i_row, frames, out_channels, False, b_channel)
    if p_in_policy is not None:
        if tl.program_id(1) == tl.num_programs(1) - 1:
            _list_channels(p_inputs, p_input_count, p_in_policy, i_row, frames, in_channels, True, b_channel)


def build_domain(
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    frames: int,
) -> Domain:
    """The output channels that somebody reads and the input channels that are not known to be zero."""
    domain: list[Tensor | None] = []
    for values in (policy, in_policy):
        if values is None:
            domain += [None, None]
        else:
            domain += [
                torch.empty_like(values, dtype=torch.int32),
                values.new_empty(len(values), dtype=torch.int32),
            ]
    given = [values for values in (policy, in_policy) if values is not None]
    if given and len(given[0]) > 0:
        domain_kernel[(len(given[0]), len(given))](
            *domain,
            policy,
            in_policy,
            frames,
            0 if policy is None else policy.shape[1],
            0 if in_policy is None else in_policy.shape[1],
            b_channel=min(BLOCK, triton.next_power_of_2(max(values.shape[1] for values in given))),
        )
    return Domain(*domain)


@triton.jit
def lowest_live_level(p_gate, i_clip, levels, m_clip):
    """The lowest level of clips with a weight above 0; `levels` where there is none, 0 without a gate."""
    level = (i_clip * 0).to(tl.int32)
    if p_gate is not None:
        level += levels
        for higher in range(levels):
            lower = levels - 1 - higher
            weight = tl.load(p_gate + i_clip * levels + lower, mask=m_clip, other=0)
            level = tl.where(weight > 0, lower, level)
    return level


@triton.jit
def frames_kernel(
    p_taps,  # [N, 3]
    p_count,  # [N]
    p_temporal,  # [B]
    p_offsets,  # [B + 1]
    p_temporal_gate,  # [B, S_t]
    p_channel_gate,  # [B, S_c]
    temporal_levels,
    channel_levels,
    rows,
    clips,
    out_frames,
    in_frames,
    channels,
    kernel_frames,
    stride,
    padding,
    dilation,
    TRANSPOSED: tl.constexpr,
    b_row: tl.constexpr,
):
    """Which taps in time find a frame of the same clip, and of a sliced clip whether the centre one does.

    With gates also how many channels are computed of a frame, or with TRANSPOSED of those that it goes into.
    """
    i_row = tl.program_id(0) * b_row + tl.arange(0, b_row)
    m_row = i_row < rows
    i_frame = i_row % out_frames
    i_clip = i_row // out_frames
    if p_offsets is not None:
        # Bounds that are out of order lead to a wrong clip, but to one that exists.
        for clip in range(1, clips):
            i_clip += (i_row >= tl.load(p_offsets + clip)).to(tl.int32)
    m_clip = m_row & (i_clip < clips)
    if p_offsets is not None:
        begin = tl.load(p_offsets + i_clip, mask=m_clip, other=0)
        end = tl.load(p_offsets + i_clip + 1, mask=m_clip, other=0)
    if p_temporal is not None:
        whole = tl.load(p_temporal + i_clip, mask=m_clip, other=0) != 0
    step = 1
    if p_count is not None:
        level = lowest_live_level(p_temporal_gate, i_clip, temporal_levels, m_clip)
        channel_level = lowest_live_level(p_channel_gate, i_clip, channel_levels, m_clip)
        live = (level < temporal_levels) & (channel_level < channel_levels)
        computed = tl.where(live, (channels + (1 << channel_level) - 1) >> channel_level, 0)
        step = 1 << level
        if not TRANSPOSED:
            computed = tl.where(i_frame % step == 0, computed, 0)
        tl.store(p_count + i_row, computed, mask=m_row)
    first, last, count = tl.zeros_like(i_row), tl.zeros_like(i_row), tl.zeros_like(i_row)
    for i_tap in range(kernel_frames):
        i_source, live = source(i_frame, i_tap, stride, padding, dilation, in_frames, TRANSPOSED)
        if p_offsets is not None:
            live = live & (i_source >= begin) & (i_source < end)
        if p_temporal is not None:
            live = live & (whole | (i_tap == kernel_frames // 2))
        if TRANSPOSED:
            live = live & (i_source % step == 0)
        first = tl.where(live & (count == 0), i_tap, first)
        last = tl.where(live, i_tap, last)
        count += live.to(tl.int32)
    tl.store(p_taps + 3 * i_row, first, mask=m_row)
    tl.store(p_taps + 3 * i_row + 1, tl.maximum((last - first) // tl.maximum(count - 1, 1), 1), mask=m_row)
    tl.store(p_taps + 3 * i_row + 2, count, mask=m_row)


def build_frames(
    output: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    temporal: Tensor | None,  # [B]
    frame_offsets: Tensor | None,  # [B + 1]
    temporal_gate: Tensor | None,  # [B, S_t]
    channel_gate: Tensor | None,  # [B, S_c]
    *,
    out_frames: int,
    TRANSPOSED: bool,
    **arguments: int,
) -> Domain:
    """What every frame of the output visits in time, given the convolution as `frames_kernel` takes it."""
    rows = len(output) * math.prod(output.shape[2:-2])
    taps = torch.empty(rows, 3, dtype=torch.int32, device=output.device)
    gates = temporal_gate, channel_gate
    count = taps.new_empty(rows) if any(gate is not None for gate in gates) else None
    if rows > 0:
        frames_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
            taps,
            count,
            # Triton reads no tensor of bool.
            None if temporal is None else temporal.view(torch.uint8),
            frame_offsets,
            *gates,
            *(1 if gate is None else gate.shape[1] for gate in gates),
            rows,
            rows // out_frames if frame_offsets is None else len(frame_offsets) - 1,
            out_frames,
            **arguments,
            TRANSPOSED=TRANSPOSED,
            b_row=BLOCK_ROWS,
        )
    return Domain(input_count=count, taps=taps) if TRANSPOSED else Domain(output_count=count, taps=taps)

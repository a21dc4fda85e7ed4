"""The gradient of a convolution's weight: sums over frames and pixels, within each frame's domain."""

from __future__ import annotations

import triton
import triton.language as tl

from adakernels.triton.domain import live_channels, needed_channels, source


@triton.jit
def _frame_of_tap(
    p_input,
    p_taps,
    i_row,
    i_tap,
    out_frames,
    in_frames,
    stride,
    padding,
    dilation,
    in_step_clip,
    in_step_frame,
):
    """The frame that a tap in time reads for a frame of the output, and whether that visits the tap."""
    i_frame, _ = source(i_row % out_frames, i_tap, stride, padding, dilation, in_frames, False)
    live = i_row >= 0
    if p_taps is not None:
        beyond = i_tap - tl.load(p_taps + 3 * i_row)
        distance = tl.load(p_taps + 3 * i_row + 1)
        live = (beyond >= 0) & (beyond < distance * tl.load(p_taps + 3 * i_row + 2))
        live = live & (beyond % distance == 0)
    return p_input + i_row // out_frames * in_step_clip + i_frame * in_step_frame, live


@triton.jit
def convolution_bwd_weight_kernel(
    p_partial,  # [splits, C_out, kt, kh, kw, C_in]
    p_grad,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    p_input,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    p_in_policy,  # [N, C_in]
    p_list,  # [N, C_out] | [N, C_in]
    p_count,  # [N]
    p_taps,  # [N, 3]
    rows,
    rows_per_split,
    out_channels,
    out_frames,
    out_height,
    out_width,
    out_step_clip,
    out_step_frame,
    out_step_channel,
    out_step_pixel,
    in_channels,
    in_frames,
    in_height,
    in_width,
    in_step_clip,
    in_step_frame,
    in_step_channel,
    in_step_pixel,
    kernel_frames,
    kernel_height,
    kernel_width,
    stride_t,
    stride_y,
    stride_x,
    padding_t,
    padding_y,
    padding_x,
    dilation_t,
    dilation_y,
    dilation_x,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    b_list: tl.constexpr,
    b_whole: tl.constexpr,
    b_pixel: tl.constexpr,
):
    """A program has some frames, a tap and a block of the channels that are not listed.

    Per frame it adds to the rows of the listed channels, which are the inputs with INPUTS, else the outputs.
    Where there is no list, a program has a block of output channels instead, and keeps their sums.
    """
    pixels = out_height * out_width
    kernel_pixels = kernel_height * kernel_width
    taps = kernel_frames * kernel_pixels
    if INPUTS:
        whole_channels = out_channels
        list_channels = in_channels
    else:
        whole_channels = in_channels
        list_channels = out_channels
    list_blocks = 1
    if p_list is None:
        list_blocks = tl.cdiv(list_channels, b_list)
    whole_blocks = tl.cdiv(whole_channels, b_whole)
    i_unit = tl.program_id(0) // whole_blocks
    i_whole = tl.program_id(0) % whole_blocks * b_whole + tl.arange(0, b_whole)
    i_tap = i_unit // list_blocks % taps
    i_split = (i_unit // list_blocks // taps).to(tl.int64)
    m_whole = i_whole < whole_channels
    first_row = i_split * rows_per_split
    tap_t, tap_y, tap_x = i_tap // kernel_pixels, i_tap // kernel_width % kernel_height, i_tap % kernel_width
    p_sums = p_partial + i_split * (out_channels * taps * in_channels)
    # The only block of output channels where there is no list.
    begin = i_unit % list_blocks * b_list
    end = begin + b_list
    value = tl.zeros([b_list, b_whole], tl.float32)
    for i_row in range(first_row, tl.minimum(first_row + rows_per_split, rows)):
        p_in_frame, live = _frame_of_tap(
            p_input,
            p_taps,
            i_row,
            tap_t,
            out_frames,
            in_frames,
            stride_t,
            padding_t,
            dilation_t,
            in_step_clip,
            in_step_frame,
        )
        p_out_frame = p_grad + i_row // out_frames * out_step_clip + i_row % out_frames * out_step_frame
        m_live = m_whole
        if p_in_policy is not None:
            m_live = live_channels(p_in_policy, i_row, in_channels, i_whole, m_whole)
        count = list_channels
        if p_count is not None:
            count = tl.load(p_count + i_row)
        if p_list is not None:
            end = count
        visited = tl.where(live & (begin < count), pixels, 0)
        for first in range(begin, end, b_list):
            i_list = first + tl.arange(0, b_list)
            m_list = i_list < count
            if p_list is not None:
                i_list = tl.load(p_list + i_row * list_channels + i_list, mask=m_list, other=0)
                value = tl.zeros([b_list, b_whole], tl.float32)
            for start in range(0, visited, b_pixel):
                i_pixel = start + tl.arange(0, b_pixel)
                y, m_y = source(
                    i_pixel // out_width, tap_y, stride_y, padding_y, dilation_y, in_height, False
                )
                x, m_x = source(i_pixel % out_width, tap_x, stride_x, padding_x, dilation_x, in_width, False)
                m_pixel = (i_pixel < pixels) & m_y & m_x
                p_out = p_out_frame + i_pixel * out_step_pixel
                p_in = p_in_frame + (y * in_width + x) * in_step_pixel
                m_listed = m_list[:, None] & m_pixel[None, :]
                if INPUTS:
                    p_listed = p_in[None, :] + (i_list * in_step_channel)[:, None]
                    p_other = p_out[:, None] + (i_whole * out_step_channel)[None, :]
                else:
                    p_listed = p_out[None, :] + (i_list * out_step_channel)[:, None]
                    p_other = p_in[:, None] + (i_whole * in_step_channel)[None, :]
                listed = tl.load(p_listed, mask=m_listed, other=0)
                other = tl.load(p_other, mask=m_pixel[:, None] & m_live[None, :], other=0)
                value = tl.dot(listed, other, value, input_precision=PRECISION)
            if p_list is not None:
                if INPUTS:
                    i_weight = ((i_whole * taps + i_tap) * in_channels)[None, :] + i_list[:, None]
                else:
                    i_weight = ((i_list * taps + i_tap) * in_channels)[:, None] + i_whole[None, :]
                m_sum = m_list[:, None] & m_whole[None, :]
                sums = tl.load(p_sums + i_weight, mask=m_sum, other=0)
                tl.store(p_sums + i_weight, sums + value, mask=m_sum)
                # The next frame's list gives the same rows to other threads.
                tl.debug_barrier()
    if p_list is None:
        i_list = begin + tl.arange(0, b_list)
        i_weight = ((i_list * taps + i_tap) * in_channels)[:, None] + i_whole[None, :]
        tl.store(p_sums + i_weight, value, mask=(i_list < list_channels)[:, None] & m_whole[None, :])


@triton.jit
def depthwise_bwd_weight_kernel(
    p_partial,  # [splits, C_out, kt, kh, kw]
    p_grad,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    p_input,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    p_policy,  # [N, C_out]
    p_in_policy,  # [N, C_in]
    p_count,  # [N]
    p_taps,  # [N, 3]
    rows,
    rows_per_split,
    frames,
    multiplier,
    out_channels,
    out_frames,
    out_height,
    out_width,
    out_step_clip,
    out_step_frame,
    out_step_channel,
    out_step_pixel,
    in_channels,
    in_frames,
    in_height,
    in_width,
    in_step_clip,
    in_step_frame,
    in_step_channel,
    in_step_pixel,
    kernel_frames,
    kernel_height,
    kernel_width,
    stride_t,
    stride_y,
    stride_x,
    padding_t,
    padding_y,
    padding_x,
    dilation_t,
    dilation_y,
    dilation_x,
    b_pixel: tl.constexpr,
    b_channel: tl.constexpr,
):
    """A program has some frames, a tap and a block of channels."""
    pixels = out_height * out_width
    kernel_pixels = kernel_height * kernel_width
    taps = kernel_frames * kernel_pixels
    channel_blocks = tl.cdiv(out_channels, b_channel)
    i_out = tl.program_id(0) % channel_blocks * b_channel + tl.arange(0, b_channel)
    i_tap = tl.program_id(0) // channel_blocks % taps
    i_split = (tl.program_id(0) // channel_blocks // taps).to(tl.int64)
    m_out = i_out < out_channels
    i_in = i_out // multiplier
    first_row = i_split * rows_per_split
    tap_t, tap_y, tap_x = i_tap // kernel_pixels, i_tap // kernel_width % kernel_height, i_tap % kernel_width
    value = tl.zeros([b_pixel, b_channel], tl.float32)
    for i_row in range(first_row, tl.minimum(first_row + rows_per_split, rows)):
        p_in_frame, live = _frame_of_tap(
            p_input,
            p_taps,
            i_row,
            tap_t,
            out_frames,
            in_frames,
            stride_t,
            padding_t,
            dilation_t,
            in_step_clip,
            in_step_frame,
        )
        p_out_frame = p_grad + i_row // out_frames * out_step_clip + i_row % out_frames * out_step_frame
        m_read = m_out & live
        if p_count is not None:
            m_read = m_read & (i_out < tl.load(p_count + i_row))
        if p_policy is not None:
            m_read = needed_channels(p_policy, i_row, frames, out_channels, i_out, m_read)
        if p_in_policy is not None:
            m_read = live_channels(p_in_policy, i_row, in_channels, i_in, m_read)
        for start in range(0, tl.where(tl.max(m_read.to(tl.int32), 0) > 0, pixels, 0), b_pixel):
            i_pixel = start + tl.arange(0, b_pixel)
            y, m_y = source(i_pixel // out_width, tap_y, stride_y, padding_y, dilation_y, in_height, False)
            x, m_x = source(i_pixel % out_width, tap_x, stride_x, padding_x, dilation_x, in_width, False)
            m_pixel = (i_pixel < pixels) & m_y & m_x
            m_value = m_pixel[:, None] & m_read[None, :]
            i_grad = (i_pixel * out_step_pixel)[:, None] + (i_out * out_step_channel)[None, :]
            i_input = ((y * in_width + x) * in_step_pixel)[:, None] + (i_in * in_step_channel)[None, :]
            grad = tl.load(p_out_frame + i_grad, mask=m_value, other=0).to(tl.float32)
            value += grad * tl.load(p_in_frame + i_input, mask=m_value, other=0).to(tl.float32)
    p_sum = p_partial + (i_split * out_channels + i_out) * taps + i_tap
    tl.store(p_sum, tl.sum(value, 0), mask=m_out)

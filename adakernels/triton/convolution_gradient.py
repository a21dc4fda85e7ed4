"""The gradient of a convolution's weight: sums over frames and pixels, within each frame's domain."""

from __future__ import annotations

import triton
import triton.language as tl

from adakernels.triton.convolution import source
from adakernels.triton.domain import live_channels, needed_channels


@triton.jit
def convolution_bwd_weight_kernel(
    p_partial,  # [splits, C_out, kh, kw, C_in]
    p_grad,  # [N, C_out, H', W']
    p_input,  # [N, C_in, H, W]
    p_in_policy,  # [N, C_in]
    p_list,  # [N, C_out] | [N, C_in]
    p_count,  # [N]
    rows,
    rows_per_split,
    out_channels,
    out_height,
    out_width,
    out_step_channel,
    out_step_pixel,
    in_channels,
    in_height,
    in_width,
    in_step_channel,
    in_step_pixel,
    kernel_height,
    kernel_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
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
    """
    pixels = out_height * out_width
    taps = kernel_height * kernel_width
    if INPUTS:
        whole_channels = out_channels
        list_channels = in_channels
    else:
        whole_channels = in_channels
        list_channels = out_channels
    whole_blocks = tl.cdiv(whole_channels, b_whole)
    i_whole = tl.program_id(0) % whole_blocks * b_whole + tl.arange(0, b_whole)
    i_tap = tl.program_id(0) // whole_blocks % taps
    i_split = (tl.program_id(0) // whole_blocks // taps).to(tl.int64)
    m_whole = i_whole < whole_channels
    first_row = i_split * rows_per_split
    tap_y, tap_x = i_tap // kernel_width, i_tap % kernel_width
    for i_row in range(first_row, tl.minimum(first_row + rows_per_split, rows)):
        p_out_frame = p_grad + i_row * (out_channels * pixels)
        p_in_frame = p_input + i_row * (in_channels * in_height * in_width)
        m_live = m_whole
        if p_in_policy is not None:
            m_live = live_channels(p_in_policy, i_row, in_channels, i_whole, m_whole)
        count = list_channels
        if p_list is not None:
            count = tl.load(p_count + i_row)
        for first in range(0, count, b_list):
            i_list = first + tl.arange(0, b_list)
            m_list = i_list < count
            if p_list is not None:
                i_list = tl.load(p_list + i_row * list_channels + i_list, mask=m_list, other=0)
            value = tl.zeros([b_list, b_whole], tl.float32)
            for start in range(0, pixels, b_pixel):
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
            if INPUTS:
                i_weight = ((i_whole * taps + i_tap) * in_channels)[None, :] + i_list[:, None]
            else:
                i_weight = ((i_list * taps + i_tap) * in_channels)[:, None] + i_whole[None, :]
            p_sum = p_partial + i_split * (out_channels * taps * in_channels) + i_weight
            m_sum = m_list[:, None] & m_whole[None, :]
            tl.store(p_sum, tl.load(p_sum, mask=m_sum, other=0) + value, mask=m_sum)
            # The next frame's list gives the same rows to other threads.
            tl.debug_barrier()


@triton.jit
def depthwise_bwd_weight_kernel(
    p_partial,  # [splits, C_out, kh, kw]
    p_grad,  # [N, C_out, H', W']
    p_input,  # [N, C_in, H, W]
    p_policy,  # [N, C_out]
    p_in_policy,  # [N, C_in]
    rows,
    rows_per_split,
    frames,
    multiplier,
    out_channels,
    out_height,
    out_width,
    out_step_channel,
    out_step_pixel,
    in_channels,
    in_height,
    in_width,
    in_step_channel,
    in_step_pixel,
    kernel_height,
    kernel_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    b_pixel: tl.constexpr,
    b_channel: tl.constexpr,
):
    """A program has some frames, a tap and a block of channels."""
    pixels = out_height * out_width
    taps = kernel_height * kernel_width
    channel_blocks = tl.cdiv(out_channels, b_channel)
    i_out = tl.program_id(0) % channel_blocks * b_channel + tl.arange(0, b_channel)
    i_tap = tl.program_id(0) // channel_blocks % taps
    i_split = (tl.program_id(0) // channel_blocks // taps).to(tl.int64)
    m_out = i_out < out_channels
    i_in = i_out // multiplier
    first_row = i_split * rows_per_split
    tap_y, tap_x = i_tap // kernel_width, i_tap % kernel_width
    value = tl.zeros([b_pixel, b_channel], tl.float32)
    for i_row in range(first_row, tl.minimum(first_row + rows_per_split, rows)):
        m_read = m_out
        if p_policy is not None:
            m_read = needed_channels(p_policy, i_row, frames, out_channels, i_out, m_out)
        if p_in_policy is not None:
            m_read = live_channels(p_in_policy, i_row, in_channels, i_in, m_read)
        p_out_frame = p_grad + i_row * (out_channels * pixels)
        p_in_frame = p_input + i_row * (in_channels * in_height * in_width)
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

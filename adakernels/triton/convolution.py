"""The convolution core: an implicit matrix product over the domain of each output frame."""

from __future__ import annotations

import triton
import triton.language as tl

from adakernels.triton.domain import live_channels, needed_channels


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    """By the index into `ACTIVATIONS`: none, relu, relu6, silu."""
    # NaN stays NaN.
    if ACTIVATION == 1:
        value = tl.where(value < 0, 0.0, value)
    if ACTIVATION == 2:
        value = tl.where(value < 0, 0.0, tl.where(value > 6, 6.0, value))
    if ACTIVATION == 3:
        value = value / (1 + tl.exp(-value))
    return value


@triton.jit
def _store(p_output, p_policy, value, i_row, frames, channels, size, i_channel, m_channel, i_value, m_value):
    """Stores a block [pixels, channels] where it is read: here if kept, in the next frame if reused.

    What is neither kept nor reused becomes zero. A plane that is reused is left to the frame before, so that
    every number is written once.
    """
    p_own = p_output + i_row * size + i_value
    value = value.to(p_output.dtype.element_ty)
    if p_policy is None:
        tl.store(p_own, value, mask=m_value)
    else:
        p_choice = p_policy + i_row * channels + i_channel
        own = tl.load(p_choice, mask=m_channel, other=2)
        next = tl.load(p_choice + channels, mask=m_channel & (i_row % frames + 1 < frames), other=2)
        from_before = (own == 1) & (i_row % frames > 0)
        kept = tl.where((own == 0)[None, :], value, tl.zeros_like(value))
        tl.store(p_own, kept, mask=m_value & (~from_before)[None, :])
        tl.store(p_own + size, value, mask=m_value & (next == 1)[None, :])


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
def convolution_kernel(
    p_output,  # [N, C_out, H', W']
    p_input,  # [N, C_in, H, W]
    p_weight,  # [C_out, C_in, kh, kw] | [C_in, C_out, kh, kw]
    p_bias,  # [C_out]
    p_policy,  # [N, C_out]
    p_outputs,  # [N, C_out]
    p_output_count,  # [N]
    p_inputs,  # [N, C_in]
    p_input_count,  # [N]
    frames,
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
    weight_step_out,
    weight_step_in,
    weight_step_tap,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    b_pixel: tl.constexpr,
    b_out: tl.constexpr,
    b_in: tl.constexpr,
):
    """A program has a block of pixels of a frame and a block of its list of output channels.

    Its sum runs over the taps and the frame's list of input channels. Blocks past the count of the output
    list have no sum; they only write the zeros that `_store` finds.

    With TRANSPOSED it is the gradient of a convolution's input, where outputs and inputs have changed places.
    """
    pixels = out_height * out_width
    pixel_blocks = tl.cdiv(pixels, b_pixel)
    out_blocks = tl.cdiv(out_channels, b_out)
    i_pixel = tl.program_id(0) % pixel_blocks * b_pixel + tl.arange(0, b_pixel)
    first_out = tl.program_id(0) // pixel_blocks % out_blocks * b_out
    i_row = (tl.program_id(0) // pixel_blocks // out_blocks).to(tl.int64)
    m_pixel = i_pixel < pixels
    i_out = first_out + tl.arange(0, b_out)
    m_out = i_out < out_channels
    taps = kernel_height * kernel_width
    in_blocks = tl.cdiv(in_channels, b_in)
    in_count = in_channels
    if p_inputs is not None:
        in_count = tl.load(p_input_count + i_row)
        in_blocks = tl.cdiv(in_count, b_in)
    steps = taps * in_blocks
    m_needed = m_out
    if p_outputs is not None:
        out_count = tl.load(p_output_count + i_row)
        steps = tl.where(first_out < out_count, steps, 0)
        m_needed = i_out < out_count
        i_out = tl.load(p_outputs + i_row * out_channels + i_out, mask=m_out, other=0)
    out_y, out_x = i_pixel // out_width, i_pixel % out_width
    p_frame = p_input + i_row * (in_channels * in_height * in_width)
    value = tl.zeros([b_pixel, b_out], tl.float32)
    for step in range(steps):
        i_tap = step // in_blocks
        i_in = step % in_blocks * b_in + tl.arange(0, b_in)
        m_in = i_in < in_count
        if p_inputs is not None:
            i_in = tl.load(p_inputs + i_row * in_channels + i_in, mask=m_in, other=0)
        tap_y, tap_x = i_tap // kernel_width, i_tap % kernel_width
        y, m_y = source(out_y, tap_y, stride_y, padding_y, dilation_y, in_height, TRANSPOSED)
        x, m_x = source(out_x, tap_x, stride_x, padding_x, dilation_x, in_width, TRANSPOSED)
        m_inside = m_pixel & m_y & m_x
        i_input = ((y * in_width + x) * in_step_pixel)[:, None] + (i_in * in_step_channel)[None, :]
        i_weight = (i_in * weight_step_in + i_tap * weight_step_tap)[:, None] + (i_out * weight_step_out)[
            None, :
        ]
        a = tl.load(p_frame + i_input, mask=m_inside[:, None] & m_in[None, :], other=0)
        b = tl.load(p_weight + i_weight, mask=m_in[:, None] & m_out[None, :], other=0)
        value = tl.dot(a, b, value, input_precision=PRECISION)
    if p_bias is not None:
        value += tl.load(p_bias + i_out, mask=m_out, other=0).to(tl.float32)[None, :]
    value = _activate(value, ACTIVATION)
    if p_policy is None:
        # The channels that fill up a block are zero.
        value = tl.where(m_needed[None, :], value, 0.0)
    i_value = (i_pixel * out_step_pixel)[:, None] + (i_out * out_step_channel)[None, :]
    _store(
        p_output,
        p_policy,
        value,
        i_row,
        frames,
        out_channels,
        out_channels * pixels,
        i_out,
        m_out,
        i_value,
        m_pixel[:, None] & m_out[None, :],
    )


@triton.jit
def depthwise_kernel(
    p_output,  # [N, C_out, H', W']
    p_input,  # [N, C_in, H, W]
    p_weight,  # [C_out, 1, kh, kw] | [C_in, 1, kh, kw]
    p_bias,  # [C_out]
    p_policy,  # [N, C_out]
    p_in_policy,  # [N, C_in] | [N, C_out]
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
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    b_pixel: tl.constexpr,
    b_channel: tl.constexpr,
):
    """A program has a block of pixels and of channels of a frame, and reads of them what somebody needs.

    Channels stay in their order: what is read is what costs, and neighbours are read together. TRANSPOSED is
    as in `convolution_kernel`.
    """
    pixels = out_height * out_width
    pixel_blocks = tl.cdiv(pixels, b_pixel)
    channel_blocks = tl.cdiv(out_channels, b_channel)
    i_pixel = tl.program_id(0) % pixel_blocks * b_pixel + tl.arange(0, b_pixel)
    i_out = tl.program_id(0) // pixel_blocks % channel_blocks * b_channel + tl.arange(0, b_channel)
    i_row = (tl.program_id(0) // pixel_blocks // channel_blocks).to(tl.int64)
    m_pixel, m_out = i_pixel < pixels, i_out < out_channels
    taps = kernel_height * kernel_width
    m_read = m_out
    if p_policy is not None:
        m_read = needed_channels(p_policy, i_row, frames, out_channels, i_out, m_out)
    if TRANSPOSED:
        steps = taps * multiplier
        if p_in_policy is not None:
            m_read = live_channels(p_in_policy, i_row, out_channels, i_out, m_read)
    else:
        steps = taps
        if p_in_policy is not None:
            m_read = live_channels(p_in_policy, i_row, in_channels, i_out // multiplier, m_read)
    steps = tl.where(tl.max(m_read.to(tl.int32), 0) > 0, steps, 0)
    out_y, out_x = i_pixel // out_width, i_pixel % out_width
    p_frame = p_input + i_row * (in_channels * in_height * in_width)
    value = tl.zeros([b_pixel, b_channel], tl.float32)
    for step in range(steps):
        i_tap = step % taps
        if TRANSPOSED:
            i_in = i_out * multiplier + step // taps
            i_weight = i_in
        else:
            i_in = i_out // multiplier
            i_weight = i_out
        tap_y, tap_x = i_tap // kernel_width, i_tap % kernel_width
        y, m_y = source(out_y, tap_y, stride_y, padding_y, dilation_y, in_height, TRANSPOSED)
        x, m_x = source(out_x, tap_x, stride_x, padding_x, dilation_x, in_width, TRANSPOSED)
        m_inside = m_pixel & m_y & m_x
        i_input = ((y * in_width + x) * in_step_pixel)[:, None] + (i_in * in_step_channel)[None, :]
        p_tap = p_weight + i_weight * taps + i_tap
        weight = tl.load(p_tap, mask=m_read, other=0).to(tl.float32)
        input = tl.load(p_frame + i_input, mask=m_inside[:, None] & m_read[None, :], other=0).to(tl.float32)
        value += input * weight[None, :]
    if p_bias is not None:
        value += tl.load(p_bias + i_out, mask=m_out, other=0).to(tl.float32)[None, :]
    i_value = (i_pixel * out_step_pixel)[:, None] + (i_out * out_step_channel)[None, :]
    _store(
        p_output,
        p_policy,
        _activate(value, ACTIVATION),
        i_row,
        frames,
        out_channels,
        out_channels * pixels,
        i_out,
        m_out,
        i_value,
        m_pixel[:, None] & m_out[None, :],
    )

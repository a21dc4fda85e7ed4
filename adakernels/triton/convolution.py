"""The convolution core: an implicit matrix product over the domain of each output frame."""

from __future__ import annotations

import triton
import triton.language as tl

from adakernels.triton.domain import live_channels, needed_channels, source


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
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
def _store(p_own, p_policy, value, i_row, frames, channels, size, i_channel, m_channel, m_value):
    """Stores a block [pixels, channels] where it is read: here if kept, in the next frame if reused.

    What is neither kept nor reused becomes zero. A plane that is reused is left to the frame before, so that
    every number is written once.
    """
    value = value.to(p_own.dtype.element_ty)
    if p_policy is None:
        tl.store(p_own, value, mask=m_value)
    else:
        p_choice = p_policy + i_row.to(tl.int64) * channels + i_channel
        own = tl.load(p_choice, mask=m_channel, other=2)
        next = tl.load(p_choice + channels, mask=m_channel & (i_row % frames + 1 < frames), other=2)
        from_before = (own == 1) & (i_row % frames > 0)
        kept = tl.where((own == 0)[None, :], value, tl.zeros_like(value))
        tl.store(p_own, kept, mask=m_value & (~from_before)[None, :])
        tl.store(p_own + size, value, mask=m_value & (next == 1)[None, :])


@triton.jit
def _side_taps(i_out, kernel, stride, padding, dilation, TRANSPOSED: tl.constexpr):
    """The taps along one side for an output: the first, their distance and their number."""
    first, distance, count = 0, 1, kernel
    if TRANSPOSED:
        # Every stride-th output has the same taps.
        count = 0
        for i_tap in range(kernel):
            live = (i_out + padding) % stride == i_tap * dilation % stride
            first = tl.where(live & (count == 0), i_tap, first)
            distance = tl.where(live & (count == 1), i_tap - first, distance)
            count += live.to(tl.int32)
    return first, distance, count


@triton.jit
def _taps_of_frames(p_taps, i_row, m_row):
    """The taps in time of these frames: the first, their distance and their number."""
    first = tl.load(p_taps + 3 * i_row, mask=m_row, other=0)
    distance = tl.load(p_taps + 3 * i_row + 1, mask=m_row, other=1)
    return first, distance, tl.load(p_taps + 3 * i_row + 2, mask=m_row, other=0)


@triton.jit
def _weight_channel(i_channel, segment, segment_gap, SEGMENT_ALIGNMENT: tl.constexpr):
    """Where the weight has an input channel."""
    if SEGMENT_ALIGNMENT > 0:
        i_channel = tl.where(i_channel >= segment, i_channel + segment_gap, i_channel)
        # As many channels stay side by side.
        i_channel = tl.multiple_of(tl.max_contiguous(i_channel, SEGMENT_ALIGNMENT), SEGMENT_ALIGNMENT)
    return i_channel


@triton.jit
def _finish(
    p_output,
    p_bias,
    p_policy,
    p_outputs,
    value,
    i_row,
    i_clip,
    i_frame,
    i_pixel,
    i_out,
    m_pixel,
    m_out,
    m_needed,
    frames,
    channels,
    step_clip,
    step_frame,
    step_channel,
    step_pixel,
    MERGED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Makes the sums [pixels, channels] of these rows into the output."""
    if p_bias is not None:
        value += tl.load(p_bias + i_out, mask=m_out, other=0).to(tl.float32)[None, :]
    value = activate(value, ACTIVATION)
    m_value = m_pixel[:, None] & m_out[None, :]
    if p_outputs is None:
        m_value = m_pixel[:, None] & m_needed[None, :]
    elif p_policy is None:
        # The channels that fill up a block are zero.
        value = tl.where(m_needed[None, :], value, 0.0)
    p_frame = p_output + i_clip * step_clip + i_frame.to(tl.int64) * step_frame
    i_value = (i_pixel * step_pixel)[:, None] + (i_out * step_channel)[None, :]
    if MERGED:
        p_own = p_frame[:, None] + i_value
    else:
        p_own = p_frame + i_value
    _store(p_own, p_policy, value, i_row, frames, channels, step_clip, i_out, m_out, m_value)


@triton.jit
def convolution_kernel(
    p_output,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    p_partial,  # [SPLITS, N, H' * W', C_out]
    p_input,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    p_weight,  # [C_out, C_in, kh, kw] | [C_in, C_out, kh, kw], or with kt
    p_bias,  # [C_out]
    p_policy,  # [N, C_out]
    p_outputs,  # [N, C_out]
    p_output_count,  # [N]
    p_inputs,  # [N, C_in]
    p_input_count,  # [N]
    p_taps,  # [N, 3]
    rows,
    frames,
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
    weight_step_out,
    weight_step_in,
    weight_step_tap,
    segment,
    segment_gap,
    stride_t,
    stride_y,
    stride_x,
    padding_t,
    padding_y,
    padding_x,
    dilation_t,
    dilation_y,
    dilation_x,
    TRANSPOSED: tl.constexpr,
    MERGED: tl.constexpr,
    SPLITS: tl.constexpr,
    SEGMENT_ALIGNMENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    b_pixel: tl.constexpr,
    b_out: tl.constexpr,
    b_in: tl.constexpr,
):
    """A program has a block of pixels of a frame and a block of its list of output channels.

    Its sum runs over the taps and the frame's list of input channels. Blocks past the count of the output
    list have no sum; they only write the zeros that `_store` finds. Past the count of first channels nothing
    is written at all.

    With more than one of SPLITS, program (t, s) has the s-th part of the sum of block t, which it leaves to
    `split_convolution_kernel`. With MERGED a block goes on from frame to frame. With TRANSPOSED it is the
    gradient of a convolution's input, where outputs and inputs have changed places, and the pixels of a block
    lie a stride apart, so that they have their taps in common. With SEGMENT_ALIGNMENT the weight has other
    channels between those of the first `segment` and the rest.
    """
    step_y, step_x = 1, 1
    if TRANSPOSED:
        step_y, step_x = stride_y, stride_x
    phase_width = tl.cdiv(out_width, step_x)
    pixels = tl.cdiv(out_height, step_y) * phase_width
    pixel_blocks = tl.cdiv(pixels, b_pixel)
    if MERGED:
        pixel_blocks = tl.cdiv(pixels * rows, b_pixel)
    out_blocks = tl.cdiv(out_channels, b_out)
    i_pixel = tl.program_id(0) % pixel_blocks * b_pixel + tl.arange(0, b_pixel)
    phase = tl.program_id(0) // pixel_blocks % (step_y * step_x)
    i_unit = tl.program_id(0) // pixel_blocks // (step_y * step_x)
    first_out = i_unit % out_blocks * b_out
    if MERGED:
        i_row = i_pixel // pixels
        m_pixel = i_row < rows
        i_pixel %= pixels
    else:
        i_row = i_unit // out_blocks
        m_pixel = i_pixel < pixels
    first_y, distance_y, count_y = _side_taps(
        phase // step_x, kernel_height, stride_y, padding_y, dilation_y, TRANSPOSED
    )
    first_x, distance_x, count_x = _side_taps(
        phase % step_x, kernel_width, stride_x, padding_x, dilation_x, TRANSPOSED
    )
    out_y, out_x = i_pixel // phase_width, i_pixel % phase_width
    if TRANSPOSED:
        out_y = out_y * step_y + phase // step_x
        out_x = out_x * step_x + phase % step_x
        m_pixel = m_pixel & (out_y < out_height) & (out_x < out_width)
        i_pixel = out_y * out_width + out_x
    i_clip, i_frame = (i_row // out_frames).to(tl.int64), i_row % out_frames
    first_t, distance_t, count_t = 0, 1, 1
    if p_taps is not None:
        if MERGED:
            own_first, own_distance, own_count = _taps_of_frames(p_taps, i_row, m_pixel)
            own_end = own_first + (own_count - 1) * own_distance + 1
            first_t = tl.min(tl.where(own_count > 0, own_first, kernel_frames), 0)
            count_t = tl.maximum(tl.max(own_end, 0) - first_t, 0)
        else:
            first_t, distance_t, count_t = _taps_of_frames(p_taps, i_row, True)
    i_place = first_out + tl.arange(0, b_out)
    i_out = i_place
    m_out = i_out < out_channels
    in_count = in_channels
    if p_input_count is not None:
        in_count = tl.load(p_input_count + i_row)
    in_blocks = tl.cdiv(in_count, b_in)
    steps = count_t * count_y * count_x * in_blocks
    m_needed = m_out
    if p_output_count is not None:
        out_count = tl.load(p_output_count + i_row)
        steps = tl.where(first_out < out_count, steps, 0)
        m_needed = m_out & (i_out < out_count)
    if p_outputs is not None:
        i_out = tl.load(p_outputs + i_row.to(tl.int64) * out_channels + i_out, mask=m_out, other=0)
    first_step, end_step = 0, steps
    if SPLITS > 1:
        first_step = steps * tl.program_id(1) // SPLITS
        end_step = steps * (tl.program_id(1) + 1) // SPLITS
    value = tl.zeros([b_pixel, b_out], tl.float32)
    for step in range(first_step, end_step):
        i_tap = step // in_blocks
        i_in = step % in_blocks * b_in + tl.arange(0, b_in)
        m_in = i_in < in_count
        if p_inputs is not None:
            i_in = tl.load(p_inputs + i_row.to(tl.int64) * in_channels + i_in, mask=m_in, other=0)
        tap_x = first_x + i_tap % count_x * distance_x
        tap_y = first_y + i_tap // count_x % count_y * distance_y
        tap_t = first_t + i_tap // count_x // count_y * distance_t
        t = i_frame * stride_t
        if p_taps is not None:
            t, _ = source(i_frame, tap_t, stride_t, padding_t, dilation_t, in_frames, TRANSPOSED)
        y, m_y = source(out_y, tap_y, stride_y, padding_y, dilation_y, in_height, TRANSPOSED)
        x, m_x = source(out_x, tap_x, stride_x, padding_x, dilation_x, in_width, TRANSPOSED)
        m_inside = m_pixel & m_y & m_x
        if MERGED:
            if p_taps is not None:
                m_inside = m_inside & (tap_t >= own_first) & (tap_t < own_end)
                m_inside = m_inside & ((tap_t - own_first) % own_distance == 0)
        p_frame = p_input + i_clip * in_step_clip + t.to(tl.int64) * in_step_frame
        i_input = ((y * in_width + x) * in_step_pixel)[:, None] + (i_in * in_step_channel)[None, :]
        if MERGED:
            p_value = p_frame[:, None] + i_input
        else:
            p_value = p_frame + i_input
        i_tap = (tap_t * kernel_height + tap_y) * kernel_width + tap_x
        i_weight_in, i_weight_out = i_in, i_out
        if TRANSPOSED:
            i_weight_out = _weight_channel(i_out, segment, segment_gap, SEGMENT_ALIGNMENT)
        else:
            i_weight_in = _weight_channel(i_in, segment, segment_gap, SEGMENT_ALIGNMENT)
        i_weight = (i_weight_in * weight_step_in + i_tap * weight_step_tap)[:, None]
        i_weight = i_weight + (i_weight_out * weight_step_out)[None, :]
        a = tl.load(p_value, mask=m_inside[:, None] & m_in[None, :], other=0)
        b = tl.load(p_weight + i_weight, mask=m_in[:, None] & m_out[None, :], other=0)
        value = tl.dot(a, b, value, input_precision=PRECISION)
    if SPLITS > 1:
        i_sum = (tl.program_id(1) * rows + i_row) * (out_height * out_width) + i_pixel
        p_sum = p_partial + (i_sum * out_channels)[:, None] + i_place[None, :]
        tl.store(p_sum, value, mask=m_pixel[:, None] & m_needed[None, :])
    else:
        _finish(
            p_output,
            p_bias,
            p_policy,
            p_outputs,
            value,
            i_row,
            i_clip,
            i_frame,
            i_pixel,
            i_out,
            m_pixel,
            m_out,
            m_needed,
            frames,
            out_channels,
            out_step_clip,
            out_step_frame,
            out_step_channel,
            out_step_pixel,
            MERGED,
            ACTIVATION,
        )


@triton.jit
def split_convolution_kernel(
    p_output,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    p_partial,  # [SPLITS, N, H' * W', C_out]
    p_bias,  # [C_out]
    p_policy,  # [N, C_out]
    p_outputs,  # [N, C_out]
    p_output_count,  # [N]
    rows,
    frames,
    out_channels,
    out_frames,
    out_height,
    out_width,
    out_step_clip,
    out_step_frame,
    out_step_channel,
    out_step_pixel,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    b_pixel: tl.constexpr,
    b_out: tl.constexpr,
):
    """Adds up, in their order, the sums that programs of `convolution_kernel` left, and finishes them.

    A program has a block of pixels of a frame and a block of its list of output channels.
    """
    pixels = out_height * out_width
    pixel_blocks = tl.cdiv(pixels, b_pixel)
    out_blocks = tl.cdiv(out_channels, b_out)
    i_pixel = tl.program_id(0) % pixel_blocks * b_pixel + tl.arange(0, b_pixel)
    i_place = tl.program_id(0) // pixel_blocks % out_blocks * b_out + tl.arange(0, b_out)
    i_row = tl.program_id(0) // pixel_blocks // out_blocks
    m_pixel, m_out = i_pixel < pixels, i_place < out_channels
    m_needed, i_out = m_out, i_place
    if p_output_count is not None:
        m_needed = m_out & (i_place < tl.load(p_output_count + i_row))
    if p_outputs is not None:
        i_out = tl.load(p_outputs + i_row.to(tl.int64) * out_channels + i_place, mask=m_out, other=0)
    value = tl.zeros([b_pixel, b_out], tl.float32)
    for split in range(SPLITS):
        i_sum = (split * rows + i_row) * pixels + i_pixel
        p_sum = p_partial + (i_sum * out_channels)[:, None] + i_place[None, :]
        value += tl.load(p_sum, mask=m_pixel[:, None] & m_needed[None, :], other=0)
    _finish(
        p_output,
        p_bias,
        p_policy,
        p_outputs,
        value,
        i_row,
        (i_row // out_frames).to(tl.int64),
        i_row % out_frames,
        i_pixel,
        i_out,
        m_pixel,
        m_out,
        m_needed,
        frames,
        out_channels,
        out_step_clip,
        out_step_frame,
        out_step_channel,
        out_step_pixel,
        False,
        ACTIVATION,
    )


@triton.jit
def depthwise_kernel(
    p_output,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    p_input,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    p_weight,  # [C_out, 1, kh, kw] | [C_in, 1, kh, kw], or with kt
    p_bias,  # [C_out]
    p_policy,  # [N, C_out]
    p_in_policy,  # [N, C_in] | [N, C_out]
    p_output_count,  # [N]
    p_input_count,  # [N]
    p_taps,  # [N, 3]
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
    i_clip, i_frame = i_row // out_frames, (i_row % out_frames).to(tl.int32)
    m_pixel, m_out = i_pixel < pixels, i_out < out_channels
    first_t, distance_t, count_t = 0, 1, 1
    if p_taps is not None:
        first_t, distance_t, count_t = _taps_of_frames(p_taps, i_row, True)
    taps = count_t * kernel_height * kernel_width
    if p_output_count is not None:
        m_out = m_out & (i_out < tl.load(p_output_count + i_row))
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
    in_count = in_channels
    if p_input_count is not None:
        in_count = tl.load(p_input_count + i_row)
    value = tl.zeros([b_pixel, b_channel], tl.float32)
    for step in range(steps):
        i_tap = step % taps
        if TRANSPOSED:
            i_in = i_out * multiplier + step // taps
            i_weight = i_in
        else:
            i_in = i_out // multiplier
            i_weight = i_out
        tap_t = first_t + i_tap // kernel_width // kernel_height * distance_t
        tap_y, tap_x = i_tap // kernel_width % kernel_height, i_tap % kernel_width
        t = i_frame * stride_t
        if p_taps is not None:
            t, _ = source(i_frame, tap_t, stride_t, padding_t, dilation_t, in_frames, TRANSPOSED)
        y, m_y = source(out_y, tap_y, stride_y, padding_y, dilation_y, in_height, TRANSPOSED)
        x, m_x = source(out_x, tap_x, stride_x, padding_x, dilation_x, in_width, TRANSPOSED)
        m_inside = m_pixel & m_y & m_x
        i_input = ((y * in_width + x) * in_step_pixel)[:, None] + (i_in * in_step_channel)[None, :]
        i_weight = ((i_weight * kernel_frames + tap_t) * kernel_height + tap_y) * kernel_width + tap_x
        m_in = m_read & (i_in < in_count)
        p_frame = p_input + i_clip * in_step_clip + t.to(tl.int64) * in_step_frame
        weight = tl.load(p_weight + i_weight, mask=m_in, other=0).to(tl.float32)
        input = tl.load(p_frame + i_input, mask=m_inside[:, None] & m_in[None, :], other=0).to(tl.float32)
        value += input * weight[None, :]
    if p_bias is not None:
        value += tl.load(p_bias + i_out, mask=m_out, other=0).to(tl.float32)[None, :]
    p_frame = p_output + i_clip * out_step_clip + i_frame.to(tl.int64) * out_step_frame
    p_own = p_frame + (i_pixel * out_step_pixel)[:, None] + (i_out * out_step_channel)[None, :]
    value = activate(value, ACTIVATION)
    m_value = m_pixel[:, None] & m_out[None, :]
    _store(p_own, p_policy, value, i_row, frames, out_channels, out_step_clip, i_out, m_out, m_value)

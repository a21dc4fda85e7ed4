"""patch_gather in Triton: numbers of patches are mixed from four taps with the weights of their patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adakernels.triton.limits import check_frame

BLOCK = 1024
BLOCK_SUM = 512
BLOCK_FRAME = 512


@triton.jit
def _place(p_origin, room, b_value: tl.constexpr):
    """Pixel that a patch's first sample is at or behind along one side, how far, and whether it can move."""
    origin = tl.load(p_origin)
    moves = (origin >= 0) & (origin <= room) & (room > 0)
    inside = tl.minimum(tl.where(origin >= 0, origin, 0.0), room * 1.0)
    first = tl.minimum(inside.to(tl.int32), room)
    return first, tl.zeros([b_value], tl.float32) + (inside - first.to(tl.float32)), moves


@triton.jit
def _frame(p_index, i_patch, frames, INDEXED: tl.constexpr):
    """The frame that a patch is cut from, one that there is."""
    frame = i_patch
    if INDEXED:
        frame = tl.minimum(tl.maximum(tl.load(p_index + i_patch), 0), frames - 1)
    return frame


@triton.jit
def _lerp(a, b, fraction):
    # What has no weight does not spread, not even NaN.
    return tl.where(fraction == 0, a, (1 - fraction) * a + fraction * b)


@triton.jit
def patch_gather_fwd_kernel(
    p_output,  # [M, C, P_h, P_w]
    p_input,  # [N, C, H, W]
    p_origin,  # [M, 2]
    p_index,  # [M]
    p_mean,  # [C]
    p_std,  # [C]
    frames,
    channels,
    planes,
    height,
    frame_height,
    row,
    frame_row,
    step,
    room_y,
    room_x,
    unit,
    INDEXED: tl.constexpr,
    CENTRED: tl.constexpr,
    SCALED: tl.constexpr,
    b_value: tl.constexpr,
):
    size = planes * height * row
    blocks = tl.cdiv(size, b_value)
    i_patch = (tl.program_id(0) // blocks).to(tl.int64)
    i_value = tl.program_id(0) % blocks * b_value + tl.arange(0, b_value)
    m_value = i_value < size
    i_number, i_row, i_plane = i_value % row, i_value // row % height, i_value // row // height
    first_y, fraction_y, _ = _place(p_origin + 2 * i_patch, room_y, b_value)
    first_x, fraction_x, _ = _place(p_origin + 2 * i_patch + 1, room_x, b_value)
    i_frame = _frame(p_index, i_patch, frames, INDEXED)
    i_tap = (i_plane * frame_height + first_y + i_row) * frame_row + first_x * step + i_number
    p_tap = p_input + i_frame * (planes * frame_height * frame_row) + i_tap
    m_right, m_below = m_value & (fraction_x != 0), m_value & (fraction_y != 0)
    upper_left = tl.load(p_tap, mask=m_value, other=0).to(tl.float32)
    upper_right = tl.load(p_tap + step, mask=m_right, other=0).to(tl.float32)
    lower_left = tl.load(p_tap + frame_row, mask=m_below, other=0).to(tl.float32)
    lower_right = tl.load(p_tap + frame_row + step, mask=m_right & m_below, other=0).to(tl.float32)
    upper, lower = _lerp(upper_left, upper_right, fraction_x), _lerp(lower_left, lower_right, fraction_x)
    value = _lerp(upper, lower, fraction_y)
    if SCALED:
        i_channel = tl.where(step == 1, i_plane, i_number % step) % channels
        std = tl.load(p_std + i_channel, mask=m_value, other=1)
        value = value * (1 / (unit * std))
        if CENTRED:
            value -= tl.load(p_mean + i_channel, mask=m_value, other=0) / std
    p_value = p_output + i_patch * size + i_value
    tl.store(p_value, value.to(p_output.dtype.element_ty), mask=m_value)


@triton.jit
def patch_gather_bwd_origin_kernel(
    p_partial,  # [blocks, M, 2]
    p_grad,  # [M, C, P_h, P_w]
    p_input,  # [N, C, H, W]
    p_origin,  # [M, 2]
    p_index,  # [M]
    p_std,  # [C]
    patches,
    frames,
    channels,
    planes,
    height,
    frame_height,
    row,
    frame_row,
    step,
    room_y,
    room_x,
    unit,
    INDEXED: tl.constexpr,
    SCALED: tl.constexpr,
    b_value: tl.constexpr,
):
    size = planes * height * row
    blocks = tl.cdiv(size, b_value)
    i_patch = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = tl.program_id(0) % blocks
    i_value = i_block * b_value + tl.arange(0, b_value)
    m_value = i_value < size
    i_number, i_row, i_plane = i_value % row, i_value // row % height, i_value // row // height
    first_y, fraction_y, moves_y = _place(p_origin + 2 * i_patch, room_y, b_value)
    first_x, fraction_x, moves_x = _place(p_origin + 2 * i_patch + 1, room_x, b_value)
    # At the last place the derivative is the one from the left, so that there is a pixel behind every sample;
    # where there is no room, the tap itself stands for it.
    back_y = (room_y > 0) & (first_y == room_y)
    back_x = (room_x > 0) & (first_x == room_x)
    first_y, fraction_y = tl.where(back_y, first_y - 1, first_y), tl.where(back_y, 1.0, fraction_y)
    first_x, fraction_x = tl.where(back_x, first_x - 1, first_x), tl.where(back_x, 1.0, fraction_x)
    down, right = tl.where(room_y > 0, frame_row, 0), tl.where(room_x > 0, step, 0)
    i_frame = _frame(p_index, i_patch, frames, INDEXED)
    i_tap = (i_plane * frame_height + first_y + i_row) * frame_row + first_x * step + i_number
    p_tap = p_input + i_frame * (planes * frame_height * frame_row) + i_tap
    upper_left = tl.load(p_tap, mask=m_value, other=0).to(tl.float32)
    upper_right = tl.load(p_tap + right, mask=m_value, other=0).to(tl.float32)
    lower_left = tl.load(p_tap + down, mask=m_value, other=0).to(tl.float32)
    lower_right = tl.load(p_tap + down + right, mask=m_value, other=0).to(tl.float32)
    grad = tl.load(p_grad + i_patch * size + i_value, mask=m_value, other=0).to(tl.float32)
    if SCALED:
        i_channel = tl.where(step == 1, i_plane, i_number % step) % channels
        grad *= 1 / (unit * tl.load(p_std + i_channel, mask=m_value, other=1))
    grad_y = grad * _lerp(lower_left - upper_left, lower_right - upper_right, fraction_x)
    grad_x = grad * _lerp(upper_right - upper_left, lower_right - lower_left, fraction_y)
    p_sum = p_partial + 2 * (i_block.to(tl.int64) * patches + i_patch)
    tl.store(p_sum, tl.where(moves_y, tl.sum(grad_y, 0), 0))
    tl.store(p_sum + 1, tl.where(moves_x, tl.sum(grad_x, 0), 0))


@triton.jit
def _add_tap(sums, p_grad, i_row, i_number, height, row, weight, m_value):
    """Adds the gradient at a row and a number of a patch where the patch has it and it counts."""
    m_tap = m_value & (i_row >= 0) & (i_row < height) & (i_number >= 0) & (i_number < row) & (weight != 0)
    grad = tl.load(p_grad + i_row * row + i_number, mask=m_tap, other=0).to(tl.float32)
    return sums + tl.where(m_tap, weight * grad, 0)


@triton.jit
def patch_gather_bwd_input_kernel(
    p_output,  # [N, C, H, W]
    p_grad,  # [M, C, P_h, P_w]
    p_origin,  # [M, 2]
    p_index,  # [M]
    p_std,  # [C]
    patches,
    channels,
    planes,
    height,
    frame_height,
    row,
    frame_row,
    step,
    room_y,
    room_x,
    INDEXED: tl.constexpr,
    SCALED: tl.constexpr,
    b_value: tl.constexpr,
):
    """A program has some numbers of a frame and adds up what its patches give, in their order."""
    size = planes * frame_height * frame_row
    blocks = tl.cdiv(size, b_value)
    i_frame = (tl.program_id(0) // blocks).to(tl.int64)
    i_value = tl.program_id(0) % blocks * b_value + tl.arange(0, b_value)
    m_value = i_value < size
    i_number, i_row = i_value % frame_row, i_value // frame_row % frame_height
    i_plane = i_value // frame_row // frame_height
    sums = tl.zeros([b_value], tl.float32)
    begin, end = i_frame, i_frame + 1
    if INDEXED:
        begin, end = tl.zeros_like(i_frame), tl.zeros_like(i_frame) + patches
    for i_patch in range(begin, end):
        mine = True
        if INDEXED:
            mine = tl.load(p_index + i_patch) == i_frame
        if mine:
            first_y, fraction_y, _ = _place(p_origin + 2 * i_patch, room_y, b_value)
            first_x, fraction_x, _ = _place(p_origin + 2 * i_patch + 1, room_x, b_value)
            p_plane = p_grad + i_patch * (planes * height * row) + i_plane * (height * row)
            y, x = i_row - first_y, i_number - first_x * step
            upper, left = 1 - fraction_y, 1 - fraction_x
            sums = _add_tap(sums, p_plane, y, x, height, row, upper * left, m_value)
            sums = _add_tap(sums, p_plane, y, x - step, height, row, upper * fraction_x, m_value)
            sums = _add_tap(sums, p_plane, y - 1, x, height, row, fraction_y * left, m_value)
            sums = _add_tap(sums, p_plane, y - 1, x - step, height, row, fraction_y * fraction_x, m_value)
    if SCALED:
        i_channel = tl.where(step == 1, i_plane, i_number % step) % channels
        sums *= 1 / tl.load(p_std + i_channel, mask=m_value, other=1)
    tl.store(p_output + i_frame * size + i_value, sums.to(p_output.dtype.element_ty), mask=m_value)


def _is_channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous()


def _geometry(shape: Sequence[int], size: Sequence[int], channels_last: bool) -> dict[str, int]:
    """A frame and a patch as planes of rows of numbers: C planes, or one plane with C numbers per pixel."""
    check_frame("patch_gather", tuple(shape))
    _, channels, height, width = shape
    step = channels if channels_last else 1
    return {
        "channels": channels,
        "planes": 1 if channels_last else channels,
        "height": size[0],
        "frame_height": height,
        "row": size[1] * step,
        "frame_row": width * step,
        "step": step,
        "room_y": height - size[0],
        "room_x": width - size[1],
    }


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=format)


def patch_gather(
    input: Tensor,  # [N, C, H, W]
    origin: Tensor,  # [M, 2]
    size: Sequence[int],
    frame_index: Tensor | None,  # [M]
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
) -> Tensor:  # [M, C, P_h, P_w]
    channels_last, is_bytes = _is_channels_last(input), input.dtype == torch.uint8
    shape = (origin.shape[0], input.shape[1], *size)
    output = _empty(shape, torch.float32 if is_bytes else input.dtype, input.device, channels_last)
    if output.numel() > 0:
        patch_gather_fwd_kernel[(shape[0] * triton.cdiv(output[0].numel(), BLOCK),)](
            output,
            input,
            origin,
            frame_index,
            mean,
            std,
            input.shape[0],
            **_geometry(input.shape, size, channels_last),
            unit=255 if is_bytes else 1,
            INDEXED=frame_index is not None,
            CENTRED=mean is not None,
            SCALED=std is not None,
            b_value=BLOCK,
        )
    return output


def patch_gather_grad_origin(
    grad: Tensor,  # [M, C, P_h, P_w]
    input: Tensor,  # [N, C, H, W]
    origin: Tensor,  # [M, 2]
    frame_index: Tensor | None,  # [M]
    std: Tensor | None,  # [C]
) -> Tensor:  # [M, 2]
    if grad.numel() == 0:
        return torch.zeros_like(origin)
    patches, blocks = len(grad), triton.cdiv(grad[0].numel(), BLOCK_SUM)
    partial = torch.empty(blocks, patches, 2, device=origin.device)
    patch_gather_bwd_origin_kernel[(patches * blocks,)](
        partial,
        grad,
        input,
        origin,
        frame_index,
        std,
        patches,
        input.shape[0],
        **_geometry(input.shape, grad.shape[2:], _is_channels_last(input)),
        unit=255 if input.dtype == torch.uint8 else 1,
        INDEXED=frame_index is not None,
        SCALED=std is not None,
        b_value=BLOCK_SUM,
    )
    return partial.sum(0)


def patch_gather_grad_input(
    grad: Tensor,  # [M, C, P_h, P_w]
    origin: Tensor,  # [M, 2]
    frame_index: Tensor | None,  # [M]
    std: Tensor | None,  # [C]
    input_shape: Sequence[int],
) -> Tensor:  # [N, C, H, W]
    channels_last = _is_channels_last(grad)
    output = _empty(input_shape, grad.dtype, grad.device, channels_last)
    if output.numel() > 0:
        patch_gather_bwd_input_kernel[(len(output) * triton.cdiv(output[0].numel(), BLOCK_FRAME),)](
            output,
            grad,
            origin,
            frame_index,
            std,
            len(grad),
            **_geometry(input_shape, grad.shape[2:], channels_last),
            INDEXED=frame_index is not None,
            SCALED=std is not None,
            b_value=BLOCK_FRAME,
        )
    return output

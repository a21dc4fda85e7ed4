"""temporal_fuse in Triton: every plane is a weighted sum of its frame's and a neighbouring frame's plane."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adakernels.triton.limits import check_frame

BLOCK = 1024
BLOCK_CHANNELS = 32
BLOCK_PIXELS = 64
# A dot product of two planes is split so that enough programs exist however few planes there are.
PIXELS_PER_SPLIT = 2048


@triton.jit
def temporal_fuse_fwd_kernel(
    p_output,  # [N, C, H, W]
    p_input,  # [N, C, H, W]
    p_policy,  # [N, C] | [N, C, 3]
    frames,
    channels,
    pixels,
    stride_channel,
    neighbour,
    SOFT: tl.constexpr,
    b_row: tl.constexpr,
):
    """The mixing (neighbour -1) and its gradient (neighbour +1, where the weight is the next frame's)."""
    size = channels * pixels
    blocks = tl.cdiv(size, b_row)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    i_value = (tl.program_id(0) % blocks) * b_row + tl.arange(0, b_row)
    m_value = i_value < size
    i_channel = i_value // stride_channel % channels
    i_frame = i_row % frames + neighbour
    m_neighbour = m_value & (i_frame >= 0) & (i_frame < frames)
    i_keep = i_row * channels + i_channel
    i_reuse = i_keep + tl.where(neighbour > 0, channels, 0)
    if SOFT:
        keep = tl.load(p_policy + 3 * i_keep, mask=m_value, other=0).to(tl.float32)
        reuse = tl.load(p_policy + 3 * i_reuse + 1, mask=m_neighbour, other=0).to(tl.float32)
    else:
        keep = (tl.load(p_policy + i_keep, mask=m_value, other=2) == 0).to(tl.float32)
        reuse = (tl.load(p_policy + i_reuse, mask=m_neighbour, other=2) == 1).to(tl.float32)
    # Nothing is read that only zeros belong to.
    p_own = p_input + i_row * size + i_value
    p_other = p_input + (i_row + neighbour) * size + i_value
    own = tl.load(p_own, mask=m_value & (keep != 0), other=0).to(tl.float32)
    other = tl.load(p_other, mask=m_neighbour & (reuse != 0), other=0).to(tl.float32)
    output = keep * own + reuse * other
    tl.store(p_output + i_row * size + i_value, output.to(p_output.dtype.element_ty), mask=m_value)


@triton.jit
def temporal_fuse_bwd_policy_kernel(
    p_partial,  # [splits, N, C, 2]
    p_grad,  # [N, C, H, W]
    p_input,  # [N, C, H, W]
    rows,
    frames,
    channels,
    pixels,
    stride_channel,
    stride_pixel,
    pixels_per_split,
    b_channel: tl.constexpr,
    b_pixel: tl.constexpr,
):
    """The gradient's dot products with the frame's features and with those of the frame before."""
    tiles = tl.cdiv(channels, b_channel)
    i_tile = tl.program_id(0) % tiles
    i_row = (tl.program_id(0) // tiles % rows).to(tl.int64)
    i_split = tl.program_id(0) // tiles // rows
    i_channel = i_tile * b_channel + tl.arange(0, b_channel)
    m_channel = i_channel < channels
    first = i_split * pixels_per_split
    end = tl.minimum(first + pixels_per_split, pixels)
    keep = tl.zeros([b_channel, b_pixel], tl.float32)
    reuse = tl.zeros([b_channel, b_pixel], tl.float32)
    for start in range(first, end, b_pixel):
        i_pixel = start + tl.arange(0, b_pixel)
        m_tile = m_channel[:, None] & (i_pixel < end)[None, :]
        i_value = (i_channel * stride_channel)[:, None] + (i_pixel * stride_pixel)[None, :]
        at = i_row * channels * pixels + i_value
        before = (i_row - 1) * channels * pixels + i_value
        grad = tl.load(p_grad + at, mask=m_tile, other=0).to(tl.float32)
        own = tl.load(p_input + at, mask=m_tile, other=0).to(tl.float32)
        previous = tl.load(p_input + before, mask=m_tile & (i_row % frames > 0), other=0).to(tl.float32)
        keep += grad * own
        reuse += grad * previous
    p_sum = p_partial + 2 * ((i_split * rows + i_row) * channels + i_channel)
    tl.store(p_sum, tl.sum(keep, 1), mask=m_channel)
    tl.store(p_sum + 1, tl.sum(reuse, 1), mask=m_channel)


def _strides(
    input: Tensor,  # [N, C, H, W]
) -> tuple[int, int]:
    """Steps from channel to channel and from pixel to pixel of a contiguous or channels-last tensor."""
    return (input[0, 0].numel(), 1) if input.is_contiguous() else (1, input.shape[1])


def _mix(
    source: Tensor,  # [N, C, H, W]
    policy: Tensor,  # [N, C] | [N, C, 3]
    frames: int,
    neighbour: int,
) -> Tensor:  # [N, C, H, W]
    check_frame("temporal_fuse", source.shape)
    output = torch.empty_like(source)
    if output.numel() > 0:
        rows, channels, height, width = source.shape
        grid = (rows * triton.cdiv(channels * height * width, BLOCK),)
        temporal_fuse_fwd_kernel[grid](
            output,
            source,
            policy,
            frames,
            channels,
            height * width,
            _strides(source)[0],
            neighbour,
            SOFT=policy.dim() == 3,
            b_row=BLOCK,
        )
    return output


def temporal_fuse(
    input: Tensor,  # [N, C, H, W]
    policy: Tensor,  # [N, C] | [N, C, 3]
    frames: int,
) -> Tensor:  # [N, C, H, W]
    return _mix(input, policy, frames, -1)


def temporal_fuse_backward(
    grad_output: Tensor,  # [N, C, H, W]
    input: Tensor,  # [N, C, H, W]
    policy: Tensor,  # [N, C] | [N, C, 3]
    frames: int,
    grad_input: bool,
    grad_policy: bool,
) -> tuple[Tensor, Tensor]:  # [N, C, H, W], [N, C, 3]
    return (
        _mix(grad_output, policy, frames, 1) if grad_input else input.new_empty(0),
        _policy_gradient(grad_output, input, policy, frames) if grad_policy else policy.new_empty(0),
    )


def _policy_gradient(
    grad_output: Tensor,  # [N, C, H, W]
    input: Tensor,  # [N, C, H, W]
    policy: Tensor,  # [N, C, 3]
    frames: int,
) -> Tensor:  # [N, C, 3]
    gradient = torch.zeros_like(policy)
    if input.numel() == 0:
        return gradient
    rows, channels, height, width = input.shape
    splits = triton.cdiv(height * width, PIXELS_PER_SPLIT)
    partial = torch.empty(splits, rows, channels, 2, device=input.device)
    grid = (splits * rows * triton.cdiv(channels, BLOCK_CHANNELS),)
    temporal_fuse_bwd_policy_kernel[grid](
        partial,
        grad_output,
        input,
        rows,
        frames,
        channels,
        height * width,
        *_strides(input),
        PIXELS_PER_SPLIT,
        b_channel=BLOCK_CHANNELS,
        b_pixel=BLOCK_PIXELS,
    )
    gradient[..., :2] = partial.sum(0)
    return gradient

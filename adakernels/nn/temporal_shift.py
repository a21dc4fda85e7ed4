"""Temporal shift of channels (TSM)."""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_shift(
    input: Tensor,  # [N, C, H, W]
    *,
    frames: int,
    divisor: int = 8,
) -> Tensor:
    """Moves 1/`divisor` of the channels one frame back in time and another 1/`divisor` one frame on.

    Channels i < C // divisor of frame t come from frame t + 1, the next C // divisor from frame t - 1, and
    the rest stays; what would come from outside the clip is zero (Lin et al., TSM, 2019, both directions).

    Args:
        frames: frames per clip; row b * frames + t of `input` is frame t of clip b.

    Raises:
        ValueError: if `input` is not whole clips of `frames` frames.
    """
    if input.dim() != 4:
        raise ValueError(f"temporal_shift: expected input of shape [N, C, H, W], got {list(input.shape)}")
    if frames < 1 or input.shape[0] % frames != 0:
        raise ValueError(
            f"temporal_shift: expected N to be a multiple of frames = {frames}, got N = {input.shape[0]}"
        )
    fold = input.shape[1] // divisor
    clips = (input.shape[0] // frames, frames)
    output = torch.empty_like(input)
    source, target = input.unflatten(0, clips), output.unflatten(0, clips)
    target[:, :-1, :fold] = source[:, 1:, :fold]
    target[:, -1, :fold] = 0
    target[:, 1:, fold : 2 * fold] = source[:, :-1, fold : 2 * fold]
    target[:, 0, fold : 2 * fold] = 0
    target[:, :, 2 * fold :] = source[:, :, 2 * fold :]
    return output

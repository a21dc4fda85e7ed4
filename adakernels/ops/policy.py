"""What a channel policy is, and which channels it makes necessary."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from adakernels.ops import _checks


class Policy(IntEnum):
    """What becomes of one output channel of one frame (AdaFuse, Eq. 2; its order).

    KEEP: it is computed. REUSE: it is the previous frame's computed channel, zero in a clip's first frame.
    SKIP: it is zero.
    """

    KEEP = 0
    REUSE = 1
    SKIP = 2


def is_soft(policy: Tensor) -> bool:
    """Whether a policy is given as weights [N, C, 3] and not as values [N, C]."""
    return policy.dtype.is_floating_point


def as_index(
    policy: Tensor,  # [N, C]
) -> Tensor:  # [N, C]
    """An integer policy in the form that kernels read, which check its values: int64, contiguous."""
    if policy.dtype == torch.int64 and policy.is_contiguous():
        return policy
    return policy.to(torch.int64).contiguous()


def needed_channels(
    policy: Tensor,  # [N, C] | [N, C, 3]
    frames: int,
) -> Tensor:  # [N, C]
    """The channels U_t of frame t that are kept at t or reused at t+1, so that somebody reads them.

    AdaFuse, Eq. 5; the last frame of a clip has no t+1. Boolean for an integer policy; for a float policy the
    weight of either, 1 - (1 - keep_t)(1 - reuse_{t+1}): differentiable, and exact for one-hot rows.
    """
    if is_soft(policy):
        keep, reuse = policy[..., 0], policy[..., 1]
        return 1 - (1 - keep) * (1 - next_frame(reuse, frames))
    return (policy == Policy.KEEP.value) | next_frame(policy == Policy.REUSE.value, frames)


def previous_frame(
    input: Tensor,  # [N, ...]
    frames: int,
) -> Tensor:  # [N, ...]
    """Row t holds row t-1 of the same clip; zeros in the first frame."""
    clips = input.unflatten(0, (input.shape[0] // frames, frames))
    return torch.cat([torch.zeros_like(clips[:, :1]), clips[:, :-1]], dim=1).flatten(0, 1)


def next_frame(
    input: Tensor,  # [N, ...]
    frames: int,
) -> Tensor:  # [N, ...]
    """Row t holds row t+1 of the same clip; zeros in the last frame."""
    clips = input.unflatten(0, (input.shape[0] // frames, frames))
    return torch.cat([clips[:, 1:], torch.zeros_like(clips[:, :1])], dim=1).flatten(0, 1)


def checked_policy(
    policy: Tensor,  # [N, C]
    op: str,
    name: str,
) -> Tensor:  # [N, C]
    """The policy as int64, its values checked on the CPU always and elsewhere with `ADAKERNELS_DEBUG=1`."""
    sentence = f"{op}: expected {name} values 0 (KEEP), 1 (REUSE) or 2 (SKIP)"
    return _checks.checked_range(policy, len(Policy), sentence)

"""The domain of a convolution: per frame, the list of its output and of its input channels to visit."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


class Domain(NamedTuple):
    """What each frame visits; None is everything.

    A list is a permutation of all channels whose first `count` are those to visit, in ascending order. So a
    block of it is filled up with real channels, and its rest tells which channels nobody computes.
    """

    outputs: Tensor | None  # [N, C_out]
    output_count: Tensor | None  # [N]
    inputs: Tensor | None  # [N, C_in]
    input_count: Tensor | None  # [N]


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

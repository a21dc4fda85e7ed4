"""Clips of different lengths in one tensor: their frames one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedClips:
    """The frames of a batch of clips, each as long as it is.

    What works frame by frame, such as 2D pooling or batch normalisation over everything, is applied with
    `map`; `SlicedConv3d` takes and gives packed clips; `mean` ends with one row per clip.

    Attributes:
        frames: [sum T, C, H, W], clip after clip.
        offsets: int32 [B + 1]; clip b has the rows from offsets[b] to offsets[b + 1].
        length: how many frames each clip would have if none had been dropped, where that is known: what
            `count_flops` takes as the dense network's.
    """

    frames: Tensor
    offsets: Tensor
    length: int | None = None

    @staticmethod
    def from_clips(
        clips: Tensor,  # [B, C, T, H, W]
    ) -> PackedClips:
        """All frames of clips of one length."""
        batch, _, length = clips.shape[:3]
        frames = clips.transpose(1, 2).flatten(0, 1)
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=clips.device) * length
        return PackedClips(frames, offsets, length)

    @property
    def batch(self) -> int:
        """Number of clips B."""
        return len(self.offsets) - 1

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedClips:
        """The same clips with a function from frames [N, C, H, W] to frames [N, C', H', W'] applied."""
        return replace(self, frames=function(self.frames))

    def __add__(self, other: PackedClips) -> PackedClips:
        """The sum of two packings of the same clips, as of a residual branch and its shortcut."""
        return replace(self, frames=self.frames + other.frames)

    def mean(self) -> Tensor:  # [B, C]
        """Each clip's features averaged over its frames and pixels; zero for a clip without frames."""
        lengths = self.offsets.diff()
        clip = torch.arange(self.batch, device=self.offsets.device)
        clip = clip.repeat_interleave(lengths, output_size=len(self.frames))
        pooled = self.frames.mean((2, 3))
        sums = pooled.new_zeros(self.batch, pooled.shape[1]).index_add(0, clip, pooled)
        return sums / lengths.clamp(min=1)[:, None].to(sums.dtype)


def select_frames(
    clips: Tensor,  # [B, C, T, H, W]
    keep: Tensor,  # [B, T]
) -> PackedClips:
    """Pack the kept frames of every clip, so that frames which were apart become neighbours (Ada3D, §3.2).

    Args:
        clips: [B, C, T, H, W].
        keep: bool [B, T]. A policy that keeps no frame of a clip is undefined by the paper: the caller has to
            keep the most likely one.

    Returns:
        Packed clips [sum keep, C, H, W] with `length` T.

    Raises:
        ValueError: for a wrong shape, or a clip that keeps no frame.
        TypeError: for a `keep` that is not bool.
    """
    torch._check_value(
        clips.dim() == 5 and keep.shape == (clips.shape[0], clips.shape[2]),
        lambda: (
            f"select_frames: expected clips [B, C, T, H, W] and keep [B, T], got {list(clips.shape)} and "
            f"{list(keep.shape)}"
        ),
    )
    torch._check_type(
        keep.dtype == torch.bool, lambda: f"select_frames: expected keep of dtype bool, got {keep.dtype}"
    )
    kept = keep.sum(1)
    torch._check_value(
        bool((kept > 0).all()), lambda: "select_frames: expected keep to leave every clip at least one frame"
    )
    offsets = torch.zeros(len(kept) + 1, dtype=torch.int32, device=clips.device)
    offsets[1:] = kept.cumsum(0)
    return PackedClips(clips.transpose(1, 2)[keep], offsets, clips.shape[2])

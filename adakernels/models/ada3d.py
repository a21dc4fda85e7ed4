"""Ada3D: clips decide per stage between 3D and 2D convolutions, and which frames to keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adakernels.models.video_resnet import VideoResNet
from adakernels.nn import PackedClips, select_frames


class Ada3DResNet(VideoResNet):
    """A 3D ResNet-50 whose clips may drop frames and take stages in 2D (Ada3D, §3.2).

    Args:
        stem_taps, stage_taps, num_classes: as of `VideoResNet`.
        frames: frames T per clip, which `forward` then insists on; None takes clips of any length.
        policy_stages: the stages (0 is the stem) that the bits of the convolution policy are about, in order.
    """

    def __init__(
        self,
        stem_taps: int,
        stage_taps: Sequence[Sequence[int]],
        num_classes: int = 400,
        frames: int | None = None,
        *,
        policy_stages: Sequence[int],
    ) -> None:
        super().__init__(stem_taps, stage_taps, num_classes)
        self.frames = frames
        self.policy_stages = tuple(policy_stages)

    def forward(
        self,
        clips: Tensor,  # [B, 3, T, H, W]
        temporal: Tensor | None = None,  # [B, K]
        keep: Tensor | None = None,  # [B, T]
    ) -> Tensor:  # [B, num_classes]
        """Logits of each clip, from its features averaged over the kept frames.

        Args:
            clips: [B, 3, T, H, W].
            temporal: bool [B, K], a bit for each of the K `policy_stages`; False makes the convolutions of
                that stage 2D for the clip, by their temporal centre tap. None is True throughout.
            keep: bool [B, T]; frames to drop are False, at least one of a clip is kept. None keeps all.

        Raises:
            ValueError, TypeError: for a wrong shape, length or dtype, or a clip that keeps no frame.
        """
        name = type(self).__name__
        count = len(self.policy_stages)
        torch._check_value(
            clips.dim() == 5 and self.frames in (None, clips.shape[2]),
            lambda: (
                f"{name}: expected clips of shape [B, 3, {self.frames or 'T'}, H, W], got {list(clips.shape)}"
            ),
        )
        torch._check_value(
            temporal is None or temporal.shape == (len(clips), count),
            lambda: (
                f"{name}: expected temporal of shape [B, K] = {[len(clips), count]}, got "
                f"{None if temporal is None else list(temporal.shape)}"
            ),
        )
        if clips.device.type == "cpu":
            # There frames are convolved and pooled faster with the channels innermost.
            clips = clips.contiguous(memory_format=torch.channels_last_3d)
        packed = PackedClips.from_clips(clips) if keep is None else select_frames(clips, keep)
        bits: list[Tensor | None] = [None] * 5
        if temporal is not None:
            for number, stage in enumerate(self.policy_stages):
                bits[stage] = temporal[:, number].contiguous()
        packed = self.stem(packed, bits[0])
        for number in range(1, 5):
            for block in self.stage(number):
                packed = block(packed, bits[number])
        return self.fc(packed.mean())


def ada3d_i3d_resnet50(num_classes: int = 400, frames: int | None = None) -> Ada3DResNet:
    """Ada3D on I3D with ResNet-50, of which the stem and all four stages may be 2D: K = 5.

    See `Ada3DResNet` for the arguments.
    """
    return Ada3DResNet(5, ((3,), (3, 1), (3, 1), (1, 3)), num_classes, frames, policy_stages=(0, 1, 2, 3, 4))


def ada3d_slowonly_resnet50(num_classes: int = 400, frames: int | None = None) -> Ada3DResNet:
    """Ada3D on Slow-only with ResNet-50, of which the last two stages may be 2D, the others are: K = 2.

    See `Ada3DResNet` for the arguments.
    """
    return Ada3DResNet(1, ((1,), (1,), (3,), (3,)), num_classes, frames, policy_stages=(3, 4))

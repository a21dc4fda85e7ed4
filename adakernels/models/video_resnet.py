"""ResNet-50 over clips with factorised temporal kernels, as PySlowFast builds I3D and Slow-only.

A bottleneck is kt x 1 x 1, 1 x 3 x 3 with the spatial stride, 1 x 1 x 1; time is never strided or pooled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from adakernels.models._layers import initialise
from adakernels.nn import PackedClips, SlicedConv3d, sliced_conv_norm_act

STAGE_CHANNELS = (64, 128, 256, 512)
STAGE_BLOCKS = (3, 4, 6, 3)
EXPANSION = 4


class VideoBottleneck(nn.Module):
    """A bottleneck of 3D convolutions with batch normalisation, added to its shortcut.

    Args:
        in_channels: C_in.
        channels: width of the first two convolutions; the output has four times as many.
        temporal_taps: kt of the first convolution.
        stride: spatial stride, that of the second convolution.
    """

    def __init__(self, in_channels: int, channels: int, temporal_taps: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = conv3d(in_channels, channels, (temporal_taps, 1, 1))
        self.bn1 = nn.BatchNorm3d(channels)
        self.conv2 = conv3d(channels, channels, (1, 3, 3), stride)
        self.bn2 = nn.BatchNorm3d(channels)
        self.conv3 = conv3d(channels, out_channels, (1, 1, 1))
        self.bn3 = nn.BatchNorm3d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                conv3d(in_channels, out_channels, (1, 1, 1), stride), nn.BatchNorm3d(out_channels)
            )

    def forward(
        self,
        clips: PackedClips,  # [sum T, C_in, H, W]
        temporal: Tensor | None = None,  # [B]
    ) -> PackedClips:
        """The output of the block, [sum T, C_out, H', W'], by centre taps alone where `temporal` is False."""
        branch = sliced_conv_norm_act(self.conv1, self.bn1, "relu", clips, temporal)
        branch = sliced_conv_norm_act(self.conv2, self.bn2, "relu", branch, None)
        branch = sliced_conv_norm_act(self.conv3, self.bn3, None, branch, None)
        shortcut = clips
        if self.downsample is not None:
            conv, norm = self.downsample
            shortcut = sliced_conv_norm_act(cast(SlicedConv3d, conv), norm, None, clips, None)
        return branch.map(lambda frames: frames.add_(shortcut.frames).relu_())


class VideoResNet(nn.Module):
    """ResNet-50 over packed clips, stage by stage.

    Args:
        stem_taps: temporal taps of the stem's kt x 7 x 7 convolution.
        stage_taps: for each of the four stages the temporal taps of its blocks, repeated over the blocks.
        num_classes: width of the classifier.
    """

    def __init__(self, stem_taps: int, stage_taps: Sequence[Sequence[int]], num_classes: int = 400) -> None:
        super().__init__()
        self.conv1 = conv3d(3, 64, (stem_taps, 7, 7), 2)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = 64
        widths = zip(STAGE_CHANNELS, STAGE_BLOCKS, stage_taps, strict=True)
        for stage, (channels, count, taps) in enumerate(widths, 1):
            blocks = []
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(VideoBottleneck(in_channels, channels, taps[i % len(taps)], stride))
                in_channels = EXPANSION * channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(in_channels, num_classes)
        initialise(self)

    def stem(
        self,
        clips: PackedClips,  # [sum T, 3, H, W]
        temporal: Tensor | None = None,  # [B]
    ) -> PackedClips:
        """What comes before the residual blocks, [sum T, 64, H / 4, W / 4]."""
        return sliced_conv_norm_act(self.conv1, self.bn1, "relu", clips, temporal).map(self.maxpool)

    def stage(self, number: int) -> Iterator[VideoBottleneck]:
        """The blocks of stage 1 to 4."""
        yield from cast(Iterator[VideoBottleneck], getattr(self, f"layer{number}"))


def conv3d(in_channels: int, out_channels: int, size: tuple[int, int, int], stride: int = 1) -> SlicedConv3d:
    """A convolution without bias that keeps the size but for its spatial stride."""
    padding = (size[0] // 2, size[1] // 2, size[2] // 2)
    return SlicedConv3d(in_channels, out_channels, size, (1, stride, stride), padding, bias=False)

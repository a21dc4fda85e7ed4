"""ResNet (He et al., 2016) whose residual blocks can be gated and shifted in time.

Parameters carry the names of torchvision's ResNet, so that its checkpoints load by key. As there, bottlenecks
put their stride in the 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from adakernels.nn import GatedConv2d, conv_norm_act, conv_norm_add_act, temporal_shift
from adakernels.policies import ChannelPolicy

_STAGE_CHANNELS = (64, 128, 256, 512)
_STAGE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResidualBlock(nn.Module):
    """A residual branch of two or three convolutions with batch normalisation, added to a shortcut.

    With two convolutions it is torchvision's BasicBlock, with three its Bottleneck, down to the keys.

    Args:
        layers: convolution and normalisation pairs, which become `conv1`, `bn1`, `conv2`, …
        downsample: the shortcut; None is the identity.

    Attributes:
        policy: head that decides about the channels of `conv1`; None leaves the block plain.
        shift: whether to shift channels in time at the head of the branch, before `conv1` and the policy.
        frames: frames per clip, as the policy and the shift need to know.
    """

    conv1: GatedConv2d
    bn1: nn.Module
    conv2: GatedConv2d
    bn2: nn.Module
    conv3: GatedConv2d
    bn3: nn.Module

    def __init__(
        self,
        layers: Sequence[tuple[GatedConv2d, nn.Module]],
        downsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for i, (conv, norm) in enumerate(layers, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)
        self.downsample = downsample
        self.policy: ChannelPolicy | None = None
        self.depth = len(layers)
        self.shift = False
        self.frames = 1

    def forward(self, input: Tensor) -> Tensor:  # [N, C_in, H, W]
        """The output of the block, [N, C_out, H', W']."""
        return self.forward_with_policy(input)[0]

    def forward_with_policy(
        self,
        input: Tensor,  # [N, C_in, H, W]
        *,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output of the block, [N, C_out, H', W'], and the policy it ran with, None in a plain block.

        Args:
            overwrite: `input` is not needed afterwards, and the output may be written in its place.
        """
        branch = temporal_shift(input, frames=self.frames) if self.shift else input
        policy = None if self.policy is None else self.policy(branch, frames=self.frames)
        branch = conv_norm_act(self.conv1, self.bn1, "relu", branch, policy, frames=self.frames)
        # A float policy is there for its gradient, which needs the skipped channels.
        known_zeros = None if policy is None or policy.is_floating_point() else policy
        last, norm = self.conv2, self.bn2
        if self.depth == 3:
            branch = conv_norm_act(last, norm, "relu", branch, in_policy=known_zeros)
            last, norm, known_zeros = self.conv3, self.bn3, None
        shortcut = input if self.downsample is None else self.downsample(input)
        overwrite = overwrite if self.downsample is None else isinstance(self.downsample, Downsample)
        output = conv_norm_add_act(
            last, norm, "relu", branch, shortcut, in_policy=known_zeros, overwrite=overwrite
        )
        return output, policy


class Downsample(nn.Sequential):
    """Strided 1x1 convolution and its normalisation, as the shortcut of a block that changes shape."""

    def forward(self, input: Tensor) -> Tensor:  # [N, C_in, H, W]
        """The shortcut, [N, C_out, H', W']."""
        conv, norm = self
        return conv_norm_act(cast(GatedConv2d, conv), norm, None, input)


class ResNet(nn.Module):
    """ResNet-18, 34 or 50 for images.

    Args:
        depth: 18, 34 or 50.
        num_classes: width of the classifier.

    Raises:
        ValueError: for another depth.
    """

    def __init__(self, depth: int, num_classes: int = 1000) -> None:
        super().__init__()
        if depth not in _STAGE_BLOCKS:
            raise ValueError(f"ResNet: expected depth to be 18, 34 or 50, got {depth}")
        make_block, expansion = (_bottleneck, 4) if depth == 50 else (_basic_block, 1)
        self.conv1 = GatedConv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = 64
        for stage, (channels, count) in enumerate(zip(_STAGE_CHANNELS, _STAGE_BLOCKS[depth], strict=True), 1):
            blocks = []
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(make_block(in_channels, channels, stride))
                in_channels = channels * expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:  # [N, 3, H, W]
        """Logits of each image, [N, num_classes]."""
        features = self.stem(input)
        for _, block in self.blocks():
            features = block(features)
        return self.fc(features.mean((2, 3)))

    def stem(self, input: Tensor) -> Tensor:  # [N, 3, H, W]
        """What comes before the residual blocks, [N, 64, H / 4, W / 4]."""
        inner = input.is_contiguous(memory_format=torch.channels_last)
        if input.device.type == "cpu":
            # There max pooling is twenty times faster with the channels innermost.
            input = input.contiguous(memory_format=torch.channels_last)
        features = self.maxpool(conv_norm_act(self.conv1, self.bn1, "relu", input))
        return features.contiguous(memory_format=torch.channels_last if inner else torch.contiguous_format)

    def blocks(self) -> Iterator[tuple[str, ResidualBlock]]:
        """The residual blocks in order, each with its name within the model."""
        for stage in range(1, 5):
            for name, block in getattr(self, f"layer{stage}").named_children():
                yield f"layer{stage}.{name}", block


def _basic_block(in_channels: int, channels: int, stride: int) -> ResidualBlock:
    return ResidualBlock(
        (
            (_conv(in_channels, channels, 3, stride), nn.BatchNorm2d(channels)),
            (_conv(channels, channels, 3), nn.BatchNorm2d(channels)),
        ),
        _downsample(in_channels, channels, stride),
    )


def _bottleneck(in_channels: int, channels: int, stride: int) -> ResidualBlock:
    return ResidualBlock(
        (
            (_conv(in_channels, channels, 1), nn.BatchNorm2d(channels)),
            (_conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)),
            (_conv(channels, 4 * channels, 1), nn.BatchNorm2d(4 * channels)),
        ),
        _downsample(in_channels, 4 * channels, stride),
    )


def _downsample(in_channels: int, out_channels: int, stride: int) -> Downsample | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return Downsample(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> GatedConv2d:
    return GatedConv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


def resnet18(num_classes: int = 1000) -> ResNet:
    """ResNet-18 for images; loads torchvision's checkpoints."""
    return ResNet(18, num_classes)


def resnet34(num_classes: int = 1000) -> ResNet:
    """ResNet-34 for images; loads torchvision's checkpoints."""
    return ResNet(34, num_classes)


def resnet50(num_classes: int = 1000) -> ResNet:
    """ResNet-50 for images; loads torchvision's checkpoints."""
    return ResNet(50, num_classes)

"""A3D: Slow and SlowFast networks whose width, resolution and number of frames are chosen after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakernels.models._layers import initialise, make_divisible
from adakernels.models.video_resnet import EXPANSION, STAGE_BLOCKS, STAGE_CHANNELS
from adakernels.nn import SlimConv3d, SlimLinear
from adakernels.ops.slim_conv import Segments


class SlimBottleneck(nn.Module):
    """Residual block of a temporal (k_t x 1 x 1), a spatial (1 x 3 x 3) and a 1 x 1 x 1 convolution.

    Args:
        in_channels, channels, out_channels: at full width, of the input, of the two inner convolutions and of
            the output; `in_channels` includes `lateral`.
        frames: extent k_t of the kernel in time.
        stride: of the spatial convolution and the shortcut, in height and width.
        lateral: how many of the input's channels, the last ones, come from another pathway.

    Attributes:
        width: the share of its channels that the block runs with.
    """

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, frames: int, stride: int, lateral: int = 0
    ) -> None:
        super().__init__()
        strides = (1, stride, stride)
        self.conv1 = _conv(in_channels, channels, (frames, 1, 1), activation="relu")
        self.conv2 = _conv(channels, channels, (1, 3, 3), strides, activation="relu")
        self.conv3 = _conv(channels, out_channels, (1, 1, 1))
        self.downsample: SlimConv3d | None = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = _conv(in_channels, out_channels, (1, 1, 1), strides)
        self.lateral = lateral
        self.width = 1.0

    def forward(self, input: Tensor) -> Tensor:  # [B, C, T, H, W]
        """The output of the block, [B, outer width, T, H', W'], from its input at the same width."""
        inner, outer = self.widths
        segments = with_lateral(input.shape[1], self.conv1.in_channels, self.lateral)
        branch = self.conv1(input, out_channels=inner, segments=segments)
        branch = self.conv3(self.conv2(branch, out_channels=inner), out_channels=outer)
        if self.downsample is not None:
            input = self.downsample(input, out_channels=outer, segments=segments)
        return branch.add_(input).relu_()

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of the inner convolutions and of the output, slimmed."""
        inner, outer = self.conv1.out_channels, self.conv3.out_channels
        return make_divisible(inner * self.width), make_divisible(outer * self.width)

    def active_parameters(self, in_channels: int) -> int:
        """How many parameters take part, with an input of `in_channels`."""
        inner, outer = self.widths
        count = _parameters(self.conv1, in_channels, inner) + _parameters(self.conv2, inner, inner)
        count += _parameters(self.conv3, inner, outer)
        if self.downsample is not None:
            count += _parameters(self.downsample, in_channels, outer)
        return count


def with_lateral(channels: int, all_channels: int, lateral: int) -> Segments | None:
    """The ranges of `all_channels` that a slimmed input has: the first ones, and the last `lateral`. None
    without the latter."""
    if lateral == 0:
        return None
    return ((0, channels - lateral), (all_channels - lateral, all_channels))


class SlimPathway(nn.Module):
    """The convolutions of a 3D ResNet-50 without pooling in time, as in SlowFast networks.

    Args:
        channels: of the stem, at full width; the stages have 1, 2, 4 and 8 times as many inside.
        stem_frames: extent of the stem's kernel in time.
        stage_frames: extent in time of the first convolution in the blocks of each stage.
        laterals: channels that another pathway adds to the input of each stage.
    """

    def __init__(
        self,
        channels: int,
        stem_frames: int,
        stage_frames: Sequence[int],
        laterals: Sequence[int] = (0, 0, 0, 0),
    ) -> None:
        super().__init__()
        self.stem = _conv(3, channels, (stem_frames, 7, 7), (1, 2, 2), activation="relu")
        in_channels = channels
        for stage, (count, frames, lateral) in enumerate(
            zip(STAGE_BLOCKS, stage_frames, laterals, strict=True), 1
        ):
            inner = channels * STAGE_CHANNELS[stage - 1] // STAGE_CHANNELS[0]
            blocks = []
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                extra = lateral if i == 0 else 0
                blocks.append(
                    SlimBottleneck(in_channels + extra, inner, EXPANSION * inner, frames, stride, extra)
                )
                in_channels = EXPANSION * inner
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.width = 1.0

    def set_width(self, width: float) -> None:
        """Runs with the share `width` of all channels from now on."""
        self.width = width
        for stage in self.stages():
            for block in stage:
                assert isinstance(block, SlimBottleneck)
                block.width = width

    def begin(self, input: Tensor) -> Tensor:  # [B, 3, T, H, W]
        """What comes before the stages, [B, stem_width, T, H / 4, W / 4]."""
        if input.device.type == "cpu":
            # There convolutions and pooling are fastest with the channels innermost.
            input = input.contiguous(memory_format=torch.channels_last_3d)
        features = self.stem(input, out_channels=self.stem_width)
        # Frame by frame, since pooling over three dimensions is slower.
        frames = F.max_pool2d(features.transpose(1, 2).flatten(0, 1), 3, stride=2, padding=1)
        return frames.unflatten(0, (features.shape[0], features.shape[2])).transpose(1, 2)

    @property
    def stem_width(self) -> int:
        """Channels of the stem, slimmed."""
        return make_divisible(self.stem.out_channels * self.width)

    def active_parameters(self) -> int:
        """How many parameters take part."""
        channels = self.stem_width
        count = _parameters(self.stem, 3, channels)
        for stage in self.stages():
            for block in stage:
                assert isinstance(block, SlimBottleneck)
                count += block.active_parameters(channels + block.lateral)
                channels = block.widths[1]
        return count

    def stages(self) -> Iterator[nn.Sequential]:
        """The four stages, in order."""
        for stage in range(1, 5):
            yield getattr(self, f"layer{stage}")


class A3DNetwork(nn.Module):
    """What both networks share: the budget, and how clips are fitted to it.

    Attributes:
        width, size, frames: as `set_budget` set them.
    """

    slow: SlimPathway

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.all_frames = frames
        self.width: float = 1.0
        self.size: tuple[int, int] | None = None
        self.frames = frames

    def set_budget(
        self, *, width: float = 1.0, size: int | tuple[int, int] | None = None, frames: int | None = None
    ) -> None:
        """Sets the share of channels, the resolution and the number of frames of the Slow pathway.

        Every width C of its layers becomes the multiple of 8 nearest to C · width (never below 0.9 of that).
        Frames are resized bilinearly, and taken at regular distances: frame i is ⌊i · T / frames⌋ of T.
        The cost falls to about width² · (size / S)² · frames / T.

        Args:
            width: share of the channels, in (0, 1].
            size: height and width in pixels, an int for squares; None takes clips as they are.
            frames: frames of the Slow pathway; None for all.

        Raises:
            ValueError: for numbers out of range.
        """
        name = type(self).__name__
        if not 0 < width <= 1:
            raise ValueError(f"{name}: expected width in (0, 1], got {width}")
        if frames is not None and not 1 <= frames <= self.all_frames:
            raise ValueError(f"{name}: expected frames from 1 to {self.all_frames}, got {frames}")
        sizes = (size, size) if isinstance(size, int) else size
        if sizes is not None and (len(sizes) != 2 or min(sizes) < 1):
            raise ValueError(f"{name}: expected size to be positive, got {size}")
        self.width, self.size, self.frames = width, sizes, frames or self.all_frames
        self.slow.set_width(width)

    def fitted(self, clips: Tensor, frames: int) -> Tensor:  # [B, 3, T, H, W]
        """The clips with `frames` frames, in the size that the budget asks for."""
        clips = subsampled(clips, frames)
        if self.size is None or tuple(clips.shape[3:]) == self.size:
            return clips
        return resized(clips, self.size)

    def check(self, clips: Tensor, frames: int) -> None:
        """Raises ValueError unless `clips` is [B, 3, T, H, W] with T = `frames`."""
        if clips.dim() != 5 or clips.shape[1] != 3 or clips.shape[2] != frames:
            raise ValueError(
                f"{type(self).__name__}: expected input of shape [B, 3, {frames}, H, W], "
                f"got {list(clips.shape)}"
            )


def subsampled(clips: Tensor, frames: int) -> Tensor:  # [B, C, T, H, W]
    """Frame ⌊i · T / frames⌋ for every i < `frames`."""
    count = clips.shape[2]
    if frames == count:
        return clips
    return clips[:, :, [i * count // frames for i in range(frames)]]


def resized(clips: Tensor, size: Sequence[int]) -> Tensor:  # [B, C, T, H, W]
    """Every frame interpolated bilinearly (corners not aligned)."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, tuple(size), mode="bilinear", align_corners=False)
    return frames.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)


class A3DSlow(A3DNetwork):
    """Slow-only ResNet-50 (SlowFast networks, Feichtenhofer et al., 2019) at any width, size and frame count.

    Args:
        num_classes: width of the classifier.
        frames: frames per clip at full budget.
        dropout: share of features dropped before the classifier in training.
    """

    def __init__(self, num_classes: int = 400, frames: int = 8, dropout: float = 0.5) -> None:
        super().__init__(frames)
        self.slow = SlimPathway(64, 1, (1, 1, 3, 3))
        self.dropout = nn.Dropout(dropout)
        self.fc = SlimLinear(2048, num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:  # [B, 3, T, H, W]
        """Logits of each clip, [B, num_classes], within the budget.

        Raises:
            ValueError: if `input` is not of that shape with the T frames of the full budget.
        """
        self.check(input, self.all_frames)
        features = self.slow.begin(self.fitted(input, self.frames))
        for stage in self.slow.stages():
            features = stage(features)
        return self.fc(self.dropout(features.mean((2, 3, 4))))

    def active_parameters(self) -> int:
        """How many of the parameters a call with the present budget uses."""
        return self.slow.active_parameters() + _head_parameters(self.fc, _features(self.slow))


class Lateral(nn.Module):
    """Brings features of the Fast pathway to the shape of the Slow one (A3D, §3.2, "adaptive fusion").

    A 5 x 1 x 1 convolution with twice the channels and a stride of `alpha` in time, batch normalisation and
    ReLU; then subsampling in time and bilinear interpolation in space, as for clips.
    """

    def __init__(self, channels: int, alpha: int) -> None:
        super().__init__()
        self.conv = _conv(channels, 2 * channels, (5, 1, 1), (alpha, 1, 1), activation="relu")

    def forward(
        self,
        fast: Tensor,  # [B, beta C, alpha T, H, W]
        size: Sequence[int],
    ) -> Tensor:  # [B, 2 beta C, T', H', W']
        """The features in the size (T', H', W') of the Slow pathway."""
        features = subsampled(self.conv(fast), size[0])
        return features if features.shape[3:] == tuple(size[1:]) else resized(features, size[1:])


class A3DSlowFast(A3DNetwork):
    """SlowFast ResNet-50 whose Slow pathway runs at any width, size and frame count; the Fast one runs whole.

    Slow layers that follow a fusion read two ranges of their input channels: the first ones, slimmed, and the
    last ones, which come from the Fast pathway.

    Args:
        num_classes: width of the classifier.
        frames: frames of the Slow pathway at full budget.
        alpha: frames of the Fast pathway for each of these.
        beta_inverse: ratio 1 / beta of the two pathways' channels.
        dropout: share of features dropped before the classifier in training.
    """

    def __init__(
        self,
        num_classes: int = 400,
        frames: int = 4,
        alpha: int = 8,
        beta_inverse: int = 8,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(frames)
        self.alpha = alpha
        channels = 64 // beta_inverse
        outputs = [channels, *(EXPANSION * c // beta_inverse for c in STAGE_CHANNELS)]
        self.slow = SlimPathway(64, 1, (1, 1, 3, 3), [2 * c for c in outputs[:-1]])
        self.fast = SlimPathway(channels, 5, (3, 3, 3, 3))
        self.laterals = nn.ModuleList(Lateral(c, alpha) for c in outputs[:-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = SlimLinear(2048 + outputs[-1], num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:  # [B, 3, alpha T, H, W]
        """Logits of each clip, [B, num_classes]; the budget is that of the Slow pathway.

        The Fast pathway sees all frames in the size that they have, the Slow one those that are left of them.

        Raises:
            ValueError: if `input` is not of that shape with the alpha T frames of the full budget.
        """
        self.check(input, self.alpha * self.all_frames)
        slow = self.slow.begin(self.fitted(input, self.frames))
        fast = self.fast.begin(input)
        for lateral, slow_stage, fast_stage in zip(
            self.laterals, self.slow.stages(), self.fast.stages(), strict=True
        ):
            slow = slow_stage(torch.cat([slow, lateral(fast, slow.shape[2:])], 1))
            fast = fast_stage(fast)
        features = torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1)
        segments = with_lateral(features.shape[1], self.fc.in_features, fast.shape[1])
        return self.fc(self.dropout(features), segments)

    def active_parameters(self) -> int:
        """How many of the parameters a call with the present budget uses."""
        count = self.slow.active_parameters() + self.fast.active_parameters()
        count += sum(parameter.numel() for parameter in self.laterals.parameters())
        return count + _head_parameters(self.fc, _features(self.slow) + _features(self.fast))


def _conv(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int] = (1, 1, 1),
    activation: str | None = None,
) -> SlimConv3d:
    return SlimConv3d(
        in_channels,
        out_channels,
        kernel,
        stride,
        tuple(size // 2 for size in kernel),
        bias=False,
        norm=nn.BatchNorm3d,
        activation=activation,
    )


def _parameters(conv: SlimConv3d, in_channels: int, out_channels: int) -> int:
    assert conv.norm is not None
    norms = sum(1 for _ in conv.norm.parameters())
    return out_channels * (in_channels * conv.weight[0, 0].numel() + norms)


def _features(pathway: SlimPathway) -> int:
    block = pathway.get_submodule("layer4")[-1]  # type: ignore[index]
    width: int = block.widths[1]
    return width


def _head_parameters(fc: SlimLinear, features: int) -> int:
    return fc.out_features * (features + 1)


def a3d_slow_resnet50(num_classes: int = 400, frames: int = 8) -> A3DSlow:
    """A3D on Slow-8x8 ResNet-50; `set_budget` chooses width, size and frames."""
    return A3DSlow(num_classes, frames)


def a3d_slowfast_resnet50(num_classes: int = 400, frames: int = 4) -> A3DSlowFast:
    """A3D on SlowFast-4x16 ResNet-50; its clips have 8 times `frames` frames."""
    return A3DSlowFast(num_classes, frames)

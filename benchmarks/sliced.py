"""Sliced 3D convolutions and Ada3D networks: the cases, and the forms that are raced against each other."""

from __future__ import annotations

import zlib
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import adakernels as ak
from adakernels.models import Ada3DResNet
from benchmarks.dense import FORMATS, DenseNetwork, in_form, sum_of_2d
from benchmarks.measure import FORMATS as FRAME_FORMATS
from benchmarks.measure import Result


@dataclass(frozen=True)
class ClipCase:
    """A kt x k x k convolution of clips of these lengths; every second one, from the first on, is 2D."""

    in_channels: int
    out_channels: int
    size: int
    lengths: tuple[int, ...]
    taps: int = 3
    kernel: int = 1
    stride: int = 1
    quick: bool = False

    family = "sliced_conv3d"

    @property
    def padding(self) -> tuple[int, int, int]:
        return self.taps // 2, self.kernel // 2, self.kernel // 2

    @property
    def strides(self) -> tuple[int, int, int]:
        return 1, self.stride, self.stride

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def name(self) -> str:
        shape = f"{self.in_channels}to{self.out_channels}k{self.taps}x{self.kernel}at{self.size}"
        clips = "+".join(map(str, self.lengths)) if self.ragged else f"{len(self.lengths)}x{self.lengths[0]}"
        return f"{shape}-{clips}"

    @property
    def seed(self) -> int:
        return zlib.crc32(f"{self.family}/{self.name}".encode())


_SHAPES = (
    (64, 64, 64),
    (256, 64, 64),
    (256, 128, 64),
    (512, 128, 32),
    (512, 256, 32),
    (1024, 256, 16),
    (1024, 512, 16),
    (2048, 512, 8),
)
_ONE, _EIGHT, _RAGGED = (8,), (8,) * 8, (5, 8, 11, 16)
# Others would take minutes.
_SEVERAL = {
    (64, 64, 64): (_EIGHT, _RAGGED),
    (512, 128, 32): (_RAGGED,),
    (1024, 256, 16): (_EIGHT,),
    (2048, 512, 8): (_RAGGED,),
}
QUICK = {(256, 64, 64), (1024, 256, 16)}
CLIPS = [
    ClipCase(*shape, lengths, quick=shape in QUICK and lengths == _ONE)
    for shape in _SHAPES
    for lengths in (_ONE, *_SEVERAL.get(shape, ()))
] + [ClipCase(3, 64, 256, _ONE, taps=5, kernel=7, stride=2)]


class ClipBackwardCase(ClipCase):
    """The same, forward and backward to input, weight and bias."""

    family = "sliced_backward"

    @property
    def name(self) -> str:
        return f"{super().name}-backward"


BACKWARD = [
    ClipBackwardCase(*shape, (8, 8), quick=shape == _SHAPES[5])
    for shape in (_SHAPES[0], *_SHAPES[2:4], *_SHAPES[5::2])
]


class Clips:
    """Random clips, weights and flags of a case.

    `clips` has what a plain convolution takes in one call: all clips, or each of the ragged ones, which are
    packed for our operator.
    """

    def __init__(self, case: ClipCase) -> None:
        self.case = case
        random = torch.Generator().manual_seed(case.seed)
        fan_in = case.in_channels * case.taps * case.kernel**2
        shape = (case.out_channels, case.in_channels, case.taps, case.kernel, case.kernel)
        self.weight = torch.randn(shape, generator=random) * (2 / fan_in) ** 0.5
        self.bias = torch.randn(case.out_channels, generator=random) * 0.1
        self.temporal = torch.arange(len(case.lengths)) % 2 == 1
        self.offsets = None
        image = (case.in_channels, case.size, case.size)
        if case.ragged:
            self.offsets = F.pad(torch.tensor(case.lengths), (1, 0)).cumsum(0).int()
            self.input = torch.randn(sum(case.lengths), *image, generator=random)
        else:
            clips = torch.randn(len(case.lengths), case.lengths[0], *image, generator=random)
            self.input = clips.transpose(1, 2).contiguous()
        self.taps = [self.weight[:, :, j].contiguous() for j in range(case.taps)]
        self.clips = [self.input]
        if case.ragged:
            self.clips = [clip.transpose(0, 1)[None].contiguous() for clip in self.input.split(case.lengths)]

    def in_format(self, name: str) -> Clips:
        """The same clips in the memory format of that name."""
        other = copy(self)
        order = FRAME_FORMATS[name] if self.case.ragged else FORMATS[name]
        other.input = self.input.contiguous(memory_format=order)
        other.clips = [other.input]
        if self.case.ragged:
            other.clips = [clip.contiguous(memory_format=FORMATS[name]) for clip in self.clips]
        other.weight = self.weight.contiguous(memory_format=FORMATS[name])
        other.taps = [tap.contiguous(memory_format=FRAME_FORMATS[name]) for tap in self.taps]
        return other

    def leaves(self, form: str) -> tuple[Tensor, ...]:
        """Input, weight and bias of a form; the sum of 2D convolutions has a weight for each tap."""
        return (self.input, *(self.taps if form == "summed" else (self.weight,)), self.bias)

    def gradients(self, form: str, upstream: Tensor) -> tuple[Tensor, ...]:
        """Those of the leaves of a form, for clips of one length, from the output's gradient."""
        output = self.together(getattr(self, form)())
        assert isinstance(output, Tensor)
        return torch.autograd.grad(output, self.leaves(form), upstream)

    @property
    def work(self) -> float:
        """work_ours / work_dense, from the flags."""
        pairs = zip(self.case.lengths, self.temporal.tolist(), strict=True)
        done = sum(length * (1 if whole else 1 / self.case.taps) for length, whole in pairs)
        return done / sum(self.case.lengths)

    def dense(self) -> list[Tensor]:
        """All temporal taps by the 3D convolution, then ReLU in place."""
        case = self.case
        return [F.conv3d(x, self.weight, self.bias, case.strides, case.padding).relu_() for x in self.clips]

    def summed(self) -> list[Tensor]:
        """All temporal taps as a sum of 2D convolutions of all frames, then ReLU in place."""
        case = self.case
        return [sum_of_2d(x, self.taps, self.bias, case.stride, case.kernel // 2).relu_() for x in self.clips]

    def masked(self) -> list[Tensor]:
        """The same math as ours by both convolutions of everything and a mask."""
        case, centre = self.case, self.case.taps // 2
        middle = self.weight[:, :, centre : centre + 1]
        flags = self.temporal[:, None, None, None, None]
        parts = flags.split(1) if case.ragged else [flags]
        outputs = []
        for clips, flag in zip(self.clips, parts, strict=True):
            whole = F.conv3d(clips, self.weight, self.bias, case.strides, case.padding)
            flat = F.conv3d(clips, middle, self.bias, case.strides, (0, *case.padding[1:]))
            outputs.append(torch.where(flag, whole, flat).relu_())
        return outputs

    def together(self, output: Result) -> Result:
        """What any of the forms returned as our operator returns it: ragged clips packed."""
        if isinstance(output, Tensor):
            return output
        if not self.case.ragged:
            return output[0]
        return torch.cat([clip[0].transpose(0, 1) for clip in output])

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of the package's operator."""
        case = self.case
        named = {
            "stride": case.strides,
            "padding": case.padding,
            "frame_offsets": self.offsets,
            "activation": "relu",
        }
        return (self.input, self.weight, self.bias, self.temporal), named

    def ours(self) -> Tensor:
        """The package's operator, flags and offsets included."""
        positional, named = self.arguments()
        return ak.sliced_conv3d(*positional, **named)

    def reference(self) -> Tensor:
        """The operator's reference."""
        with ak.use_backend("reference"):
            return self.ours()

    def backend(self) -> str | None:
        """The backend that runs the operator."""
        positional, named = self.arguments()
        return ak.explain(ak.sliced_conv3d, *positional, **named).backend


@dataclass(frozen=True)
class Ada3DCase:
    """I3D-ResNet-50 of `clips` clips of 8 frames: about 2.2 of 5 stages 3D and 5.7 of 8 frames kept."""

    clips: int
    quick: bool = False

    family = "ada3d_model"

    @property
    def name(self) -> str:
        return f"ada3d_i3d_resnet50-{self.clips}x8frames"

    def policies(self) -> tuple[Tensor, Tensor]:  # [B, 5], [B, 8]
        """Which stages are 3D, and which frames are kept, as Ada3D reports on average (FCVID)."""
        random = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def draw(per_clip: int, share: float) -> Tensor:
            count = round(self.clips * share)
            flags = torch.zeros(self.clips * per_clip, dtype=torch.bool)
            flags[torch.randperm(len(flags), generator=random)[:count]] = True
            return flags.unflatten(0, (self.clips, per_clip))

        return draw(5, 2.2), draw(8, 5.7)


MODELS = [Ada3DCase(1), Ada3DCase(8)]


class FoldedI3D(DenseNetwork):
    """The plain I3D network."""

    def __init__(self, model: Ada3DResNet, form: str) -> None:
        super().__init__(form)
        self.model = model
        self.fold(model.conv1, model.bn1)
        for block in self._blocks():
            self.fold(block.conv1, block.bn1)
            self.fold(block.conv2, block.bn2)
            self.fold(block.conv3, block.bn3)
            if block.downsample is not None:
                self.fold(block.downsample[0], block.downsample[1])

    def _blocks(self) -> list[Any]:
        return [block for number in range(1, 5) for block in self.model.stage(number)]

    def __call__(self, clips: Tensor) -> Tensor:  # [B, 3, T, H, W]
        convs = self.convs
        features = self.pool(convs[self.model.conv1](in_form(clips, self.form)).relu_())
        for block in self._blocks():
            branch = convs[block.conv1](features).relu_()
            branch = convs[block.conv2](branch).relu_()
            branch = convs[block.conv3](branch)
            shortcut = features if block.downsample is None else convs[block.downsample[0]](features)
            features = branch.add_(shortcut).relu_()
        return self.model.fc(features.mean((2, 3, 4)))

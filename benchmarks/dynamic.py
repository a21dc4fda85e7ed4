"""Dynamic 3D convolutions and VA-RED² networks: the cases, and the forms that race each other."""

from __future__ import annotations

import zlib
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from adakernels.models import VARed2R2Plus1d
from adakernels.ops import dynamic_conv3d_flops
from adakernels.ops.dynamic_conv3d import reconstruct_channels, reconstruct_frames
from benchmarks.dense import FORMATS, DenseNetwork, in_form, sum_of_2d
from benchmarks.measure import FORMATS as FRAME_FORMATS

LEVELS = 3


@dataclass(frozen=True)
class DynamicCase:
    """A convolution of clips at these pairs of temporal and channel levels, one pair for each clip."""

    family: str
    in_channels: int
    out_channels: int
    frames: int
    size: int
    levels: tuple[tuple[int, int], ...]
    kernel: tuple[int, int, int] = (1, 3, 3)
    stride: int = 1
    groups: int = 1
    quick: bool = False

    @property
    def padding(self) -> tuple[int, int, int]:
        return self.kernel[0] // 2, self.kernel[1] // 2, self.kernel[2] // 2

    @property
    def strides(self) -> tuple[int, int, int]:
        return 1, self.stride, self.stride

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def name(self) -> str:
        channels = f"dw{self.out_channels}" if self.groups > 1 else f"{self.in_channels}to{self.out_channels}"
        kernel = "x".join(map(str, self.kernel))
        shape = f"{channels}k{kernel}at{self.frames}x{self.size}" + (f"s{self.stride}" * (self.stride > 1))
        mixed = len(self.levels) > 1
        level = f"mixed{len(self.levels)}" if mixed else "R{}r1_{}".format(*(2**p for p in self.levels[0]))
        return f"{shape}-{level}"

    @property
    def seed(self) -> int:
        return zlib.crc32(f"{self.family}/{self.name}".encode())

    def work(self, *, filters: bool) -> float:
        """work_ours / work_dense: the mean of r / R, and with `filters` what makes the other frames and
        channels, 9 products for each of their pixels."""
        gates = [F.one_hot(torch.tensor(self.levels)[:, i], LEVELS) for i in (0, 1)]
        dense, actual = dynamic_conv3d_flops(
            (self.out_channels, self.in_channels // self.groups, *self.kernel),
            *gates,
            batch=len(self.levels),
            output_size=(self.frames, self.out_size, self.out_size),
            taps=9 if filters else 0,
        )
        return float(actual.mean()) / dense


_GRID = tuple((t, c) for t in range(LEVELS) for c in range(LEVELS) if (t, c) != (0, 0))
_FEW = ((1, 1), (1, 2))
_MIXED = ((0, 0), (0, 1), (1, 0), (1, 1))
# Channels in and out, frames, size, stride. Those in the middle are measured at all levels.
_R2PLUS1D = (
    (64, 144, 16, 64, 1),
    (64, 230, 16, 64, 2),
    (128, 288, 8, 32, 1),
    (256, 576, 4, 16, 1),
    (512, 1152, 2, 8, 1),
)
# Channels in and out, kernel and groups, size.
_X3D = tuple(
    case
    for narrow, wide, size in ((24, 54, 64), (48, 108, 32), (96, 216, 16), (192, 432, 8))
    for case in ((narrow, wide, 1, 1, size), (wide, wide, 3, wide, size), (wide, narrow, 1, 1, size))
)
LAYERS = [
    DynamicCase(
        "dynamic_conv3d", ci, co, frames, size, levels, stride=stride, quick=ci == 128 and levels == ((1, 1),)
    )
    for ci, co, frames, size, stride in _R2PLUS1D
    for levels in (*((pair,) for pair in (_GRID if ci in (128, 256) else _FEW)), *((_MIXED,) * (ci > 64)))
] + [
    DynamicCase("dynamic_x3d", ci, co, 16, size, levels, (kernel,) * 3, groups=groups)
    for ci, co, kernel, groups, size in _X3D
    for levels in ((((1, 0),), ((0, 1),), ((1, 1),), _MIXED) if size == 32 else (((1, 1),),))
]


class DynamicLayer:
    """A dynamic layer with random clips, weights and filters, contiguous; gates pick one level, weight 1."""

    def __init__(self, case: DynamicCase) -> None:
        self.case = case
        random = torch.Generator().manual_seed(case.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        per_group = case.in_channels // case.groups
        fan_in = per_group * case.kernel[0] * case.kernel[1] * case.kernel[2]
        self.input = randn(len(case.levels), case.in_channels, case.frames, case.size, case.size)
        self.weight = randn(case.out_channels, per_group, *case.kernel) * (2 / fan_in) ** 0.5
        self.bias = randn(case.out_channels) * 0.1
        self.temporal_weight = randn(2 ** (LEVELS - 1) - 1, case.out_channels, 3, 3) / 3
        self.channel_weight = randn(case.out_channels, 3, 3) / 3
        levels = torch.tensor(case.levels)
        self.gates = [F.one_hot(levels[:, i], LEVELS).float() for i in (0, 1)]
        self.taps = [self.weight[:, :, j].contiguous() for j in range(case.kernel[0])]
        self._bind()

    def _bind(self) -> None:
        """Put the arguments of the operators together, so that no timed call has to."""
        case = self.case
        self._dense = (self.input, self.weight, self.bias, case.strides, case.padding, 1, case.groups)
        self._positional = (self.input, self.weight, self.bias, *self.gates)
        self._named = {
            "temporal_weight": self.temporal_weight,
            "channel_weight": self.channel_weight,
            "stride": case.strides,
            "padding": case.padding,
            "groups": case.groups,
            "activation": "relu",
        }

    def in_format(self, name: str) -> DynamicLayer:
        """The same layer in the memory format of that name."""
        other = copy(self)
        other.input = self.input.contiguous(memory_format=FORMATS[name])
        other.weight = self.weight.contiguous(memory_format=FORMATS[name])
        other.taps = [tap.contiguous(memory_format=FRAME_FORMATS[name]) for tap in self.taps]
        other._bind()
        return other

    def dense(self) -> Tensor:
        """The 3D convolution of everything, then ReLU in place."""
        return F.conv3d(*self._dense).relu_()

    def summed(self) -> Tensor:
        """The same as a sum over temporal taps of 2D convolutions of all frames, then ReLU in place."""
        case = self.case
        return sum_of_2d(
            self.input, self.taps, self.bias, case.stride, case.padding[1], groups=case.groups
        ).relu_()

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of the package's operator."""
        return self._positional, self._named

    def ours(self) -> Tensor:
        """The package's operator, gates and reconstruction included."""
        return ak.dynamic_conv3d(*self._positional, **self._named)

    def masked(self) -> Tensor:
        """The same math as ours after the dense convolution, by torch's operators for each clip's level."""
        case = self.case
        output = F.conv3d(*self._dense)
        clips = []
        for clip, (frame_level, channel_level) in zip(output.split(1), case.levels, strict=True):
            clip = reconstruct_channels(clip, self.channel_weight, channel_level)
            clips.append(reconstruct_frames(clip, self.temporal_weight, frame_level))
        return torch.cat(clips).relu_()

    def reference(self) -> Tensor:
        """The operator's reference."""
        with ak.use_backend("reference"):
            return self.ours()

    def backend(self) -> str | None:
        """The backend that runs the operator."""
        return ak.explain(ak.dynamic_conv3d, *self._positional, **self._named).backend


@dataclass(frozen=True)
class VARed2Case:
    """R(2+1)D-18 for `clips` clips of 16 square frames, of whose dense work it is to do a share `work`.

    `published` is the time that the paper's own implementation took, over that of the dense network.
    """

    clips: int
    work: float = 0.73
    size: int = 128
    published: float = 97.1 / 108.7
    quick: bool = False

    family = "vared2_model"

    @property
    def name(self) -> str:
        return f"vared2_r2plus1d_18-{self.clips}x16frames"


MODELS = [VARed2Case(1), VARed2Case(4)]


def prepare(case: VARed2Case) -> tuple[VARed2R2Plus1d, Tensor, float]:
    """The network of `case` in evaluation mode, random clips, and the share of the dense work that it does.

    Weights are random (seed 0). The gates run, and their last biases make each of them pick one level of
    either kind: level 1 in as many draws, one after the other, as bring `count_flops` to the share.
    """
    torch.manual_seed(0)
    model = ak.models.vared2_r2plus1d_18().eval()
    clips = torch.randn(case.clips, 3, 16, case.size, case.size)
    convs = [name for name, _ in model.dynamic_convs()]
    gates = [model.get_submodule(name.removesuffix(".0")).gate for name in convs]
    order = torch.randperm(2 * len(gates)).tolist()

    def share(lowered: int) -> float:
        """The share with so many of the levels lowered, which the gates pick from then on."""
        for i, gate in enumerate(gates):
            picks = [2 * i + kind in order[:lowered] for kind in (0, 1)]
            nn.init.zeros_(gate.fc2.weight)
            with torch.no_grad():
                gate.fc2.bias.copy_(
                    torch.tensor([[2.0, -2.0], [-2.0, 2.0]])[torch.tensor(picks).long()].flatten()
                )
        with torch.inference_mode():
            # These gates do not look at the clip.
            count = ak.count_flops(model, clips[:1])
        return float(count.actual.mean() / count.dense)

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) > case.work else (low, middle)
    return model, clips, share(high)


class FoldedR2Plus1d(DenseNetwork):
    """The plain R(2+1)D network."""

    def __init__(self, model: VARed2R2Plus1d, form: str) -> None:
        super().__init__(form)
        self.model = model
        self.fold(model.stem[0], model.stem[1])
        self.fold(model.stem[3], model.stem[4])
        for block in self._blocks():
            for part in (block.conv1, block.conv2):
                self.fold(part[0][0], part[0][1])
                self.fold(part[0][3], part[1])
            if block.downsample is not None:
                self.fold(block.downsample[0], block.downsample[1])

    def _blocks(self) -> list[Any]:
        return [block for stage in range(1, 5) for block in getattr(self.model, f"layer{stage}")]

    def __call__(self, clips: Tensor) -> Tensor:  # [B, 3, T, H, W]
        stem, convs = self.model.stem, self.convs
        features = convs[stem[0]](in_form(clips, self.form)).relu_()
        features = convs[stem[3]](features).relu_()
        for block in self._blocks():
            branch = features
            for part in (block.conv1, block.conv2):
                if part is block.conv2:
                    branch = branch.relu_()
                branch = convs[part[0][3]](convs[part[0][0]](branch).relu_())
            shortcut = features if block.downsample is None else convs[block.downsample[0]](features)
            features = branch.add_(shortcut).relu_()
        return self.model.fc(features.mean((2, 3, 4)))

"""Slimmed convolutions and A3D networks, and the dense ones that they are measured against."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from adakernels.models import A3DSlow
from adakernels.models._layers import make_divisible
from adakernels.models.a3d import SlimBottleneck
from adakernels.nn import SlimConv3d
from benchmarks.dense import DENSE_FORMS, FORMATS, DenseConv, DenseNetwork, in_form
from benchmarks.measure import upstream_gradient

WIDTHS = (0.5, 0.63, 0.83)


@dataclass(frozen=True)
class SlimCase:
    """A layer of Slow-R50 or SlowFast at a share `width` of its channels, with ReLU, on one clip.

    `lateral` counts the input's last channels, which come from the Fast pathway and are not slimmed.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    size: int
    frames: int
    width: float
    stride: int = 1
    lateral: int = 0
    quick: bool = False

    family = "slim"

    @property
    def slimmed(self) -> tuple[int, int]:
        """Input and output channels in use."""
        inputs = make_divisible((self.in_channels - self.lateral) * self.width) + self.lateral
        return inputs, make_divisible(self.out_channels * self.width)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        inputs = self.slimmed[0]
        if not self.lateral:
            return ((0, inputs),)
        return ((0, inputs - self.lateral), (self.in_channels - self.lateral, self.in_channels))

    @property
    def name(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        lateral = f"+{self.lateral}" if self.lateral else ""
        stride = f"s{self.stride}" if self.stride > 1 else ""
        channels = f"{self.in_channels - self.lateral}{lateral}to{self.out_channels}"
        return f"{channels}k{kernel}at{self.frames}x{self.size}{stride}-w{self.width:.2f}"

    @property
    def macs(self) -> int:
        """Multiply-adds with the slimmed channels."""
        out_size = (self.size - 1) // self.stride + 1
        return math.prod(self.slimmed) * math.prod(self.kernel) * self.frames * out_size**2


class SlimBackwardCase(SlimCase):
    """The same, forward and backward to input, weight and bias."""

    family = "slim_backward"

    @property
    def name(self) -> str:
        return f"{super().name}-backward"


@dataclass(frozen=True)
class SlimModelCase:
    """Slow-R50 within a budget, against the whole network without one on the same clip of 8 x 256²."""

    size: int
    frames: int
    width: float
    quick: bool = False

    family = "slim_model"

    @property
    def name(self) -> str:
        return f"a3d_slow_resnet50-{self.frames}x{self.size}-w{self.width:.2f}"


# Input and output channels, kernel, height, stride; at 224².
SLOW_LAYERS: tuple[tuple[int, int, tuple[int, int, int], int, int], ...] = (
    (256, 64, (1, 1, 1), 56, 1),
    (64, 64, (1, 3, 3), 56, 1),
    (64, 256, (1, 1, 1), 56, 1),
    (128, 128, (1, 3, 3), 56, 2),
    (512, 128, (1, 1, 1), 28, 1),
    (128, 128, (1, 3, 3), 28, 1),
    (128, 512, (1, 1, 1), 28, 1),
    (1024, 256, (3, 1, 1), 14, 1),
    (256, 256, (1, 3, 3), 14, 1),
    (256, 1024, (1, 1, 1), 14, 1),
    (2048, 512, (3, 1, 1), 7, 1),
    (512, 512, (1, 3, 3), 7, 1),
    (512, 2048, (1, 1, 1), 7, 1),
)
QUICK_LAYERS = (1, 7, 11)


def _layers() -> list[SlimCase]:
    cases = []
    for number, (inputs, outputs, kernel, size, stride) in enumerate(SLOW_LAYERS):
        for width in WIDTHS:
            quick = number in QUICK_LAYERS and width == 0.63
            cases.append(SlimCase(inputs, outputs, kernel, size, 8, width, stride, quick=quick))
    # The sizes of the paper's trade-off lists, divided by what the stages before have reduced.
    for pixels, frames in ((128, 2), (142, 4), (160, 4), (178, 2), (192, 4)):
        for inputs, outputs, kernel, reduced in (
            (64, 64, (1, 3, 3), 4),
            (512, 128, (1, 1, 1), 8),
            (1024, 256, (3, 1, 1), 16),
            (256, 256, (1, 3, 3), 16),
        ):
            cases.append(SlimCase(inputs, outputs, kernel, -(-pixels // reduced), frames, 0.63))
    cases += [
        SlimCase(320, 128, (1, 1, 1), 56, 4, 0.63, lateral=64),
        SlimCase(1280, 512, (3, 1, 1), 14, 3, 0.63, lateral=256),
    ]
    return cases


SLIM = _layers()
BACKWARD = [
    SlimBackwardCase(inputs, outputs, kernel, size, 8, 0.63, stride, quick=number == QUICK_LAYERS[1])
    for number, (inputs, outputs, kernel, size, stride) in enumerate(SLOW_LAYERS)
    if number in (1, 4, 7, 9, 11)
]
SLIM_MODELS = [
    SlimModelCase(256, 8, 1.0),
    SlimModelCase(224, 4, 0.8),
    SlimModelCase(224, 4, 0.5),
    SlimModelCase(128, 2, 0.5),
]

Runner = Callable[[], Tensor]


class SlimLayer:
    """A layer in its three forms: allocated at the width, sliced in every call as done today, and ours."""

    def __init__(self, case: SlimCase) -> None:
        self.case = case
        random = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        inputs, self.count = case.slimmed
        self.stride = (1, case.stride, case.stride)
        self.conv = SlimConv3d(
            case.in_channels,
            case.out_channels,
            case.kernel,
            self.stride,
            tuple(size // 2 for size in case.kernel),
            activation="relu",
        ).eval()
        scale = (2 / inputs / math.prod(case.kernel)) ** 0.5
        assert self.conv.bias is not None
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=random) * scale)
            self.conv.bias.copy_(torch.randn(case.out_channels, generator=random) * 0.1)
        self.bias = self.conv.bias[: self.count]
        shape = (1, inputs, case.frames, case.size, case.size)
        self.input = torch.randn(shape, generator=random)

    def _weight(self, weight: Tensor) -> Tensor:  # [out_channels, C, kt, kh, kw]
        parts = [weight[: self.count, start:stop] for start, stop in self.case.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def dense(self) -> dict[str, Runner]:
        """A layer that has the slimmed channels only."""

        def run(conv: DenseConv, input: Tensor) -> Tensor:
            return conv(input).relu_()

        weight, bias = self._weight(self.conv.weight).detach(), self.bias.detach()
        return {
            form: partial(run, DenseConv(form, weight, bias, self.stride), in_form(self.input, form))
            for form in DENSE_FORMS
        }

    def sliced(self) -> dict[str, Runner]:
        """The same math as ours by slices of the whole weight, made in every call."""
        padding = [size // 2 for size in self.case.kernel]

        def run(input: Tensor, weight: Tensor) -> Tensor:
            return F.conv3d(input, self._weight(weight), self.bias, self.stride, padding).relu_()

        weight = self.conv.weight.detach()
        return {
            form: partial(run, in_form(self.input, form), weight.contiguous(memory_format=order))
            for form, order in FORMATS.items()
        }

    def ours(self) -> dict[str, Runner]:
        """The package's module."""
        arguments = {"out_channels": self.count, "segments": self.case.segments}
        return {form: partial(self.conv, in_form(self.input, form), **arguments) for form in FORMATS}

    def gradients(self) -> dict[str, dict[str, Callable[[], tuple[Tensor, ...]]]]:
        """Of all forms, forward and backward: the gradients of input, weight and bias.

        Those of the dense layer are of its own weight and bias, the others of the whole ones.
        """
        case = self.case
        upstream = upstream_gradient(self.reference(), zlib.crc32(f"{case.family}/{case.name}".encode()))
        upstreams = {form: in_form(upstream, form) for form in DENSE_FORMS}
        inputs = {form: in_form(self.input, form).detach().requires_grad_() for form in DENSE_FORMS}
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        padding = [size // 2 for size in case.kernel]
        arguments = {"out_channels": self.count, "segments": case.segments}

        def dense(conv: DenseConv, form: str) -> tuple[Tensor, ...]:
            output = conv(inputs[form]).relu_()
            return torch.autograd.grad(output, (inputs[form], conv.weight, conv.bias), upstreams[form])

        def sliced(form: str) -> tuple[Tensor, ...]:
            some, few = self._weight(weight), bias[: self.count]
            output = F.conv3d(inputs[form], some, few, self.stride, padding).relu_()
            return torch.autograd.grad(output, (inputs[form], weight, bias), upstreams[form])

        def ours(form: str) -> tuple[Tensor, ...]:
            output = self.conv(inputs[form], **arguments)
            return torch.autograd.grad(output, (inputs[form], weight, bias), upstreams[form])

        def allocated(form: str) -> DenseConv:
            conv = DenseConv(form, self._weight(weight).detach(), self.bias.detach().clone(), self.stride)
            conv.weight, conv.bias = conv.weight.clone().requires_grad_(), conv.bias.requires_grad_()
            return conv

        return {
            "dense": {form: partial(dense, allocated(form), form) for form in DENSE_FORMS},
            "masked": {form: partial(sliced, form) for form in FORMATS},
            "ours": {form: partial(ours, form) for form in FORMATS},
        }

    def reference(self) -> Tensor:
        """The operator's reference."""
        with ak.use_backend("reference"):
            return self.ours()["contiguous"]()

    def backend(self) -> str | None:
        """The backend that runs the operator."""
        arguments = {"out_channels": self.count, "segments": self.case.segments, "stride": self.stride}
        padding = self.conv.padding
        return ak.explain(ak.slim_conv3d, self.input, self.conv.weight, padding=padding, **arguments).backend


class DenseSlow(DenseNetwork):
    """The whole Slow-R50."""

    def __init__(self, model: A3DSlow, form: str) -> None:
        super().__init__(form)
        self.model = model
        self._add(model.slow.stem)
        self.blocks: list[SlimBottleneck] = []
        for stage in model.slow.stages():
            for block in stage:
                assert isinstance(block, SlimBottleneck)
                for conv in (block.conv1, block.conv2, block.conv3, block.downsample):
                    if conv is not None:
                        self._add(conv)
                self.blocks.append(block)

    def _add(self, conv: SlimConv3d) -> None:
        assert isinstance(conv.norm, nn.BatchNorm3d)
        self.fold(conv, conv.norm)

    def __call__(self, clips: Tensor) -> Tensor:  # [B, 3, T, H, W]
        convs = self.convs
        features = self.pool(convs[self.model.slow.stem](in_form(clips, self.form)).relu_())
        for block in self.blocks:
            branch = convs[block.conv2](convs[block.conv1](features).relu_()).relu_()
            branch = convs[block.conv3](branch)
            shortcut = features if block.downsample is None else convs[block.downsample](features)
            features = branch.add_(shortcut).relu_()
        return F.linear(features.mean((2, 3, 4)), self.model.fc.weight, self.model.fc.bias)


def render_slim(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the page's tables: each layer and each budget, with the times of the forms."""
    rows: list[tuple[str, ...]] = []
    for record in records:
        if record["family"] not in ("slim", "slim_backward", "slim_model"):
            continue
        ms = {group: record["times"][name]["p50"] * 1e3 for group, name in record["best"].items()}
        rows.append(
            (
                record["case"],
                f"{record['macs'] / 1e9:.3f}",
                f"{ms['dense']:.3f}",
                f"{ms['masked']:.3f}" if "masked" in ms else "",
                f"{ms['ours']:.3f}",
                f"{record['time_ratio']:.2f}x",
            )
        )
    return rows


SLIM_HEADER = ("case", "GF", "dense, ms", "sliced in every call, ms", "ours, ms", "ours ÷ dense")

"""Layers that are called like the class of torch they extend: as it computes, by the fastest kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adakernels as ak
from adakernels import DynamicConv3d, GatedConv2d, SlicedConv3d, _extension
from adakernels.nn import PackedClips

LAYERS = {GatedConv2d: 2, SlicedConv3d: 3, DynamicConv3d: 3}
SHAPES: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
    "3x3": (24, 40, 3, {"padding": 1}),
    "3x3, stride 2": (24, 40, 3, {"padding": 1, "stride": 2}),
    "1x1": (40, 24, 1, {}),
    "1x1, stride 2": (40, 24, 1, {"stride": 2, "bias": False}),
    "7x7": (3, 32, 7, {"padding": 3, "stride": 2}),
    "dilated": (8, 12, 3, {"padding": "same", "dilation": 2}),
    "unevenly padded": (8, 12, 2, {"padding": "same"}),
    "depthwise": (24, 24, 3, {"padding": 1, "groups": 24}),
    "two groups": (24, 40, 3, {"padding": 1, "groups": 2}),
    "reflected": (8, 12, 3, {"padding": 1, "padding_mode": "circular"}),
}
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(
        memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    ),
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
}


class Operators(TorchDispatchMode):
    """Keeps the names of the operators called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def norm_of(rank: int, channels: int) -> nn.Module:
    norm = (nn.BatchNorm2d if rank == 2 else nn.BatchNorm3d)(channels)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    return norm


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("inference", [True, False], ids=["inference mode", "no_grad"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_equals_the_class_of_torch(layer: Any, shape: str, format: str, inference: bool) -> None:
    rank = LAYERS[layer]
    channels, out_channels, kernel, arguments = SHAPES[shape]
    conv = layer(
        channels, out_channels, kernel, **arguments, norm=norm_of(rank, out_channels), activation="relu6"
    ).eval()
    plain = (nn.Conv2d if rank == 2 else nn.Conv3d)(channels, out_channels, kernel, **arguments)
    plain.load_state_dict({name: conv.state_dict()[name] for name in plain.state_dict()})
    input = FORMATS[format](torch.randn(2, channels, *(4, 15, 17)[3 - rank :]))
    expected = F.relu6(conv.norm(plain(input)))
    with torch.inference_mode() if inference else torch.no_grad():
        assert_near(conv(input), expected)
    assert_near(conv(input), expected)  # with a gradient, by torch


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_takes_what_the_class_of_torch_takes(layer: Any) -> None:
    rank = LAYERS[layer]
    conv = layer(6, 8, 3, padding=1).eval()
    plain = (nn.Conv2d if rank == 2 else nn.Conv3d)(6, 8, 3, padding=1)
    plain.load_state_dict({name: conv.state_dict()[name] for name in plain.state_dict()})
    with torch.no_grad():
        one = torch.randn(6, *(3, 5, 7)[3 - rank :])
        assert_near(conv(one), plain(one))
        none = torch.randn(0, *one.shape)
        assert conv(none).shape == plain(none).shape
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(one[None]).dtype == torch.bfloat16
        assert_near(conv.double()(one[None].double()), plain.double()(one[None].double()))


def test_planar_tensors_take_the_kernels_of_this_package() -> None:
    conv, input = GatedConv2d(64, 64, 3, padding=1), torch.randn(2, 64, 16, 16)
    contexts = {"auto": _extension.has_cpu, "reference": False}
    for backend, ours in contexts.items():
        with ak.use_backend(backend), torch.no_grad(), Operators() as operators:
            conv(input)
        assert ("adakernels.gated_conv2d.default" in operators.names) == ours
    with Operators() as operators:
        conv(input)
    assert not any(name.startswith("adakernels") for name in operators.names)


@pytest.mark.parametrize("kernel", [(1, 3, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_frames_of_packed_clips(kernel: tuple[int, int, int], channels_last: bool) -> None:
    padding = tuple(k // 2 for k in kernel)
    conv = SlicedConv3d(
        32, 48, kernel, padding=padding, stride=(1, 2, 2), norm=nn.BatchNorm3d, activation="silu"
    )
    conv.eval()
    frames = torch.randn(5, 32, 17, 15)
    if channels_last:
        frames = frames.to(memory_format=torch.channels_last)
    clips = PackedClips(frames, torch.tensor([0, 2, 5], dtype=torch.int32))
    expected = conv(clips)
    with torch.no_grad():
        output = conv(clips)
    assert_near(output.frames, expected.frames.detach())
    assert output.frames.is_contiguous(memory_format=torch.channels_last) or not channels_last
    assert torch.equal(output.offsets, clips.offsets)

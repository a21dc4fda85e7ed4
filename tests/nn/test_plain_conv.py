"""Layers that are called like the class of torch they extend: as it computes, by the fastest kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.profiler import profile
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import adakernels as ak
from adakernels import DynamicConv3d, GatedConv2d, SlicedConv3d, _extension
from adakernels.nn import PackedClips, SlimConv2d, SlimConv3d

LAYERS = {GatedConv2d: 2, SlicedConv3d: 3, DynamicConv3d: 3}
SHAPES: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
    "3x3": (24, 40, 3, {"padding": 1}),
    "3x3, stride 2": (24, 40, 3, {"padding": 1, "stride": 2}),
    "1x1": (40, 24, 1, {}),
    "1x1, stride 2": (80, 48, 1, {"stride": 2, "bias": False}),
    "7x7": (3, 32, 7, {"padding": 3, "stride": 2}),
    "dilated": (8, 12, 3, {"padding": "same", "dilation": 2}),
    "depthwise": (80, 80, 3, {"padding": 1, "groups": 80}),
    # What is left to torch.
    "unevenly padded": (8, 12, 2, {"padding": "same"}),
    "two groups": (24, 40, 3, {"padding": 1, "groups": 2}),
    "circular": (8, 12, 3, {"padding": 1, "padding_mode": "circular"}),
}
LEFT = {"unevenly padded", "two groups", "circular"}
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(
        memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    ),
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
}


def kernels(function: Callable[[], Any]) -> set[str]:
    """The convolutions that a call comes down to, by the names of their operators."""
    with profile() as recorded:
        function()
    names = {
        "adakernels::gated_conv2d",
        "adakernels::winograd_conv2d",
        "adakernels::sliced_conv3d",
        "mkldnn::_convolution_pointwise",
    }
    return names & {event.name for event in recorded.function_events}


def expected_kernels(rank: int, shape: str, format: str) -> set[str]:
    """What the fastest kernel is, where the extension and oneDNN are there."""
    if shape in LEFT or format == "every other row" or not _extension.has_cpu:
        return set()
    winograd = rank == 2 and shape in ("3x3", "3x3, stride 2")
    if format == "contiguous":
        two = "adakernels::winograd_conv2d" if winograd else "adakernels::gated_conv2d"
        return {two if rank == 2 else "adakernels::sliced_conv3d"}
    winograd = winograd and "stride" not in shape
    return {"adakernels::winograd_conv2d" if winograd else "mkldnn::_convolution_pointwise"}


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
    input = FORMATS[format](torch.randn(2, channels, *(4, 31, 33)[3 - rank :]))
    expected = F.relu6(conv.norm(plain(input)))
    with torch.inference_mode() if inference else torch.no_grad():
        assert_near(conv(input), expected)
        assert kernels(lambda: conv(input)) == expected_kernels(rank, shape, format)
        with ak.use_backend("reference"):
            assert_near(conv(input), expected)
            assert kernels(lambda: conv(input)) == set()
    # With a gradient, by torch.
    assert_near(conv(input), expected)
    assert kernels(lambda: conv(input)) == set()
    # Weights with the channels innermost, as in networks that are brought to that format.
    order = torch.channels_last if rank == 2 else torch.channels_last_3d
    conv.weight.data = conv.weight.data.contiguous(memory_format=order)
    with torch.inference_mode() if inference else torch.no_grad():
        assert_near(conv(input), expected)


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


def test_without_onednn() -> None:
    conv, input = GatedConv2d(40, 64, 1), torch.randn(2, 40, 31, 33).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert_near(conv(input), F.conv2d(input, conv.weight, conv.bias))
        assert kernels(lambda: conv(input)) == set()


@pytest.mark.parametrize("format", ["contiguous", "channels last"])
@pytest.mark.parametrize("layer", [*LAYERS, SlimConv2d, SlimConv3d], ids=lambda layer: layer.__name__)
def test_whoever_observes_calls_sees_the_convolution(layer: Any, format: str) -> None:
    rank = LAYERS.get(layer, int(layer.__name__[-2]))
    conv = layer(40, 64, 1, activation="relu").eval()
    input = FORMATS[format](torch.randn(2, 40, *(4, 31, 33)[3 - rank :]))
    convolve = F.conv2d if rank == 2 else F.conv3d
    with torch.no_grad():
        expected = convolve(input, conv.weight, conv.bias).relu()
        ak.slim_conv2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))  # hands the formulas over
        with FlopCounterMode(display=False) as counter:
            assert_near(conv(input), expected)
        assert counter.get_total_flops() == 2 * 40 * 64 * input.shape[0] * input[0, 0].numel()
        if layer in LAYERS:
            stacked = torch.stack([input, 2 * input])
            assert_near(torch.func.vmap(conv)(stacked)[0], expected)
            graph = make_fx(conv, tracing_mode="symbolic", _allow_non_fake_inputs=True)(input)
            assert_near(graph(input[:1]), expected[:1])
            assert_near(torch.jit.trace(conv, input)(input[:1]), expected[:1])
            with forward_ad.dual_level():
                output = conv(forward_ad.make_dual(input, torch.ones_like(input)))
                assert forward_ad.unpack_dual(output).tangent is not None


@pytest.mark.parametrize("layer", [SlicedConv3d, DynamicConv3d], ids=lambda layer: layer.__name__)
def test_results_can_be_written_to(layer: Any) -> None:
    conv = layer(8, 8, (1, 3, 3), padding=(0, 1, 1))
    input = FORMATS["channels last"](torch.randn(1, 8, 2, 20, 20))
    with torch.no_grad():
        output = conv(input)
        assert kernels(lambda: conv(input)) != set()
    scale = torch.ones(1, requires_grad=True)
    output *= scale
    output.sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("kernel", [(1, 3, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_frames_of_packed_clips(kernel: tuple[int, int, int], channels_last: bool) -> None:
    padding = tuple(k // 2 for k in kernel)
    conv = SlicedConv3d(
        32, 48, kernel, padding=padding, stride=(1, 2, 2), norm=nn.BatchNorm3d, activation="silu"
    )
    conv.eval()
    frames = torch.randn(5, 32, 35, 31)
    if channels_last:
        frames = frames.to(memory_format=torch.channels_last)
    clips = PackedClips(frames, torch.tensor([0, 2, 5], dtype=torch.int32))
    ours = "mkldnn::_convolution_pointwise"
    if not channels_last:
        ours = "adakernels::winograd_conv2d" if kernel[1] == 3 else "adakernels::gated_conv2d"
    expected = conv(clips)
    with torch.no_grad():
        output = conv(clips)
        assert kernels(lambda: conv(clips)) == ({ours} if _extension.has_cpu else set())
    assert_near(output.frames, expected.frames.detach())
    assert output.frames.is_contiguous(memory_format=torch.channels_last) or not channels_last
    assert torch.equal(output.offsets, clips.offsets)

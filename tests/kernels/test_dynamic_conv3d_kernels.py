"""dynamic_conv3d on the GPU kernels, against the reference."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakernels.ops import dynamic_conv3d_reference
from adakernels.ops._conv_arguments import ACTIVATIONS
from adakernels.ops._layout import dense


@dataclass(frozen=True)
class Case:
    """The gates of every clip: weights of the temporal levels, and of the channel levels."""

    temporal: tuple[tuple[float, ...], ...] | None
    channel: tuple[tuple[float, ...], ...] | None
    frames: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int, int] = (1, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    filters: int = 3
    activation: str | None = None

    @property
    def convolution(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def clips(self) -> int:
        return len(self.temporal or self.channel or ())


CASES = {
    # One level each, several at once, none; clips whose last group is short, C no multiple of 4.
    "mixed levels": Case(
        ((0, 0.5, 0), (0.9, 0, 0.4), (0, 0, 0)),
        ((0, 0.6, 0), (0.3, 0, 0.4), (0, 1, 0)),
        5,
        3,
        7,
        (2, 3),
        activation="relu",
    ),
    "no channel computed": Case(((1, 0.5),), ((0, 0),), 2, 3, 4, (3, 2)),
    "frames only, taps in time": Case(
        ((0, 1), (0.4, 0.3)), None, 5, 4, 5, (2, 3), (3, 1, 1), (2, 1, 1), (1, 0, 0), activation="silu"
    ),
    "channels only, two blocks": Case(None, ((0, 0.5, 0.5),), 1, 3, 66, (1, 2), (1, 1, 1), padding=(0, 0, 0)),
    "dilated in time, filters of one tap": Case(
        ((0, 1, 0), (0, 0, 1)),
        ((0, 1), (1, 0)),
        7,
        3,
        6,
        (2, 3),
        (3, 1, 2),
        (1, 1, 2),
        (2, 0, 1),
        (2, 1, 1),
        filters=1,
    ),
    "depthwise": Case(
        ((0, 0.5), (1, 0)), ((0, 1), (1, 0)), 3, 5, 5, (3, 3), (3, 1, 3), padding=(1, 0, 1), groups=5
    ),
    "one level": Case(((0.5,), (0,)), ((0.8,), (1,)), 2, 3, 4, (2, 3), (1, 1, 1), padding=(0, 0, 0)),
    "no clip": Case((), (), 2, 3, 4, (3, 3)),
}
# For which a Triton interpreter takes too long.
LARGER = {
    "long sums of few tiles": Case(
        ((0, 1), (1, 0), (0, 0)),
        ((0, 0.5), (0.7, 0), (1, 0)),
        3,
        48,
        24,
        (4, 4),
        (3, 3, 3),
        padding=(1, 1, 1),
    ),
    "mixed levels": CASES["mixed levels"],
    "several patches, part of a vector": Case(
        ((0.5, 0.3, 0.2), (0, 0, 1)),
        ((0, 0.5, 0.4), (0.3, 0.7, 0)),
        5,
        8,
        40,
        (9, 17),
        (1, 1, 1),
        padding=(0, 0, 0),
    ),
    "depthwise, 3x3x3": Case(
        ((0, 0.5), (1, 0)),
        ((0, 1), (1, 0)),
        4,
        6,
        6,
        (5, 6),
        (3, 3, 3),
        padding=(1, 1, 1),
        groups=6,
        activation="relu6",
    ),
    "depthwise, strides": Case(
        ((0.3, 0.5), (0, 0)), ((0, 1), (1, 0)), 5, 4, 4, (5, 6), (3, 3, 3), (2, 2, 2), (1, 1, 1), groups=4
    ),
}
FORMS = [
    (torch.float32, torch.contiguous_format),
    (torch.float16, torch.channels_last_3d),
    (torch.bfloat16, torch.channels_last_3d),
]


def make(case: Case, dtype: torch.dtype, format: torch.memory_format, device: str) -> list[Tensor | None]:
    """Input, weight, bias, both gates, and the filters of frames and of channels."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def gate(weights: Any, levels: int) -> Tensor | None:
        return (
            None
            if weights is None
            else torch.tensor(weights, dtype=torch.float32, device=device).reshape(-1, levels)
        )

    levels = [len(weights[0]) if weights else 2 for weights in (case.temporal, case.channel)]
    filters = case.out_channels, case.filters, case.filters
    tensors = [
        randn(case.clips, case.channels, case.frames, *case.size).contiguous(memory_format=format),
        randn(case.out_channels, case.channels // case.groups, *case.kernel),
        randn(case.out_channels),
        gate(case.temporal, levels[0]),
        gate(case.channel, levels[1]),
        randn(2 ** (levels[0] - 1) - 1, *filters) / case.filters
        if levels[0] > 1 and case.temporal is not None
        else None,
        randn(*filters) / case.filters if levels[1] > 1 and case.channel is not None else None,
    ]
    return [
        tensor if i in (3, 4) or tensor is None else tensor.to(device, dtype)
        for i, tensor in enumerate(tensors)
    ]


def expected(case: Case, *tensors: Tensor | None) -> Tensor:
    *first, temporal_weight, channel_weight = tensors
    stride, padding, dilation, groups = case.convolution
    return dynamic_conv3d_reference(
        *first,
        temporal_weight=temporal_weight,
        channel_weight=channel_weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation=case.activation,
    )


@pytest.mark.parametrize(("dtype", "format"), FORMS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(
    kernels: Any, case: Case, dtype: torch.dtype, format: torch.memory_format
) -> None:
    tensors = make(case, dtype, format, kernels.device)
    output = kernels.dynamic_conv3d(*tensors, *case.convolution, ACTIVATIONS.index(case.activation))
    want = expected(case, *(None if tensor is None else tensor.double() for tensor in tensors))
    assert output.dtype == dtype
    if want.numel() > 0:
        assert output.stride() == want.contiguous(memory_format=format).stride()
    # Sums of up to 1296 products; computed and made features are rounded to the dtype before the next step.
    tolerance = (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    largest = want.abs().max().item() if want.numel() > 0 else 0
    torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=max(1e-5, tolerance * largest))


@pytest.mark.parametrize(("dtype", "format"), FORMS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(
    kernels: Any, case: Case, dtype: torch.dtype, format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("convolve", "reconstruction") if kernels.name == "triton" else ():
        # The sums of a few programs, or of one, as there would be with more frames.
        monkeypatch.setattr(
            sys.modules[f"adakernels.triton.{module}"], "PROGRAMS", 1 if dtype == torch.float16 else 128
        )
    # The kernels begin behind the activation.
    case = replace(case, activation=None)
    tensors = make(case, dtype, format, kernels.device)
    leaves = [None if tensor is None else tensor.double().requires_grad_() for tensor in tensors]
    output = expected(case, *leaves)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(kernels.device, dtype)
    wanted = [tensor is not None for tensor in tensors]
    found = kernels.dynamic_conv3d_backward(
        dense(grad, like=tensors[0]), *tensors, *case.convolution, *wanted
    )
    given = [leaf for leaf in leaves if leaf is not None]
    exact_grads = iter(torch.autograd.grad(output, given, grad.double()))
    for tensor, mine in zip(tensors, found, strict=True):
        if tensor is None:
            assert mine.numel() == 0
            continue
        exact = next(exact_grads)
        assert mine.dtype == tensor.dtype and (mine.numel() == 0 or mine.stride() == tensor.stride())
        tolerance = (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
        largest = exact.abs().max().item() if exact.numel() > 0 else 0
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance * largest)
        assert (mine[exact == 0] == 0).all()


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("arch", ["the GPU's"] if torch.cuda.is_available() else ["80", "90a"])
@pytest.mark.parametrize("case", LARGER.values(), ids=LARGER)
def test_larger_ones_and_products_of_warpgroups(
    kernels: Any, case: Case, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAKERNELS_EMULATED_ARCH", arch)
    for multiprocessors in ("1", "64"):
        monkeypatch.setenv("ADAKERNELS_EMULATED_MULTIPROCESSORS", multiprocessors)
        for form in FORMS:
            test_matches_the_reference(kernels, case, *form)
            test_gradients(kernels, case, *form, monkeypatch)


def test_what_is_not_computed_is_not_read(kernels: Any) -> None:
    case = CASES["frames only, taps in time"]
    input, *rest = make(case, torch.float32, torch.contiguous_format, kernels.device)
    arguments = *case.convolution, ACTIVATIONS.index(case.activation)
    want = kernels.dynamic_conv3d(input, *rest, *arguments)
    # The first clip computes frame 0 of its three alone, and that reads frames 0 and 1.
    input[0, :, 4] = float("nan")
    output = kernels.dynamic_conv3d(input, *rest, *arguments)
    assert torch.equal(output[0, :, :2], want[0, :, :2]) and torch.equal(output[1], want[1])
    assert output[0, :, 2].isnan().all()

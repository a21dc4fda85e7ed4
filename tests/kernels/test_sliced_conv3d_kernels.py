"""sliced_conv3d on the GPU kernels, against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakernels.ops import sliced_conv3d_reference
from adakernels.ops._conv_arguments import ACTIVATIONS
from adakernels.ops._layout import dense


@dataclass(frozen=True)
class Case:
    """Frames of a clip, or of each of the packed clips."""

    frames: tuple[int, ...]
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int, int] = (3, 1, 1)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (1, 0, 0)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    temporal: tuple[bool, ...] | None = (True, False, True)
    packed: bool = False
    activation: str | None = None

    @property
    def convolution(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


CASES = {
    "odd sizes": Case((4,) * 3, 5, 7, (5, 3), activation="relu"),
    "3x3x3, two blocks of outputs, stride 2": Case(
        (3,) * 2, 6, 66, (3, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), temporal=(False, True), activation="silu"
    ),
    "uneven": Case(
        (7,) * 2, 3, 5, (5, 4), (4, 3, 2), (3, 1, 2), (2, 0, 1), (2, 2, 1), temporal=(False, True)
    ),
    "one frame, all whole": Case((1,) * 2, 4, 4, (3, 3), (5, 1, 1), padding=(2, 0, 0), temporal=None),
    "one tap": Case((3,) * 2, 20, 9, (5, 4), (1, 3, 3), (2, 1, 1), (0, 1, 1), temporal=(False, True)),
    "no clip": Case((), 4, 4, (3, 3), temporal=()),
    "packed": Case((3, 1, 6), 5, 6, (3, 4), packed=True, activation="relu6"),
    "packed, dilated": Case(
        (4, 1, 3), 3, 4, (3, 4), (3, 3, 1), (1, 2, 2), (2, 1, 0), (2, 1, 1), packed=True, temporal=None
    ),
    "packed, a clip without frames": Case((2, 0, 5), 3, 4, (3, 3), packed=True),
    "depthwise, stride 2 in time": Case(
        (3,) * 2, 3, 6, (2, 3), (3, 2, 1), (2, 1, 1), (1, 1, 0), groups=3, temporal=(False, True)
    ),
    "packed, depthwise": Case(
        (3, 1), 5, 5, (4, 3), (3, 1, 3), (1, 2, 1), (1, 0, 1), groups=5, packed=True, temporal=(True, False)
    ),
}
FORMS = [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)]


def make(case: Case, dtype: torch.dtype, channels_last: bool, device: str) -> tuple[Tensor | None, ...]:
    """Input, weight, bias, flags and offsets."""
    generator = torch.Generator().manual_seed(0)
    clips, (height, width) = len(case.frames), case.size
    shape: tuple[int, ...] = (clips, case.channels, case.frames[0] if clips else 2, height, width)
    if case.packed:
        shape = (sum(case.frames), case.channels, height, width)
    format = torch.contiguous_format
    if channels_last:
        format = torch.channels_last if case.packed else torch.channels_last_3d
    weight = torch.randn(case.out_channels, case.channels // case.groups, *case.kernel, generator=generator)
    offsets = torch.tensor([sum(case.frames[:i]) for i in range(clips + 1)], dtype=torch.int32, device=device)
    return (
        torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=format),
        (weight / weight[0].numel() ** 0.5).to(device, dtype),
        torch.randn(case.out_channels, generator=generator).to(device, dtype),
        None if case.temporal is None else torch.tensor(case.temporal, dtype=torch.bool, device=device),
        offsets if case.packed else None,
    )


def expected(case: Case, input: Tensor, weight: Tensor, bias: Tensor, temporal: Any, offsets: Any) -> Tensor:
    stride, padding, dilation, groups = case.convolution
    return sliced_conv3d_reference(
        input,
        weight,
        bias,
        temporal,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        frame_offsets=offsets,
        activation=case.activation,
    )


def run(kernels: Any, case: Case, *tensors: Tensor | None) -> Tensor:
    return kernels.sliced_conv3d(*tensors, *case.convolution, ACTIVATIONS.index(case.activation))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dtype", "channels_last"), FORMS, ids=str)
def test_matches_the_reference_with_its_gradients(
    kernels: Any, case: Case, dtype: torch.dtype, channels_last: bool
) -> None:
    input, weight, bias, *domain = make(case, dtype, channels_last, kernels.device)
    output = run(kernels, case, input, weight, bias, *domain)
    leaves = [leaf.double().requires_grad_() for leaf in (input, weight, bias)]
    want = expected(case, *leaves, *domain)
    assert output.dtype == dtype
    # Sums of up to 200 products in float32 and one rounding to the dtype; values are below 8.
    torch.testing.assert_close(output.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
    # The kernels begin behind the activation.
    linear = expected(replace(case, activation=None), *leaves, *domain)
    grad = torch.randn(linear.shape, generator=torch.Generator().manual_seed(1)).to(kernels.device, dtype)
    grad = dense(grad, like=input)
    grads = kernels.sliced_conv3d_backward(grad, input, weight, *domain, *case.convolution, True, True, True)
    for leaf, mine, exact in zip(
        (input, weight, bias), grads, torch.autograd.grad(linear, leaves, grad.double()), strict=True
    ):
        assert mine.dtype == dtype and (mine.numel() == 0 or mine.stride() == leaf.stride())
        tolerance = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
        largest = exact.abs().max().item() if exact.numel() > 0 else 0
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance * largest)
        assert (mine[exact == 0] == 0).all()


@pytest.mark.parametrize("groups", [1, 4])
def test_frames_that_a_clip_does_not_visit_are_not_read(kernels: Any, groups: int) -> None:
    case = Case((3, 2), 4, 4, (2, 3), groups=groups, temporal=(False, True), packed=True)
    input, *rest = make(case, torch.float32, True, kernels.device)
    want = run(kernels, case, input, *rest)
    # The first clip has no use for other frames, and the second has none for the first clip.
    input[1] = float("nan")
    output = run(kernels, case, input, *rest)
    assert output[1].isnan().all()
    others = [0, 2, 3, 4]
    assert torch.equal(output[others], want[others])


def test_offsets_that_are_none_stay_within_the_input(kernels: Any) -> None:
    case = Case((3, 2), 4, 4, (2, 3), packed=True, temporal=(False, True))
    *tensors, offsets = make(case, torch.float32, True, kernels.device)
    for wrong in ([0, 50, 7], [0, -3, 5], [9, 2, -1]):
        offsets.copy_(torch.tensor(wrong, dtype=torch.int32))
        assert run(kernels, case, *tensors, offsets).isfinite().all()

"""slim_conv on the GPU kernels, against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from adakernels.ops import slim_conv_reference
from adakernels.ops._conv_arguments import ACTIVATIONS
from adakernels.ops._layout import dense

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """Shapes of input and weight, what is used of the weight, and the convolution."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    out_channels: int
    segments: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    activation: str | None = None


CASES = {
    "1x1, two blocks of both": Case((2, 72, 3, 3), (80, 96, 1, 1), 72, ((0, 72),), (1, 1), (0, 0), (1, 1)),
    "3x3, two segments, stride 2": Case(
        (2, 24, 5, 3), (20, 40, 3, 3), 12, ((0, 8), (24, 40)), (2, 2), (1, 1), (1, 1), activation="relu"
    ),
    "two segments that start late": Case(
        (1, 7, 4, 3), (5, 16, 1, 2), 5, ((3, 6), (11, 15)), (1, 2), (0, 1), (1, 1)
    ),
    "three segments": Case(
        (1, 6, 3, 3), (4, 16, 1, 1), 3, ((0, 1), (4, 7), (14, 16)), (1, 1), (0, 0), (1, 1)
    ),
    "3x1x1, two segments": Case(
        (2, 5, 3, 2, 3),
        (6, 9, 3, 1, 1),
        4,
        ((0, 2), (6, 9)),
        (1, 1, 1),
        (1, 0, 0),
        (1, 1, 1),
        activation="silu",
    ),
    "depthwise": Case((2, 5, 4, 3), (16, 1, 3, 3), 10, ((0, 1),), (2, 1), (1, 1), (1, 1), groups=8),
    "no frames": Case((0, 4, 3, 3), (6, 8, 3, 3), 3, ((0, 4),), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_matches_the_reference_with_its_gradients(kernels: Any, case: Case, last: bool) -> None:
    generator, dtype = torch.Generator().manual_seed(0), torch.float16 if last else torch.float32
    format = FORMATS[len(case.input)] if last else torch.contiguous_format
    input, weight = (
        torch.randn(shape, generator=generator).to(kernels.device, dtype).contiguous(memory_format=format)
        for shape in (case.input, case.weight)
    )
    bias = torch.randn(case.weight[0], generator=generator).to(kernels.device, dtype)
    flat = [bound for segment in case.segments for bound in segment]
    raw = case.out_channels, flat, case.stride, case.padding, case.dilation, case.groups
    output = kernels.slim_conv(input, weight, bias, *raw, ACTIVATIONS.index(case.activation))

    def reference(*tensors: torch.Tensor, activation: str | None) -> torch.Tensor:
        return slim_conv_reference(
            *tensors,
            out_channels=case.out_channels,
            segments=case.segments,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
            activation=activation,
        )

    leaves = [leaf.double().requires_grad_() for leaf in (input, weight, bias)]
    want = reference(*leaves, activation=case.activation)
    assert output.dtype == dtype
    # Sums of up to 216 products in float32 and one rounding to the dtype.
    largest = want.abs().max().item() if want.numel() > 0 else 0
    torch.testing.assert_close(output.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6 * largest)
    # The kernels begin behind the activation.
    linear = reference(*leaves, activation=None)
    grad = torch.randn(linear.shape, generator=generator).to(kernels.device, dtype)
    grads = kernels.slim_conv_backward(dense(grad, like=input), input, weight, *raw, True, True, True)
    assert input.numel() == 0 or grads[0].stride() == input.stride()
    assert grads[1].is_contiguous()
    for mine, exact in zip(grads, torch.autograd.grad(linear, leaves, grad.double()), strict=True):
        assert mine.dtype == dtype
        tolerance = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
        largest = exact.abs().max().item() if exact.numel() > 0 else 0
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance * largest)
        assert (mine[exact == 0] == 0).all()

"""Convolutions with kernels that were transformed beforehand, against the plain operators' references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adakernels.ops import gated_conv2d_reference
from adakernels.ops._winograd import (
    Transform,
    winograd_conv2d,
    winograd_conv2d_add_,
    winograd_kernels,
    winograd_transform,
)
from adakernels.ops.conv2d_add import conv2d_add_reference

# N, C_in, C_out, size, stride, padding, block
CASES = {
    "2x2": (4, 9, 21, (14, 15), 1, (1, 1), 2),
    "2x2, one vector": (8, 33, 40, (7, 7), 1, (1, 1), 2),
    "2x2, less than a vector": (2, 5, 3, (3, 4), 1, (0, 1), 2),
    "4x4": (4, 17, 13, (28, 29), 1, (1, 0), 4),
    "4x4, one vector": (4, 18, 20, (14, 14), 1, (1, 1), 4),
    "4x4, a wide margin": (2, 3, 8, (9, 22), 1, (4, 3), 4),
    "stride 2": (4, 9, 21, (28, 27), 2, (1, 1), 2),
    "stride 2, small": (4, 9, 21, (9, 8), 2, (0, 2), 2),
}
RELU = 1


def make(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input with zeros where it is skipped, weight, bias, policy and in_policy."""
    torch.manual_seed(0)
    N, C_in, C_out, size, *_ = CASES[case]
    policy, in_policy = torch.randint(0, 3, (N, C_out)), torch.randint(0, 3, (N, C_in))
    input = torch.randn(N, C_in, *size) * (in_policy != 2)[..., None, None]
    weight = torch.randn(C_out, C_in, 3, 3) / (3 * C_in**0.5)
    return input, weight, torch.randn(C_out), policy, in_policy


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str, cpu_backend: None) -> None:
    *_, stride, padding, block = CASES[case]
    input, weight, bias, policy, in_policy = make(case)
    doubles = input.double(), weight.double(), bias.double()
    kernels = winograd_kernels(weight, Transform(block, stride))
    geometry = {"stride": stride, "padding": padding}
    for out, inner, frames in ((policy, in_policy, 2), (None, in_policy, 1), (policy, None, 1)):
        expected = gated_conv2d_reference(
            *doubles, out, frames=frames, in_policy=inner, activation="relu", **geometry
        )
        for order in (torch.contiguous_format, torch.channels_last):
            ordered = input.contiguous(memory_format=order)
            actual = winograd_conv2d(ordered, kernels, bias, out, inner, frames, stride, padding, RELU)
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
            assert actual.is_contiguous(memory_format=order)
    target = torch.randn(expected.shape)
    expected = conv2d_add_reference(
        target.double(), *doubles, in_policy, [stride] * 2, padding, [1, 1], "relu"
    )
    winograd_conv2d_add_(target, input, kernels, bias, in_policy, stride, padding, RELU)
    torch.testing.assert_close(target.double(), expected, rtol=1e-5, atol=1e-5)


def test_on_every_instruction_set(on_instruction_set: Callable[..., None]) -> None:
    on_instruction_set(f"{Path(__file__)}::test_matches_the_reference")


def test_kernels_are_those_of_the_weight_in_any_format_and_dtype(cpu_backend: None) -> None:
    weight = torch.randn(7, 19, 3, 3).bfloat16().float()
    kernels = winograd_kernels(weight, Transform(4, 1))
    assert kernels.shape == (7, 36, 19)
    for same in (weight.bfloat16(), weight.to(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        assert torch.equal(winograd_kernels(same, Transform(4, 1)), kernels)


def test_takes_bfloat16(cpu_backend: None) -> None:
    input, weight, bias, policy, in_policy = (
        x if x.dtype == torch.int64 else x.bfloat16() for x in make("2x2")
    )
    doubles = input.double(), weight.double(), bias.double()
    expected = gated_conv2d_reference(*doubles, policy, frames=2, padding=1, in_policy=in_policy)
    kernels = winograd_kernels(weight, Transform(2, 1))
    actual = winograd_conv2d(input, kernels, bias, policy, in_policy, 2, 1, [1, 1], 0)
    # The one rounding to bfloat16 is at most half of its 2^-8.
    torch.testing.assert_close(actual.double(), expected, rtol=4e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["4x4", "stride 2"])
def test_opcheck(case: str, cpu_backend: None) -> None:
    *_, stride, padding, block = CASES[case]
    input, weight, bias, policy, in_policy = make(case)
    torch.library.opcheck(torch.ops.adakernels.winograd_kernels.default, (weight, block, stride))
    kernels = winograd_kernels(weight, Transform(block, stride))
    for order in (torch.contiguous_format, torch.channels_last):
        ordered = input.contiguous(memory_format=order)
        arguments = (ordered, kernels, bias, policy, in_policy, 2, stride, padding, RELU)
        torch.library.opcheck(winograd_conv2d, arguments)
        target = torch.zeros_like(winograd_conv2d(*arguments))
        torch.library.opcheck(
            winograd_conv2d_add_, (target, ordered, kernels, bias, in_policy, stride, padding, RELU)
        )


def block_of(
    size: tuple[int, int], stride: int = 1, padding: int = 1, channels: int = 16, **other: Any
) -> int:
    geometry: dict[str, Any] = {"kernel": (3, 3), "dilation": (1, 1), "groups": 1} | other
    geometry |= {"stride": (stride,) * 2, "padding": (padding,) * 2}
    transform = winograd_transform(size, channels, channels, **geometry)
    assert transform is None or transform.stride == stride
    return 0 if transform is None else transform.block


def test_which_blocks_are_kept(cpu_backend: None) -> None:
    assert block_of((56, 56)) == block_of((28, 28)) == 4
    assert block_of((14, 14), channels=256) == 4
    assert block_of((14, 14), channels=512) == 2, "kernels would take too much memory"
    assert block_of((7, 7)) == 2
    assert block_of((1, 1)) == block_of((0, 5)) == 0
    assert block_of((56, 56), stride=2) == 2
    assert block_of((14, 14), stride=2) == 0
    # A row of taps would read nothing but zeros, and is dropped.
    assert block_of((1, 400)) == block_of((1, 400), stride=2) == 0
    for other in ({"kernel": (1, 1)}, {"dilation": (2, 2)}, {"groups": 2}):
        assert block_of((28, 28), **other) == 0
    assert block_of((28, 28), stride=3) == 0


def test_what_does_not_fit_is_refused(cpu_backend: None) -> None:
    input, weight, bias, policy, in_policy = make("4x4")
    kernels = winograd_kernels(weight, Transform(4, 1))

    def run(input: Tensor, kernels: Tensor, frames: int = 1, stride: int = 1, padding: int = 1) -> None:
        winograd_conv2d(input, kernels, bias, policy, in_policy, frames, stride, [padding] * 2, 0)

    with pytest.raises(RuntimeError, match=r"expected transformed kernels \[C_out, points, C_in\]"):
        run(input[:, 1:], kernels)
    with pytest.raises(RuntimeError, match=r"expected transformed kernels \[C_out, points, C_in\]"):
        run(input, kernels[:, 1:])
    with pytest.raises(RuntimeError, match=r"expected transformed kernels \[C_out, points, C_in\]"):
        run(input, kernels.mT.contiguous().mT)
    with pytest.raises(RuntimeError, match="expected a stride of the kernels"):
        run(input, kernels, stride=2)
    with pytest.raises(RuntimeError, match="a kernel within the padded input"):
        run(input[:, :, :2], kernels, padding=0)
    with pytest.raises(RuntimeError, match="expected no transformed kernels for a map of that size"):
        run(input[:, :, :1], kernels)
    with pytest.raises(RuntimeError, match="expected frames to divide N"):
        run(input, kernels, frames=3)
    with pytest.raises(RuntimeError, match="expected a weight of 3x3 kernels"):
        winograd_kernels(weight[..., :2], Transform(2, 1))
    with pytest.raises(RuntimeError, match="expected a float32 or bfloat16 tensor"):
        winograd_kernels(weight.to(torch.complex64), Transform(2, 1))
    for block, stride in ((4, 2), (3, 1), (2, 0), (2, -1), (2, 3)):
        with pytest.raises(RuntimeError, match="expected blocks of a side of 2 or, at stride 1, of 4"):
            winograd_kernels(weight, Transform(block, stride))
    for arguments in (((8, -8), 9, 9, 1, (1, 1)), ((8, 8), 9, 9, 0, (1, 1)), ((8, 8), 9, 9, 1, (1, -1))):
        with pytest.raises(RuntimeError, match="winograd_block: expected two sizes"):
            torch.ops.adakernels.winograd_block(*arguments)

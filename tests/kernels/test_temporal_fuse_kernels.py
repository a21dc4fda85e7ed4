"""temporal_fuse on the CUDA and the Triton kernels, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adakernels.ops import temporal_fuse_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# clips, frames, channels, height, width: vectors that fit, that cross planes, that do not fit, more than one
# block or split, none at all.
SHAPES = [
    (2, 3, 8, 4, 4),
    (2, 2, 16, 7, 7),
    (1, 3, 5, 3, 5),
    (3, 1, 1, 1, 1),
    (1, 2, 72, 6, 5),
    (1, 2, 8, 50, 51),
    (0, 2, 4, 3, 3),
    (1, 2, 0, 3, 3),
    (2, 2, 3, 0, 4),
]


def make(
    shape: tuple[int, ...], soft: bool, channels_last: bool, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    clips, frames, *size = shape
    generator = torch.Generator().manual_seed(0)
    format = torch.channels_last if channels_last else torch.contiguous_format
    input, grad = (
        torch.randn(clips * frames, *size, generator=generator)
        .to(device, dtype)
        .contiguous(memory_format=format)
        for _ in range(2)
    )
    if soft:
        policy = torch.rand(clips * frames, size[0], 3, generator=generator).to(device, dtype)
        policy[..., 1][policy[..., 1] < 0.3] = 0
    else:
        policy = torch.randint(0, 3, (clips * frames, size[0]), generator=generator).to(device)
    return input, policy, grad


def expected(input: Tensor, policy: Tensor, grad: Tensor, frames: int) -> tuple[Tensor, ...]:
    """Output and gradients in float64, from the same rounded values."""
    soft = policy.is_floating_point()
    leaves = [input.double().requires_grad_()] + ([policy.double().requires_grad_()] if soft else [])
    output = temporal_fuse_reference(leaves[0], leaves[1] if soft else policy, frames=frames)
    return output.detach(), *torch.autograd.grad(output, leaves, grad.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["values", "weights"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(
    kernels: Any, shape: tuple[int, ...], soft: bool, channels_last: bool, dtype: torch.dtype
) -> None:
    input, policy, grad = make(shape, soft, channels_last, dtype, kernels.device)
    frames, pixels = shape[1], shape[3] * shape[4]
    output = kernels.temporal_fuse(input, policy, frames)
    grads = kernels.temporal_fuse_backward(grad, input, policy, frames, True, soft)
    want, *want_grads = expected(input, policy, grad, frames)
    eps = torch.finfo(dtype).eps
    for mine, exact in ((output, want), (grads[0], want_grads[0])):
        assert mine.dtype == dtype and mine.stride() == input.stride()
        # Two products and a sum of values below 8.
        torch.testing.assert_close(mine.double(), exact, rtol=2 * eps, atol=8 * eps if soft else 0)
    if soft:
        assert grads[1].dtype == dtype
        # A sum in float32, whose error grows with the square root of its length, and one rounding.
        tolerance = 2e-6 * max(pixels, 1) ** 0.5
        torch.testing.assert_close(grads[1].double(), want_grads[1], rtol=2 * eps, atol=tolerance)
        assert (grads[1][..., 2] == 0).all() and (grads[1][::frames, :, 1] == 0).all()


def test_unwanted_gradients_are_empty(kernels: Any) -> None:
    input, policy, grad = make(SHAPES[0], True, False, torch.float32, kernels.device)
    for wanted in ((True, False), (False, True), (False, False)):
        grads = kernels.temporal_fuse_backward(grad, input, policy, 3, *wanted)
        assert [grad.numel() > 0 for grad in grads] == list(wanted)


@pytest.mark.parametrize("channels_last", [False, True])
def test_features_of_weight_zero_are_not_read(kernels: Any, channels_last: bool) -> None:
    input, policy, _ = make((2, 3, 8, 4, 4), False, channels_last, torch.float32, kernels.device)
    frames = 3
    kept = policy == 0
    reused_later = torch.zeros_like(kept)
    reused_later[:-1] = policy[1:] == 1
    reused_later[frames - 1 :: frames] = False
    poisoned = torch.where((kept | reused_later)[..., None, None], input, float("nan"))
    output = kernels.temporal_fuse(poisoned.contiguous(), policy, frames)
    assert torch.equal(output, temporal_fuse_reference(input, policy, frames=frames).contiguous())


def test_two_runs_agree_in_every_bit(kernels: Any) -> None:
    input, policy, grad = make((1, 2, 8, 50, 51), True, True, torch.bfloat16, kernels.device)
    first, second = (kernels.temporal_fuse_backward(grad, input, policy, 2, True, True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_start_that_is_not_aligned(kernels: Any) -> None:
    input, policy, _ = make((2, 3, 8, 4, 4), True, False, torch.float16, kernels.device)
    shifted = torch.cat([input.new_zeros(1), input.flatten()])[1:].view_as(input)
    assert torch.equal(kernels.temporal_fuse(shifted, policy, 3), kernels.temporal_fuse(input, policy, 3))

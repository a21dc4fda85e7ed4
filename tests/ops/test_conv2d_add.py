"""conv2d_add_ against its reference, on shapes for each of the ways to convolve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import profile

import adakernels as ak
from adakernels.models.resnet import ResidualBlock
from adakernels.nn import GatedConv2d, conv_norm_add_act
from adakernels.ops.conv2d_add import conv2d_add_, conv2d_add_reference

# N, C_in, C_out, size, kernel, stride, padding
SHAPES = {
    "in place": (2, 24, 21, 14, 1, 1, 0),
    "in place, one row of weights": (1, 7, 1, 20, 1, 1, 0),
    "in place, one point past the vectors": (1, 16, 9, 7, 1, 1, 0),
    "strided": (2, 9, 10, 13, 1, 2, 0),
    "gathered": (2, 16, 40, 7, 3, 1, 1),
    "winograd": (2, 6, 11, 15, 3, 1, 1),
    "winograd, stride 2": (2, 6, 11, 27, 3, 2, 1),
    "winograd, in parts of the rows": (8, 512, 400, 7, 3, 1, 1),
    "direct": (2, 3, 8, 17, 7, 2, 3),
}


def make(shape: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[list[int], ...]]:
    """Target, input, weight, bias and in_policy, and stride, padding and dilation."""
    torch.manual_seed(0)
    N, C_in, C_out, size, kernel, stride, padding = SHAPES[shape]
    extent = (size + 2 * padding - kernel) // stride + 1
    tensors = [
        torch.randn(N, C_out, extent, extent),
        torch.randn(N, C_in, size, size),
        torch.randn(C_out, C_in, kernel, kernel) / (kernel * C_in**0.5),
        torch.randn(C_out),
    ]
    in_policy = torch.randint(0, 3, (N, C_in))
    return [*(x.to(dtype) for x in tensors), in_policy], ([stride] * 2, [padding] * 2, [1, 1])


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: str, activation: str | None, cpu_backend: None) -> None:
    (target, input, weight, bias, in_policy), geometry = make(shape)
    doubles = [x.double() for x in (target, input, weight, bias)]
    for policy in (in_policy, None):
        expected = conv2d_add_reference(*doubles, policy, *geometry, activation)
        into = target.clone()
        result = conv2d_add_(into, input, weight, bias, policy, *geometry, activation)
        assert result is into
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["in place", "winograd"])
def test_takes_bfloat16_and_channels_last_targets(shape: str, cpu_backend: None) -> None:
    for dtype, layout in ((torch.bfloat16, "contiguous_format"), (torch.float32, "channels_last")):
        tensors, geometry = make(shape, dtype)
        into = tensors[0].contiguous(memory_format=getattr(torch, layout))
        expected = conv2d_add_reference(*(x.double() for x in tensors[:4]), tensors[4], *geometry, "relu")
        result = conv2d_add_(into.clone(), *tensors[1:], *geometry, "relu")
        # The one rounding to bfloat16 is at most half of its 2^-8.
        torch.testing.assert_close(
            result.double(), expected, rtol=4e-3 if dtype != torch.float32 else 1e-5, atol=1e-5
        )


@pytest.mark.parametrize("shape", ["in place", "gathered"])
def test_opcheck(shape: str, cpu_backend: None) -> None:
    tensors, geometry = make(shape)
    torch.library.opcheck(torch.ops.adakernels.conv2d_add_.default, (*tensors, *geometry, 1))


def test_on_every_instruction_set(on_instruction_set: Callable[..., None]) -> None:
    on_instruction_set(f"{Path(__file__)}::test_matches_the_reference")


def test_wrong_targets_are_refused(cpu_backend: None) -> None:
    (target, *others), geometry = make("in place")
    for wrong in (target[:1], target[:, 1:], target[..., 1:], target.bfloat16()):
        with pytest.raises(
            RuntimeError, match="conv2d_add_: expected a target of the output's shape and dtype"
        ):
            conv2d_add_(wrong, *others, *geometry, None)


@pytest.mark.parametrize("kernels", [(3, 3), (1, 3, 1)])
def test_blocks_keep_their_input_unless_told_otherwise(kernels: tuple[int, ...], cpu_backend: None) -> None:
    torch.manual_seed(0)
    layers = [(GatedConv2d(12, 12, k, padding=k // 2), torch.nn.BatchNorm2d(12)) for k in kernels]
    block = ResidualBlock(layers).eval()
    input = torch.randn(2, 12, 14, 14)
    kept = input.clone()
    with torch.inference_mode():
        with ak.use_backend("reference"):
            expected = block(input)
        torch.testing.assert_close(block(input), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(input, kept, rtol=0, atol=0)
        output, _ = block.forward_with_policy(input, overwrite=True)
    assert output is input
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_residual_branches_keep_transformed_kernels(stride: int, cpu_backend: None) -> None:
    conv = GatedConv2d(12, 20, 3, padding=1, stride=stride).eval()
    norm = torch.nn.BatchNorm2d(20).eval()
    input, in_policy = torch.randn(2, 12, 28, 28), torch.randint(0, 3, (2, 12))
    residual = torch.randn(2, 20, 28 // stride, 28 // stride)
    masked = torch.where(in_policy[..., None, None] == 2, 0, input)
    with torch.no_grad():
        expected = torch.relu(norm(F.conv2d(masked, conv.weight, conv.bias, stride, 1)) + residual)
        with profile() as recorded:
            for _ in range(2):
                actual = conv_norm_add_act(conv, norm, "relu", input, residual, in_policy=in_policy)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    names = [event.name for event in recorded.function_events]
    assert names.count("adakernels::winograd_kernels") == 1
    assert names.count("adakernels::winograd_conv2d_add_") == 2


def test_autograd_knows_that_the_target_changes(cpu_backend: None) -> None:
    (target, *others), geometry = make("in place")
    factor = torch.ones_like(target, requires_grad=True)
    product = factor * target
    conv2d_add_(target, *others, *geometry, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        conv2d_add_(target.clone(), *others, *geometry, None)


@pytest.mark.parametrize("number", range(4))
def test_gradients_are_refused(number: int, cpu_backend: None) -> None:
    tensors, geometry = make("in place")
    tensors[number].requires_grad_()
    with pytest.raises(RuntimeError, match="conv2d_add_: expected tensors that require no gradient"):
        conv2d_add_(*tensors, *geometry, None)
    with torch.no_grad():
        conv2d_add_(*tensors, *geometry, None)


def test_errors_name_the_operator(cpu_backend: None) -> None:
    (target, input, weight, bias, in_policy), geometry = make("in place")
    in_policy[1, 1] = 3
    with pytest.raises(ValueError, match=r"^conv2d_add_: expected in_policy values 0 .*, got 3"):
        conv2d_add_(target, input, weight, bias, in_policy, *geometry, None)


def test_targets_in_the_inputs_memory(cpu_backend: None) -> None:
    conv, norm = GatedConv2d(12, 12, 3, padding=1), torch.nn.BatchNorm2d(12).eval()
    input = torch.randn(2, 12, 14, 14)
    with pytest.raises(ValueError, match="conv2d_add_: expected a target that shares no memory with input"):
        conv2d_add_(input[:], input, conv.weight.detach(), None, None, (1, 1), (1, 1), (1, 1), None)
    with torch.no_grad():
        want = (norm(conv(input)) + input).relu()
        got = conv_norm_add_act(conv, norm, "relu", input, input, overwrite=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

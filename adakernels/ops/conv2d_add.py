"""conv2d_add_: a convolution that is added to a tensor in place, as a residual branch is to its shortcut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adakernels import flops
from adakernels.ops import _checks
from adakernels.ops._conv_arguments import ACTIVATIONS, activate
from adakernels.ops._layout import shares_memory
from adakernels.ops._library import call, library
from adakernels.ops._winograd import KernelSource, kept_kernels, winograd_conv2d_add_
from adakernels.ops.gated_conv2d import gated_conv2d_flops
from adakernels.ops.policy import Policy, as_index

library.define(
    "conv2d_add_(Tensor(a!) target, Tensor input, Tensor weight, Tensor? bias, Tensor? in_policy, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, int activation) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_operator = torch.ops.adakernels.conv2d_add_.default


@torch.library.register_fake("adakernels::conv2d_add_", lib=library)
def _fake(
    target: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_policy: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: int,
) -> None:
    pass


def conv2d_add_reference(
    target: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None,  # [C_out]
    in_policy: Tensor | None,  # [N, C_in]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:  # [N, C_out, H', W']
    """What `target` is after `conv2d_add_`, in plain PyTorch."""
    if in_policy is not None:
        input = torch.where(in_policy[..., None, None] == Policy.SKIP.value, 0, input)
    return activate(target + F.conv2d(input, weight, bias, stride, padding, dilation), activation)


def conv2d_add_(
    target: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    bias: Tensor | None,  # [C_out]
    in_policy: Tensor | None,  # [N, C_in]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
    *,
    kernel_source: KernelSource | None = None,
) -> Tensor:  # [N, C_out, H', W']
    """`target`, in place, as activation(target + conv2d(input, weight) + bias), on the CPU and in inference.

    A sum that is made while the convolution's results are at hand spares two passes over memory.
    Source: the last step of a residual block (He et al., 2016).

    Args:
        target: of the output's shape and the input's dtype, float32 or bfloat16, in memory of its own.
        in_policy: integer; input channels marked SKIP are known to be zero and are not read.
        activation: None, "relu", "relu6" or "silu".
        kernel_source: gives transformed kernels of `weight`.

    Raises:
        RuntimeError, ValueError: where shapes, dtypes or policy values don't fit, a gradient is asked for, or
            `target` shares its memory with `input`.
    """
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (target, input, weight, bias)
    ):
        raise RuntimeError("conv2d_add_: expected tensors that require no gradient, or torch.no_grad()")
    _checks.check_value(
        compiling or not shares_memory(target, input),
        lambda: "conv2d_add_: expected a target that shares no memory with input",
    )
    stride, padding, dilation = (
        _checks.per_dimension("conv2d_add_", name, value, 2, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    _checks.check_value(
        input.shape[1] == weight.shape[1],
        lambda: f"conv2d_add_: expected weight of C_in = {input.shape[1]} channels, got {weight.shape[1]}",
    )
    if flops.counting:
        output_size = target.shape[2:]
        work = gated_conv2d_flops(input.shape, weight.shape, output_size=output_size, in_policy=in_policy)
        flops.record("conv2d", *work)
    policy = None if in_policy is None else as_index(in_policy)
    number = ACTIVATIONS.index(activation)
    kernels = kept_kernels(kernel_source, input, weight, stride, padding, dilation, 1)
    if kernels is not None:
        call(winograd_conv2d_add_, target, input, kernels, bias, policy, stride[0], padding, number)
    else:
        call(_operator, target, input, weight, bias, policy, stride, padding, dilation, number)
    if not (compiling or target.is_inference()):
        torch.autograd.graph.increment_version(target)
    return target

"""gated_conv2d in Triton: the policies become the domain of the convolution core."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from adakernels.ops._conv_arguments import empty_output
from adakernels.ops._layout import empty_in_format, memory_format
from adakernels.triton.configurations import configuration
from adakernels.triton.convolution import convolution_kernel, depthwise_kernel
from adakernels.triton.convolution_gradient import convolution_bwd_weight_kernel, depthwise_bwd_weight_kernel
from adakernels.triton.domain import Domain, build_domain
from adakernels.triton.temporal_fuse import temporal_fuse_backward

# Up to here one block of pixels has a whole frame.
SMALL_MAP = 64
# Frames are split so that there are about that many programs of a weight's gradient.
PROGRAMS = 512


def _image(name: str, tensor: Tensor) -> dict[str, int]:
    """Size and steps of a contiguous or channels-last [N, C, H, W], as arguments of the kernels."""
    _, channels, height, width = tensor.shape
    last = memory_format(tensor) == torch.channels_last
    return {
        f"{name}_channels": channels,
        f"{name}_height": height,
        f"{name}_width": width,
        f"{name}_step_channel": 1 if last else height * width,
        f"{name}_step_pixel": channels if last else 1,
    }


def _geometry(
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> dict[str, Any]:
    """Kernel size, stride, padding and dilation, as arguments of the kernels."""
    arguments = {"kernel_height": weight.shape[2], "kernel_width": weight.shape[3]}
    for name, pair in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        arguments |= {f"{name}_y": pair[0], f"{name}_x": pair[1]}
    return arguments


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _shape_class(output: Tensor, kernel_height: int, kernel_width: int) -> str:
    kernel = "1x1" if kernel_height * kernel_width == 1 else "kxk"
    size = "small" if output.shape[2] * output.shape[3] <= SMALL_MAP else "large"
    return f"{8 * output.element_size()} bits, {kernel}, {size} map"


def _format(tensor: Tensor) -> str:
    return "channels last" if memory_format(tensor) == torch.channels_last else "contiguous"


def _convolve(
    output: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw] | [C_in, C_out, kh, kw]
    bias: Tensor | None,  # [C_out]
    policy: Tensor | None,  # [N, C_out]
    domain: Domain,
    TRANSPOSED: bool = False,
    **arguments: Any,
) -> None:
    """Fills the output with the convolution of the domain, or with the transposed one."""
    chosen = configuration(
        "convolution", _shape_class(output, arguments["kernel_height"], arguments["kernel_width"])
    )
    rows, channels, height, width = output.shape
    if output.numel() == 0:
        return
    # Input channels of the weight lie side by side in this format only.
    weight = weight.contiguous(memory_format=torch.channels_last)
    row = weight[0].numel()
    blocks = triton.cdiv(height * width, chosen["b_pixel"]) * triton.cdiv(channels, chosen["b_out"])
    convolution_kernel[(rows * blocks,)](
        output,
        input,
        weight,
        bias,
        policy,
        *domain,
        **_image("out", output),
        **_image("in", input),
        weight_step_out=1 if TRANSPOSED else row,
        weight_step_in=row if TRANSPOSED else 1,
        weight_step_tap=weight.shape[1],
        TRANSPOSED=TRANSPOSED,
        PRECISION=_precision(),
        **arguments,
        **chosen,
    )


def _convolve_depthwise(
    output: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [max(C_out, C_in), 1, kh, kw]
    bias: Tensor | None,  # [C_out]
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    TRANSPOSED: bool = False,
    **arguments: Any,
) -> None:
    rows, channels, height, width = output.shape
    if output.numel() == 0:
        return
    chosen = configuration("depthwise", _format(input))
    blocks = triton.cdiv(height * width, chosen["b_pixel"]) * triton.cdiv(channels, chosen["b_channel"])
    depthwise_kernel[(rows * blocks,)](
        output,
        input,
        weight.contiguous(),
        bias,
        policy,
        in_policy,
        **_image("out", output),
        **_image("in", input),
        TRANSPOSED=TRANSPOSED,
        **arguments,
        **chosen,
    )


def gated_conv2d(
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    bias: Tensor | None,  # [C_out]
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    frames: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:  # [N, C_out, H', W']
    output = empty_output(input, weight, stride, padding, dilation)
    bias = None if bias is None else bias.contiguous()
    arguments = _geometry(weight, stride, padding, dilation) | {"frames": frames, "ACTIVATION": activation}
    if groups == 1:
        domain = build_domain(policy, in_policy, frames)
        _convolve(output, input, weight, bias, policy, domain, **arguments)
    else:
        arguments["multiplier"] = weight.shape[0] // groups
        _convolve_depthwise(output, input, weight, bias, policy, in_policy, **arguments)
    return output


def _input_gradient(
    grad: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    domain: Domain,
    **arguments: Any,
) -> Tensor:  # [N, C_in, H, W]
    output = empty_in_format(input, input.shape)
    swapped = Domain(*domain[2:], *domain[:2])
    _convolve(output, grad, weight, None, None, swapped, TRANSPOSED=True, frames=1, ACTIVATION=0, **arguments)
    return output


def _depthwise_input_gradient(
    grad: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, 1, kh, kw]
    in_policy: Tensor | None,  # [N, C_in]
    **arguments: Any,
) -> Tensor:  # [N, C_in, H, W]
    output = empty_in_format(input, input.shape)
    _convolve_depthwise(
        output, grad, weight, None, None, in_policy, TRANSPOSED=True, ACTIVATION=0, **arguments
    )
    return output


def _splits(rows: int, programs: int) -> tuple[int, int]:
    """Into how many parts of how many frames the batch is split, each for that many programs."""
    each = triton.cdiv(rows, max(1, PROGRAMS // programs))
    return triton.cdiv(rows, each), each


def _weight_gradient(
    grad: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw]
    in_policy: Tensor | None,  # [N, C_in]
    domain: Domain,
    **arguments: Any,
) -> Tensor:  # [C_out, C_in, kh, kw]
    rows, (out_channels, in_channels, *kernel) = len(input), weight.shape
    if rows == 0:
        return weight.new_zeros(weight.shape)
    chosen = configuration("weight gradient", _shape_class(grad, *kernel))
    # Where only the inputs are listed, their list is the one that is followed.
    inputs = domain.outputs is None and domain.inputs is not None
    whole = out_channels if inputs else in_channels
    programs = kernel[0] * kernel[1] * triton.cdiv(whole, chosen["b_whole"])
    splits, rows_per_split = _splits(rows, programs)
    sums = torch.zeros(splits, out_channels, *kernel, in_channels, device=weight.device)
    convolution_bwd_weight_kernel[(splits * programs,)](
        sums,
        grad,
        input,
        None if inputs else in_policy,
        *(domain[2:] if inputs else domain[:2]),
        rows,
        rows_per_split,
        **_image("out", grad),
        **_image("in", input),
        INPUTS=inputs,
        PRECISION=_precision(),
        **arguments,
        **chosen,
    )
    return sums.sum(0).permute(0, 3, 1, 2).to(weight.dtype).contiguous()


def _depthwise_weight_gradient(
    grad: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, 1, kh, kw]
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    **arguments: Any,
) -> Tensor:  # [C_out, 1, kh, kw]
    rows, channels = len(input), len(weight)
    if rows == 0:
        return weight.new_zeros(weight.shape)
    chosen = configuration("depthwise weight gradient", _format(input))
    programs = weight[0].numel() * triton.cdiv(channels, chosen["b_channel"])
    splits, rows_per_split = _splits(rows, programs)
    sums = torch.empty(splits, *weight.shape, device=weight.device)
    depthwise_bwd_weight_kernel[(splits * programs,)](
        sums,
        grad,
        input,
        policy,
        in_policy,
        rows,
        rows_per_split,
        **_image("out", grad),
        **_image("in", input),
        **arguments,
        **chosen,
    )
    return sums.sum(0).to(weight.dtype)


def gated_conv2d_backward(
    grad_output: Tensor,  # [N, C_out, H', W']
    input: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    frames: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grad_input: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, C_in, H, W], [C_out, C_in/groups, kh, kw], [C_out]
    # From here on a frame's gradient is that of what it computed, also of what the next frame reused.
    grad = grad_output
    if policy is not None:
        grad = temporal_fuse_backward(grad_output, grad_output, policy, frames, True, False)[0]
    arguments = _geometry(weight, stride, padding, dilation)
    if groups == 1:
        domain = build_domain(policy, in_policy, frames)
        to_input = partial(_input_gradient, grad, input, weight, domain, **arguments)
        to_weight = partial(_weight_gradient, grad, input, weight, in_policy, domain, **arguments)
    else:
        arguments |= {"multiplier": weight.shape[0] // groups, "frames": frames}
        to_input = partial(_depthwise_input_gradient, grad, input, weight, in_policy, **arguments)
        to_weight = partial(_depthwise_weight_gradient, grad, input, weight, policy, in_policy, **arguments)
    return (
        to_input() if grad_input else input.new_empty(0),
        to_weight() if grad_weight else weight.new_empty(0),
        grad.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype) if grad_bias else weight.new_empty(0),
    )

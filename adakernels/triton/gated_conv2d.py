"""gated_conv2d in Triton: the policies become the domain of the convolution core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from adakernels.ops._conv_arguments import empty_output
from adakernels.ops._layout import memory_format
from adakernels.triton.configurations import configuration
from adakernels.triton.convolution import convolution_fwd_kernel, depthwise_fwd_kernel
from adakernels.triton.domain import build_domain

# Up to here one block of pixels has a whole frame.
SMALL_MAP = 64


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


def _pairs(**pairs: Sequence[int]) -> dict[str, int]:
    return {
        f"{name}_{axis}": value
        for name, pair in pairs.items()
        for axis, value in zip("yx", pair, strict=True)
    }


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
    if output.numel() == 0:
        return output
    rows, out_channels, height, width = output.shape
    bias = None if bias is None else bias.contiguous()
    kernel_height, kernel_width = weight.shape[2:]
    arguments = {
        "frames": frames,
        **_image("out", output),
        **_image("in", input),
        "kernel_height": kernel_height,
        "kernel_width": kernel_width,
        **_pairs(stride=stride, padding=padding, dilation=dilation),
        "ACTIVATION": activation,
    }
    if groups > 1:
        chosen = configuration(
            "depthwise", "contiguous" if arguments["in_step_pixel"] == 1 else "channels last"
        )
        blocks = triton.cdiv(height * width, chosen["b_pixel"]) * triton.cdiv(
            out_channels, chosen["b_channel"]
        )
        depthwise_fwd_kernel[(rows * blocks,)](
            output,
            input,
            weight.contiguous(),
            bias,
            policy,
            in_policy,
            multiplier=out_channels // groups,
            **arguments,
            **chosen,
        )
        return output
    # Rows of the reduction are read along the input channels, which lie side by side in this format only.
    weight = weight.contiguous(memory_format=torch.channels_last)
    bits, taps = 8 * input.element_size(), kernel_height * kernel_width
    size = "small" if height * width <= SMALL_MAP else "large"
    chosen = configuration("convolution", f"{bits} bits, {'1x1' if taps == 1 else 'kxk'}, {size} map")
    blocks = triton.cdiv(height * width, chosen["b_pixel"]) * triton.cdiv(out_channels, chosen["b_out"])
    convolution_fwd_kernel[(rows * blocks,)](
        output,
        input,
        weight,
        bias,
        policy,
        *build_domain(policy, in_policy, frames),
        weight_step_out=taps * weight.shape[1],
        weight_step_in=1,
        weight_step_tap=weight.shape[1],
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        **arguments,
        **chosen,
    )
    return output

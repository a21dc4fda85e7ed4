"""Launches of the convolution core: what a call's tensors and numbers are to its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from adakernels.ops._conv_arguments import empty_output
from adakernels.ops._layout import empty_in_format, memory_format
from adakernels.triton.configurations import configuration
from adakernels.triton.convolution import convolution_kernel, depthwise_kernel
from adakernels.triton.convolution_gradient import convolution_bwd_weight_kernel, depthwise_bwd_weight_kernel
from adakernels.triton.domain import Domain, build_frames
from adakernels.triton.limits import check_frame

# Up to here one block of pixels has a whole frame.
SMALL_MAP = 64
# Frames are split so that there are about that many programs of a weight's gradient.
PROGRAMS = 512


class Geometry(NamedTuple):
    """How a convolution goes over frames, rows and columns; over one frame where it has two dimensions.

    The rows of packed clips are one sequence of frames; otherwise a frame without clip is one of its own.
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    packed: bool = False

    def arguments(self) -> dict[str, int]:
        """As the kernels take it."""
        values = {}
        for name, sides, neutral in (
            ("stride", self.stride, 1),
            ("padding", self.padding, 0),
            ("dilation", self.dilation, 1),
        ):
            t, y, x = (*[neutral] * (3 - len(sides)), *sides)
            values |= {f"{name}_t": t, f"{name}_y": y, f"{name}_x": x}
        t, y, x = (*[1] * (3 - len(self.kernel)), *self.kernel)
        return values | {"kernel_frames": t, "kernel_height": y, "kernel_width": x}

    def empty_output(
        self,
        input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
        weight: Tensor,  # [C_out, C_in/groups, *kernel]
    ) -> Tensor:  # [N, C_out, H', W'] | [B, C_out, T', H', W']
        """What the output is before it is filled; packed clips keep their number of frames."""
        rank = input.dim() - 2
        sides = (side[-rank:] for side in (self.stride, self.padding, self.dilation))
        return empty_output(input, weight[(slice(None),) * 2 + (0,) * (weight.dim() - 2 - rank)], *sides)

    def image(self, name: str, tensor: Tensor) -> dict[str, int]:
        """Size and steps of contiguous or channels-last frames or clips, as the kernels take them."""
        _, channels, *sides = tensor.shape
        step = channels if is_last(tensor) else 1
        frames, pixels = math.prod(sides[:-2]), sides[-2] * sides[-1]
        check_frame("convolution", (1, channels * (1 if step > 1 else frames), *sides[-2:]))
        return {
            f"{name}_channels": channels,
            f"{name}_frames": len(tensor) if self.packed else frames,
            f"{name}_height": sides[-2],
            f"{name}_width": sides[-1],
            f"{name}_step_clip": channels * frames * pixels,
            f"{name}_step_frame": pixels * (channels if self.packed else step),
            f"{name}_step_channel": 1 if step > 1 else frames * pixels,
            f"{name}_step_pixel": step,
        }

    def domain(
        self,
        output: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
        input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
        temporal: Tensor | None = None,  # [B]
        frame_offsets: Tensor | None = None,  # [B + 1]
        gates: Sequence[Tensor | None] = (None, None),  # [B, S_t], [B, S_c]
        TRANSPOSED: bool = False,
    ) -> Domain:
        """Of every frame of the output; all of it where a frame has but one tap in time."""
        gated = any(gate is not None for gate in gates)
        if not gated and (
            len(self.kernel) == 2 or (self.kernel[0], self.stride[0], self.padding[0]) == (1, 1, 0)
        ):
            return Domain()
        return build_frames(
            output,
            temporal,
            frame_offsets,
            *gates,
            out_frames=len(output) if self.packed else output.shape[2],
            in_frames=len(input) if self.packed else input.shape[2],
            channels=(input if TRANSPOSED else output).shape[1],
            kernel_frames=self.kernel[0],
            stride=self.stride[0],
            padding=self.padding[0],
            dilation=self.dilation[0],
            TRANSPOSED=TRANSPOSED,
        )


def rows(tensor: Tensor) -> int:
    """How many frames a batch of frames or of clips has."""
    return len(tensor) * math.prod(tensor.shape[2:-2])


def is_last(tensor: Tensor) -> bool:
    return memory_format(tensor) != torch.contiguous_format


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _shape_class(output: Tensor, kernel: Sequence[int]) -> str:
    size = "small" if output.shape[-2] * output.shape[-1] <= SMALL_MAP else "large"
    return f"{8 * output.element_size()} bits, {'1x1' if math.prod(kernel) == 1 else 'kxk'}, {size} map"


def format_name(tensor: Tensor) -> str:
    return "channels last" if is_last(tensor) else "contiguous"


def convolve(
    output: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in, *kernel] | [C_in, C_out, *kernel]
    bias: Tensor | None,  # [C_out]
    geometry: Geometry,
    domain: Domain,
    *,
    policy: Tensor | None = None,  # [N, C_out]
    frames: int = 1,
    activation: int = 0,
    TRANSPOSED: bool = False,
) -> None:
    """Fills the output with the convolution over the domain, or with the transposed one."""
    if output.numel() == 0:
        return
    chosen = configuration("convolution", _shape_class(output, geometry.kernel))
    *_, height, width = output.shape
    phases, merged = 1, domain.output_count is None and domain.input_count is None
    if TRANSPOSED:
        phases = geometry.stride[-2] * geometry.stride[-1]
        height, width = triton.cdiv(height, geometry.stride[-2]), triton.cdiv(width, geometry.stride[-1])
    if merged:
        blocks = triton.cdiv(height * width * rows(output), chosen["b_pixel"])
    else:
        blocks = triton.cdiv(height * width, chosen["b_pixel"]) * rows(output)
    # Input channels of the weight lie side by side in this format only.
    weight = weight.contiguous(
        memory_format=torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    )
    row = weight[0].numel()
    convolution_kernel[(blocks * phases * triton.cdiv(output.shape[1], chosen["b_out"]),)](
        output,
        input,
        weight,
        None if bias is None else bias.contiguous(),
        policy,
        *domain,
        rows(output),
        frames,
        **geometry.image("out", output),
        **geometry.image("in", input),
        **geometry.arguments(),
        weight_step_out=1 if TRANSPOSED else row,
        weight_step_in=row if TRANSPOSED else 1,
        weight_step_tap=weight.shape[1],
        TRANSPOSED=TRANSPOSED,
        MERGED=merged,
        ACTIVATION=activation,
        PRECISION=_precision(),
        **chosen,
    )


def convolve_depthwise(
    output: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [max(C_out, C_in), 1, *kernel]
    bias: Tensor | None,  # [C_out]
    geometry: Geometry,
    domain: Domain,
    *,
    policy: Tensor | None = None,  # [N, C_out]
    in_policy: Tensor | None = None,  # [N, C_in]
    frames: int = 1,
    activation: int = 0,
    TRANSPOSED: bool = False,
) -> None:
    """The same with one input channel per output channel; of the domain it follows counts and taps."""
    if output.numel() == 0:
        return
    chosen = configuration("depthwise", format_name(input))
    *_, height, width = output.shape
    blocks = triton.cdiv(height * width, chosen["b_pixel"]) * triton.cdiv(
        output.shape[1], chosen["b_channel"]
    )
    depthwise_kernel[(rows(output) * blocks,)](
        output,
        input,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        policy,
        in_policy,
        domain.output_count,
        domain.input_count,
        domain.taps,
        frames,
        multiplier=max(output.shape[1], input.shape[1]) // min(output.shape[1], input.shape[1]),
        **geometry.image("out", output),
        **geometry.image("in", input),
        **geometry.arguments(),
        TRANSPOSED=TRANSPOSED,
        ACTIVATION=activation,
        **chosen,
    )


def input_gradient(
    grad: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, *kernel]
    geometry: Geometry,
    domain: Domain,
    groups: int = 1,
    in_policy: Tensor | None = None,  # [N, C_in]
) -> Tensor:  # as input
    """The domain is that of the gradient: its outputs are the input's channels, its taps those of its frames."""
    output = empty_in_format(input, input.shape)
    if groups == 1:
        convolve(output, grad, weight, None, geometry, domain, TRANSPOSED=True)
    else:
        convolve_depthwise(output, grad, weight, None, geometry, domain, in_policy=in_policy, TRANSPOSED=True)
    return output


def _splits(rows: int, programs: int) -> tuple[int, int]:
    """Into how many parts of how many frames the batch is split, each for that many programs."""
    each = triton.cdiv(rows, max(1, PROGRAMS // programs))
    return triton.cdiv(rows, each), each


def weight_gradient(
    grad: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in, *kernel]
    geometry: Geometry,
    domain: Domain,
    in_policy: Tensor | None = None,  # [N, C_in]
) -> Tensor:  # [C_out, C_in, *kernel]
    if rows(grad) == 0:
        return weight.new_zeros(weight.shape)
    out_channels, in_channels, *kernel = weight.shape
    chosen = configuration("weight gradient", _shape_class(grad, kernel))
    # Where only the inputs are listed, their list is the one that is followed.
    inputs = domain.outputs is None and domain.inputs is not None
    listed, count = domain[2:4] if inputs else domain[:2]
    programs = math.prod(kernel) * triton.cdiv(out_channels if inputs else in_channels, chosen["b_whole"])
    if listed is None:
        programs *= triton.cdiv(out_channels, chosen["b_list"])
    splits, rows_per_split = _splits(rows(grad), programs)
    sums = torch.zeros(splits, out_channels, *kernel, in_channels, device=weight.device)
    convolution_bwd_weight_kernel[(splits * programs,)](
        sums,
        grad,
        input,
        None if inputs else in_policy,
        listed,
        count,
        domain.taps,
        rows(grad),
        rows_per_split,
        **geometry.image("out", grad),
        **geometry.image("in", input),
        **geometry.arguments(),
        INPUTS=inputs,
        PRECISION=_precision(),
        **chosen,
    )
    return weight.new_empty(weight.shape).copy_(sums.sum(0).movedim(-1, 1))


def depthwise_weight_gradient(
    grad: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, 1, *kernel]
    geometry: Geometry,
    domain: Domain,
    *,
    policy: Tensor | None = None,  # [N, C_out]
    in_policy: Tensor | None = None,  # [N, C_in]
    frames: int = 1,
) -> Tensor:  # [C_out, 1, *kernel]
    if rows(grad) == 0:
        return weight.new_zeros(weight.shape)
    chosen = configuration("depthwise weight gradient", format_name(input))
    programs = weight[0].numel() * triton.cdiv(len(weight), chosen["b_channel"])
    splits, rows_per_split = _splits(rows(grad), programs)
    sums = torch.empty(splits, *weight.shape, device=weight.device)
    depthwise_bwd_weight_kernel[(splits * programs,)](
        sums,
        grad,
        input,
        policy,
        in_policy,
        domain.output_count,
        domain.taps,
        rows(grad),
        rows_per_split,
        frames,
        multiplier=len(weight) // input.shape[1],
        **geometry.image("out", grad),
        **geometry.image("in", input),
        **geometry.arguments(),
        **chosen,
    )
    return sums.sum(0).to(weight.dtype)


def bias_gradient(
    grad: Tensor,  # [N, C_out, ...]
    domain: Domain,
) -> Tensor:  # [C_out]
    if domain.outputs is not None or domain.output_count is None:
        return grad.sum((0, *range(2, grad.dim())), dtype=torch.float32).to(grad.dtype)
    # What is not computed has no gradient, but any value.
    sums = grad.sum((-2, -1), dtype=torch.float32).movedim(1, -1)
    computed = torch.arange(grad.shape[1], device=grad.device) < domain.output_count.view(*sums.shape[:2], 1)
    return torch.where(computed, sums, 0).sum((0, 1)).to(grad.dtype)

"""Launches of the convolution core: what a call's tensors and numbers are to its kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from adakernels.ops._conv_arguments import empty_output
from adakernels.ops._layout import empty_in_format, memory_format
from adakernels.triton.configurations import configuration
from adakernels.triton.convolution import convolution_kernel, depthwise_kernel, split_convolution_kernel
from adakernels.triton.convolution_gradient import convolution_bwd_weight_kernel, depthwise_bwd_weight_kernel
from adakernels.triton.domain import Domain, build_frames
from adakernels.triton.limits import check_frame

# Up to here one block of pixels has a whole frame.
SMALL_MAP = 64
# Frames are split so that there are about that many programs of a weight's gradient.
PROGRAMS = 512
# Sums are split among as many programs as run at a time on a multiprocessor, with steps enough to pay for
# the sums' way through memory.
PROGRAMS_AT_A_TIME, LEAST_STEPS, MOST_SPLITS = 2, 8, 8


class Geometry(NamedTuple):
    """How a convolution goes over frames, rows and columns; over one frame where it has two dimensions.

    The rows of packed clips are one sequence of frames; otherwise a frame without clip is one of its own.
    With more than one group, each has one input channel.
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int = 1
    packed: bool = False

    def arguments(self) -> dict[str, int]:
        """As the kernels take it."""
        values: dict[str, int] = {}
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
        stride, padding, dilation = (side[-rank:] for side in (self.stride, self.padding, self.dilation))
        one_tap = weight[(slice(None),) * 2 + (0,) * (weight.dim() - 2 - rank)]
        return empty_output(input, one_tap, stride, padding, dilation)

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


def _tap_step(
    weight: Tensor,  # [C_out, C_in, *kernel]
) -> int:
    """How far the taps of a weight lie apart; -1 where its input channels are not side by side."""
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        return -1
    step, taps = 0, 1
    for size, stride in zip(reversed(weight.shape[2:]), reversed(weight.stride()[2:]), strict=True):
        if size > 1 and step * taps != (stride if step else 0):
            return -1
        if size > 1:
            step, taps = step or stride, taps * size
    return step


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _shape_class(output: Tensor, kernel: Sequence[int]) -> str:
    size = "small" if output.shape[-2] * output.shape[-1] <= SMALL_MAP else "large"
    return f"{8 * output.element_size()} bits, {'1x1' if math.prod(kernel) == 1 else 'kxk'}, {size} map"


def format_name(tensor: Tensor) -> str:
    return "channels last" if is_last(tensor) else "contiguous"


def _selected(
    weight: Tensor,  # [C_out, C_in, *kernel]
    segments: Sequence[int],
) -> tuple[Tensor, int, int]:
    """The weight from the first segment's start on, that segment's length and the gap behind it.

    It is a copy of the segments where there are more than two or channels do not lie side by side.
    """
    if segments and (len(segments) > 4 or _tap_step(weight) < 0):
        weight = torch.cat(
            [weight[:, start:stop] for start, stop in zip(segments[::2], segments[1::2], strict=True)], 1
        )
    elif segments:
        segment = segments[1] - segments[0]
        gap = segments[2] - segments[1] if len(segments) > 2 else 0
        return weight[:, segments[0] : segments[-1]], segment, gap
    if _tap_step(weight) < 0:
        weight = weight.contiguous(
            memory_format=torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
        )
    return weight, 0, 0


def convolve(
    output: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, *kernel] | [C_in, C_out/groups, *kernel]
    bias: Tensor | None,  # [C_out]
    geometry: Geometry,
    domain: Domain,
    *,
    policy: Tensor | None = None,  # [N, C_out]
    in_policy: Tensor | None = None,  # [N, C_in]
    frames: int = 1,
    activation: int = 0,
    segments: Sequence[int] = (),
    TRANSPOSED: bool = False,
) -> None:
    """Fills the output with the convolution over the domain, or with the transposed one.

    Of the weight's input channels it takes the ranges of `segments`, which has their starts and stops. With
    groups there are no segments, and the policies stand for the domain's lists.
    """
    arguments = geometry.image("out", output) | geometry.image("in", input) | geometry.arguments()
    arguments |= {"frames": frames, "ACTIVATION": activation, "TRANSPOSED": TRANSPOSED}
    bias = None if bias is None else bias.contiguous()
    if output.numel() == 0:
        return
    if geometry.groups > 1:
        _convolve_depthwise(output, input, weight, bias, domain, policy, in_policy, arguments)
    else:
        _convolve_matrix(output, input, weight, bias, geometry, domain, policy, segments, arguments)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_of_sums(tiles: int, steps: int, multiprocessors: int) -> int:
    """Among how many programs the sums of each tile are split where there are few tiles.

    The CUDA kernels have the same rule.

    Args:
        tiles: how many there are without.
        steps: of the longest sum.
        multiprocessors: of the GPU.
    """
    wanted = PROGRAMS_AT_A_TIME * multiprocessors // max(1, tiles)
    return max(1, min(wanted, steps // LEAST_STEPS, MOST_SPLITS))


def _convolve_matrix(
    output: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in, *kernel] | [C_in, C_out, *kernel]
    bias: Tensor | None,  # [C_out]
    geometry: Geometry,
    domain: Domain,
    policy: Tensor | None,  # [N, C_out]
    segments: Sequence[int],
    arguments: Mapping[str, int],
) -> None:
    weight, segment, gap = _selected(weight, segments)
    chosen = configuration("convolution", _shape_class(output, geometry.kernel))
    *_, height, width = output.shape
    pixels = height * width
    phases, merged = 1, domain.output_count is None and domain.input_count is None
    if arguments["TRANSPOSED"]:
        phases = geometry.stride[-2] * geometry.stride[-1]
        height, width = triton.cdiv(height, geometry.stride[-2]), triton.cdiv(width, geometry.stride[-1])
    if merged:
        blocks = triton.cdiv(height * width * rows(output), chosen["b_pixel"])
    else:
        blocks = triton.cdiv(height * width, chosen["b_pixel"]) * rows(output)
    row = weight.stride(0)
    out_channels = output.shape[1]
    tiles = blocks * phases * triton.cdiv(out_channels, chosen["b_out"])
    steps = triton.cdiv(math.prod(geometry.kernel), phases) * triton.cdiv(input.shape[1], chosen["b_in"])
    splits = splits_of_sums(tiles, steps, multiprocessors(output.device))
    partial = None
    if splits > 1:
        partial = torch.empty(
            splits, rows(output), pixels, out_channels, dtype=torch.float32, device=output.device
        )
    convolution_kernel[(tiles, splits)](
        output,
        partial,
        input,
        weight,
        bias,
        policy,
        *domain,
        rows(output),
        weight_step_out=1 if arguments["TRANSPOSED"] else row,
        weight_step_in=row if arguments["TRANSPOSED"] else 1,
        weight_step_tap=_tap_step(weight),
        segment=segment,
        segment_gap=gap,
        MERGED=merged,
        SPLITS=splits,
        SEGMENT_ALIGNMENT=math.gcd(segment, gap, 16) if gap > 0 else 0,
        PRECISION=_precision(),
        **arguments,
        **chosen,
    )
    if partial is None:
        return
    blocks = triton.cdiv(pixels, chosen["b_pixel"]) * triton.cdiv(out_channels, chosen["b_out"])
    split_convolution_kernel[(rows(output) * blocks,)](
        output,
        partial,
        bias,
        policy,
        domain.outputs,
        domain.output_count,
        rows(output),
        **{name: value for name, value in arguments.items() if name == "frames" or name.startswith("out_")},
        SPLITS=splits,
        ACTIVATION=arguments["ACTIVATION"],
        b_pixel=chosen["b_pixel"],
        b_out=chosen["b_out"],
        num_warps=chosen["num_warps"],
    )


def _convolve_depthwise(
    output: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [max(C_out, C_in), 1, *kernel]
    bias: Tensor | None,  # [C_out]
    domain: Domain,
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    arguments: Mapping[str, int],
) -> None:
    chosen = configuration("depthwise", format_name(input))
    channels, *_, height, width = output.shape[1:]
    blocks = triton.cdiv(height * width, chosen["b_pixel"]) * triton.cdiv(channels, chosen["b_channel"])
    depthwise_kernel[(rows(output) * blocks,)](
        output,
        input,
        weight.contiguous(),
        bias,
        policy,
        in_policy,
        domain.output_count,
        domain.input_count,
        domain.taps,
        multiplier=max(channels, input.shape[1]) // min(channels, input.shape[1]),
        **arguments,
        **chosen,
    )


def input_gradient(
    grad: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, *kernel]
    geometry: Geometry,
    domain: Domain,
    *,
    in_policy: Tensor | None = None,  # [N, C_in]
    segments: Sequence[int] = (),
) -> Tensor:  # as input
    """The domain is that of the gradient: its outputs are input channels, its taps those of input frames."""
    output = empty_in_format(input, input.shape)
    convolve(
        output,
        grad,
        weight,
        None,
        geometry,
        domain,
        in_policy=in_policy,
        segments=segments,
        TRANSPOSED=True,
    )
    return output


def _splits(rows: int, programs: int) -> tuple[int, int]:
    """Into how many parts of how many frames the batch is split, each for that many programs."""
    each = triton.cdiv(rows, max(1, PROGRAMS // programs))
    return triton.cdiv(rows, each), each


def weight_gradient(
    grad: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in/groups, *kernel]
    geometry: Geometry,
    domain: Domain,
    *,
    policy: Tensor | None = None,  # [N, C_out]
    in_policy: Tensor | None = None,  # [N, C_in]
    frames: int = 1,
) -> Tensor:  # as weight
    if rows(grad) == 0:
        return weight.new_zeros(weight.shape)
    arguments = geometry.image("out", grad) | geometry.image("in", input) | geometry.arguments()
    arguments["rows"] = rows(grad)
    if geometry.groups > 1:
        arguments["frames"] = frames
        return _depthwise_weight_gradient(grad, input, weight, domain, policy, in_policy, arguments)
    return _matrix_weight_gradient(grad, input, weight, domain, in_policy, arguments)


def _matrix_weight_gradient(
    grad: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in, *kernel]
    domain: Domain,
    in_policy: Tensor | None,  # [N, C_in]
    arguments: Mapping[str, int],
) -> Tensor:  # [C_out, C_in, *kernel]
    out_channels, in_channels, *kernel = weight.shape
    chosen = configuration("weight gradient", _shape_class(grad, kernel))
    # Where only the inputs are listed, their list is the one that is followed.
    inputs = domain.outputs is None and domain.inputs is not None
    listed, count = domain[2:4] if inputs else domain[:2]
    programs = math.prod(kernel) * triton.cdiv(out_channels if inputs else in_channels, chosen["b_whole"])
    if listed is None:
        programs *= triton.cdiv(out_channels, chosen["b_list"])
    splits, rows_per_split = _splits(arguments["rows"], programs)
    sums = torch.zeros(splits, out_channels, *kernel, in_channels, device=weight.device)
    convolution_bwd_weight_kernel[(splits * programs,)](
        sums,
        grad,
        input,
        None if inputs else in_policy,
        listed,
        count,
        domain.taps,
        rows_per_split=rows_per_split,
        INPUTS=inputs,
        PRECISION=_precision(),
        **arguments,
        **chosen,
    )
    return weight.new_empty(weight.shape).copy_(sums.sum(0).movedim(-1, 1))


def _depthwise_weight_gradient(
    grad: Tensor,  # [N, C_out, H', W'] | [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] | [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, 1, *kernel]
    domain: Domain,
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    arguments: Mapping[str, int],
) -> Tensor:  # [C_out, 1, *kernel]
    chosen = configuration("depthwise weight gradient", format_name(input))
    programs = weight[0].numel() * triton.cdiv(len(weight), chosen["b_channel"])
    splits, rows_per_split = _splits(arguments["rows"], programs)
    sums = torch.empty(splits, *weight.shape, device=weight.device)
    depthwise_bwd_weight_kernel[(splits * programs,)](
        sums,
        grad,
        input,
        policy,
        in_policy,
        domain.output_count,
        domain.taps,
        rows_per_split=rows_per_split,
        multiplier=len(weight) // input.shape[1],
        **arguments,
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

"""patch_gather: cut one patch out of each frame at a fractional position, by bilinear interpolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adakernels import backends
from adakernels.ops import _checks
from adakernels.ops._checks import Facts, facts, optional_facts
from adakernels.ops._layout import dense, empty_in_format
from adakernels.ops._library import call, flop_formula, library, register_gradient, run_on_gpu

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
library.define(
    "patch_gather(Tensor input, Tensor origin, SymInt[2] size, Tensor? frame_index, Tensor? mean, "
    "Tensor? std) -> Tensor",
    tags=TAGS,
)
library.define(
    "patch_gather_grad_origin(Tensor grad, Tensor input, Tensor origin, Tensor? frame_index, Tensor? std) "
    "-> Tensor",
    tags=TAGS,
)
library.define(
    "patch_gather_grad_input(Tensor grad, Tensor origin, Tensor? frame_index, Tensor? std, "
    "SymInt[4] input_shape) -> Tensor",
    tags=TAGS,
)
run_on_gpu("patch_gather", "patch_gather_grad_origin", "patch_gather_grad_input")
_operator = torch.ops.adakernels.patch_gather.default
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def patch_gather_reference(
    input: Tensor,  # [N, C, H, W]
    origin: Tensor,  # [M, 2]
    size: Sequence[int],
    *,
    frame_index: Tensor | None = None,  # [M]
    mean: Tensor | None = None,  # [C]
    std: Tensor | None = None,  # [C]
) -> Tensor:  # [M, C, P_h, P_w]
    """`patch_gather` in plain PyTorch, without validation; differentiable in `input` and `origin`."""
    dtype = _arithmetic_dtype(input.dtype)
    frames = (input if frame_index is None else input[frame_index]).to(dtype)
    rows, columns = (
        _taps(one, extent, length)
        for one, extent, length in zip(origin.to(dtype).unbind(1), input.shape[2:], size, strict=True)
    )
    output = frames.new_zeros(())
    for row, row_weight in rows:
        lines = frames.gather(2, row[:, None, :, None].expand(-1, *frames.shape[1:2], -1, *frames.shape[3:]))
        for column, column_weight in columns:
            tap = lines.gather(3, column[:, None, None, :].expand(-1, *lines.shape[1:3], -1))
            weight = (row_weight * column_weight)[:, None, None, None]
            # What has no weight does not spread, not even NaN.
            output = output + weight * torch.where((weight == 0) & ~tap.isfinite(), 0, tap)
    if mean is not None and std is not None:
        unit = 255 if input.dtype == torch.uint8 else 1
        output = (output / unit - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]
    return output.to(_output_dtype(input.dtype))


def _taps(
    origin: Tensor,  # [M]
    extent: int,
    size: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # twice [M, P] and [M]
    """Where the two taps of each of a patch's pixels lie along one dimension, and their weights.

    At the last origin the weights are 0 and 1, so that the second tap is inside and the derivative is the one
    from the left. A patch of the frame's whole extent has one place only, and so no derivative.
    """
    room = extent - size
    place = torch.where(origin.isnan(), 0, origin).clamp(0, room)
    first = place.detach().floor().clamp(max=max(room - 1, 0))
    index = first.to(torch.int64)[:, None] + torch.arange(size, device=origin.device)
    fraction = place - first
    return (index, 1 - fraction), (index + min(room, 1), fraction)


def _arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _output_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float32


@torch.library.register_fake("adakernels::patch_gather", lib=library)
def _fake(
    input: Tensor,
    origin: Tensor,
    size: Sequence[int],
    frame_index: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    return empty_in_format(input, (origin.shape[0], input.shape[1], *size), _output_dtype(input.dtype))


@torch.library.register_fake("adakernels::patch_gather_grad_origin", lib=library)
def _grad_origin_fake(
    grad: Tensor, input: Tensor, origin: Tensor, frame_index: Tensor | None, std: Tensor | None
) -> Tensor:
    return origin.new_empty(origin.shape)


@torch.library.register_fake("adakernels::patch_gather_grad_input", lib=library)
def _grad_input_fake(
    grad: Tensor,
    origin: Tensor,
    frame_index: Tensor | None,
    std: Tensor | None,
    input_shape: Sequence[int],
) -> Tensor:
    return empty_in_format(grad, input_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, origin, _, frame_index, _, std = inputs
    ctx.save_for_backward(input, origin, frame_index, std)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, origin, frame_index, std = ctx.saved_tensors
    ops = torch.ops.adakernels
    grad = dense(grad, like=input)
    grad_input = grad_origin = None
    if ctx.needs_input_grad[0]:
        grad_input = ops.patch_gather_grad_input.default(grad, origin, frame_index, std, input.shape)
    if ctx.needs_input_grad[1]:
        grad_origin = ops.patch_gather_grad_origin.default(grad, input, origin, frame_index, std)
    return grad_input, grad_origin, None, None, None, None


register_gradient(
    "patch_gather",
    _backward,
    _setup_context,
    made_by=("patch_gather_grad_origin", "patch_gather_grad_input"),
)


@flop_formula(torch.ops.adakernels.patch_gather)
def _dense_flops(*args: Any, **kwargs: Any) -> int:
    # Multiply-adds of convolutions are what the papers count.
    return 0


def can_run_cpu(input: Facts, *, raise_error: bool = False) -> bool:
    """Whether the C++ kernels can run a call on such an input."""
    return backends.can_run_cpu("patch_gather", input[2], input[1], CPU_DTYPES, raise_error=raise_error)


def can_run_triton(input: Facts, *, raise_error: bool = False) -> bool:
    """Whether the Triton kernels can run a call on such an input."""
    return backends.can_run_triton("patch_gather", input[2], input[1], GPU_DTYPES, raise_error=raise_error)


def can_run_cuda(input: Facts, *, raise_error: bool = False) -> bool:
    """Whether the CUDA kernels can run a call on such an input."""
    return backends.can_run_cuda("patch_gather", input[2], input[1], GPU_DTYPES, raise_error=raise_error)


def _predicates(input: Facts) -> Mapping[str, backends.Predicate]:
    predicates = {
        "cuda": partial(can_run_cuda, input),
        "triton": partial(can_run_triton, input),
        "cpu": partial(can_run_cpu, input),
    }
    return backends.in_order("patch_gather", predicates, input)


def _check(
    input: Facts,
    origin: Facts,
    frame_index: Facts | None,
    mean: Facts | None,
    std: Facts | None,
    size: Any,
) -> tuple[int, ...]:
    op = "patch_gather"
    _checks.check_rank(op, "input", input[0], "N, C, H, W")
    if input[1] != torch.uint8:
        _checks.check_float(op, "input that is not uint8", input[1])
    _checks.check_rank(op, "origin", origin[0], "M, 2")
    patches = origin[0][0]
    _checks.check_shape(op, "origin", origin[0], (patches, 2), "M, 2")
    _checks.check_float(op, "origin", origin[1])
    _checks.check_same(op, "origin", origin, "input", input, dtype=False)
    sizes = _checks.per_dimension(op, "size", size, 2, 1)
    _checks.check_value(
        all(p <= extent for p, extent in zip(sizes, input[0][2:], strict=True)),
        lambda: f"{op}: expected a size within [H, W] = {list(input[0][2:])}, got {list(sizes)}",
    )
    if frame_index is None:
        _checks.check_value(
            patches == input[0][0],
            lambda: (
                f"{op}: expected an origin for each of N = {input[0][0]} frames, or a frame_index, "
                f"got M = {patches}"
            ),
        )
    else:
        _checks.check_integer(op, "frame_index", frame_index[1])
        _checks.check_shape(op, "frame_index", frame_index[0], (patches,), "M")
        _checks.check_same(op, "frame_index", frame_index, "input", input, dtype=False)
        _checks.check_value(
            input[0][0] >= 1 or patches == 0,
            lambda: f"{op}: expected a frame to cut M = {patches} patches from, got N = 0",
        )
    _checks.check_value(
        (mean is None) == (std is None),
        lambda: f"{op}: expected both mean and std or neither, got {'std' if mean is None else 'mean'} alone",
    )
    for name, constant in (("mean", mean), ("std", std)):
        if constant is not None:
            _checks.check_float(op, name, constant[1])
            _checks.check_shape(op, name, constant[0], (input[0][1],), "C")
            _checks.check_same(op, name, constant, "input", input, dtype=False)
    return sizes


class _Plan(NamedTuple):
    backend: str
    size: tuple[int, ...]


@_checks.planned("input", "origin", "frame_index?", "mean?", "std?")
def _plan(requested: str, op: str, input: Facts, origin: Facts, *arguments: Any) -> _Plan:
    """Validate a call and choose its backend."""
    size = _check(input, origin, *arguments)
    return _Plan(backends.choose(requested, _predicates(input)), size)


def _constant(name: str, value: Any, input: Any) -> Tensor | None:
    """Mean or standard deviation as a tensor."""
    if value is None or isinstance(value, Tensor):
        return value
    numbers = isinstance(value, (list, tuple)) and all(isinstance(one, (int, float)) for one in value)
    _checks.check_type(
        numbers,
        lambda: f"patch_gather: expected {name} to be a Tensor or a sequence of numbers, got {value!r}",
    )
    device = facts("patch_gather", "input", input)[2]
    return torch.tensor(value, dtype=torch.float64, device=device)


def patch_gather(
    input: Tensor,  # [N, C, H, W]
    origin: Tensor,  # [M, 2]
    size: int | Sequence[int],
    *,
    frame_index: Tensor | None = None,  # [M]
    mean: Tensor | Sequence[float] | None = None,  # [C]
    std: Tensor | Sequence[float] | None = None,  # [C]
) -> Tensor:  # [M, C, P_h, P_w]
    """Cut patches out of frames at fractional positions, by bilinear interpolation.

    Pixel (i, j) of patch m is the frame sampled at (origin[m, 0] + i, origin[m, 1] + j). Pixels being one
    apart, four weights serve a whole patch, and as the origin is clamped to [0, H - P_h] x [0, W - P_w]
    nothing is sampled outside of the frame; what has weight 0 is not read, so patches at integer origins are
    exact copies. A NaN coordinate counts as a clamped 0. Where a coordinate is clamped its gradient is zero;
    at integers it is the derivative from the right, at H - P_h and W - P_w the one from the left.
    Source: AdaFocusV2 (Wang et al., CVPR 2022), Section 3.2, without the offset of its Eq. 5; equal to
    `affine_grid` and `grid_sample` (bilinear, align_corners=False), which its authors use.

    Args:
        input: [N, C, H, W] frames of floating point or uint8, contiguous or channels last.
        origin: [M, 2], floating point: (y, x) of each patch's top left sample, in pixels. Computed with in
            float32, or in float64 where the input is that.
        size: (P_h, P_w), or one number for both.
        frame_index: integer [M], the row of `input` that each patch is cut from; by default patch m is cut
            from row m and M = N.
        mean, std: C numbers each, as a tensor or a sequence: the patches are normalised to (x - mean) / std,
            where x is the pixel, or the pixel / 255 for uint8 (so both are in units of [0, 1] images). They
            get no gradient. Without them a uint8 input gives numbers from 0 to 255.

    Returns:
        [M, C, P_h, P_w] in the input's memory format and dtype, float32 for uint8. Gradients go to `origin`
        and, where it is floating point, to `input`; the latter sums over the patches of a frame in a fixed
        order.

    Raises:
        ValueError, TypeError: for a wrong rank, shape, dtype, device, size or combination, or a value of
            `frame_index` outside 0..N - 1 (looked at on the CPU always, elsewhere with `ADAKERNELS_DEBUG=1`).
    """
    op = "patch_gather"
    mean, std = _constant("mean", mean, input), _constant("std", std, input)
    backend, sizes = _plan(op, input, origin, frame_index, mean, std, size)
    mean, std = (None if x is None else x.detach() for x in (mean, std))
    # The kernels for the CPU look at the indices themselves, those for GPUs do not.
    if frame_index is not None and (backend == "reference" or _checks.debugging()):
        sentence = "patch_gather: expected frame_index values from 0 to N - 1 = {}"
        frame_index = _checks.checked_range(frame_index, input.shape[0], sentence)
    if backend == "reference":
        output = patch_gather_reference(input, origin, sizes, frame_index=frame_index, mean=mean, std=std)
        return dense(output, like=input)
    return call(
        _operator,
        dense(input),
        origin.to(torch.float32).contiguous(),
        sizes,
        None if frame_index is None else frame_index.to(torch.int64).contiguous(),
        *(None if x is None else x.to(torch.float32).contiguous() for x in (mean, std)),
    )


@backends.explains(patch_gather)
def _explain(
    input: Tensor,
    origin: Tensor,
    size: int | Sequence[int],
    *,
    frame_index: Tensor | None = None,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
) -> Mapping[str, backends.Predicate]:
    op = "patch_gather"
    what = facts(op, "input", input)
    _check(
        what,
        facts(op, "origin", origin),
        optional_facts(op, "frame_index", frame_index),
        optional_facts(op, "mean", _constant("mean", mean, input)),
        optional_facts(op, "std", _constant("std", std, input)),
        size,
    )
    return _predicates(what)

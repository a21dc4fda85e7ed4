"""temporal_fuse: mix every channel of a frame from the frame itself, the previous frame, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adakernels import backends
from adakernels.ops import _checks
from adakernels.ops._checks import Facts, facts
from adakernels.ops._layout import dense, empty_in_format
from adakernels.ops._library import call, flop_formula, library, register_gradient, run_on_gpu
from adakernels.ops.policy import Policy, as_index, checked_policy, is_soft, previous_frame

library.define(
    "temporal_fuse(Tensor input, Tensor policy, int frames) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
library.define(
    "temporal_fuse_backward(Tensor grad_output, Tensor input, Tensor policy, int frames, bool grad_input, "
    "bool grad_policy) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
run_on_gpu("temporal_fuse", "temporal_fuse_backward")
_operator = torch.ops.adakernels.temporal_fuse.default


def temporal_fuse_reference(
    input: Tensor,  # [N, C, H, W]
    policy: Tensor,  # [N, C] | [N, C, 3]
    *,
    frames: int,
) -> Tensor:  # [N, C, H, W]
    """`temporal_fuse` in plain PyTorch, without validation; differentiable in both arguments."""
    history = previous_frame(input, frames)
    if is_soft(policy):
        keep, reuse, _ = policy.to(input.dtype)[..., None, None].unbind(2)
        return keep * input + reuse * history
    values = policy[..., None, None]
    return torch.where(
        values == Policy.KEEP.value, input, torch.where(values == Policy.REUSE.value, history, 0)
    )


@torch.library.register_fake("adakernels::temporal_fuse", lib=library)
def _fake(input: Tensor, policy: Tensor, frames: int) -> Tensor:
    return empty_in_format(input, input.shape)


@torch.library.register_fake("adakernels::temporal_fuse_backward", lib=library)
def _backward_fake(
    grad_output: Tensor, input: Tensor, policy: Tensor, frames: int, grad_input: bool, grad_policy: bool
) -> tuple[Tensor, Tensor]:
    return (
        empty_in_format(input, input.shape if grad_input else (0,)),
        policy.new_empty(policy.shape if grad_policy else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, policy, ctx.frames = inputs
    ctx.save_for_backward(input, policy)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, policy = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    grads = torch.ops.adakernels.temporal_fuse_backward.default(
        dense(grad_output, like=input), input, policy, ctx.frames, *wanted
    )
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None


register_gradient("temporal_fuse", _backward, _setup_context)


@flop_formula(torch.ops.adakernels.temporal_fuse)
def _dense_flops(*args: Any, **kwargs: Any) -> int:
    # Multiply-adds of convolutions are what the papers count.
    return 0


def can_run_cpu(input: Facts, *, raise_error: bool = False) -> bool:
    """Whether the C++ kernels can run a call on such an input."""
    return backends.can_run_cpu("temporal_fuse", input[2], input[1], raise_error=raise_error)


def can_run_triton(input: Facts, *, raise_error: bool = False) -> bool:
    """Whether the Triton kernels can run a call on such an input."""
    return backends.can_run_triton("temporal_fuse", input[2], input[1], raise_error=raise_error)


def can_run_cuda(input: Facts, *, raise_error: bool = False) -> bool:
    """Whether the CUDA kernels can run a call on such an input."""
    return backends.can_run_cuda("temporal_fuse", input[2], input[1], raise_error=raise_error)


def _predicates(input: Facts) -> Mapping[str, backends.Predicate]:
    predicates = {
        "cuda": partial(can_run_cuda, input),
        "triton": partial(can_run_triton, input),
        "cpu": partial(can_run_cpu, input),
    }
    return backends.in_order("temporal_fuse", predicates, input)


def _check(input: Facts, policy: Facts, frames: Any) -> None:
    op = "temporal_fuse"
    _checks.check_float(op, "input", input[1])
    _checks.check_rank(op, "input", input[0], "N, C, H, W")
    _checks.check_frames(op, frames, input[0][0])
    _checks.check_channel_policy(op, "policy", policy, input, input[0][1], "C", soft=True)


@_checks.planned("input", "policy")
def _plan(requested: str, op: str, input: Facts, policy: Facts, frames: Any) -> str:
    """Validate a call and choose its backend."""
    _check(input, policy, frames)
    return backends.choose(requested, _predicates(input))


def temporal_fuse(
    input: Tensor,  # [N, C, H, W]
    policy: Tensor,  # [N, C] | [N, C, 3]
    *,
    frames: int,
) -> Tensor:  # [N, C, H, W]
    """Mix features over time by a policy: KEEP gives y_t, REUSE gives y_{t-1}, SKIP gives 0.

    History is the input itself, never the mixed output of the previous frame; it is zero in the first frame
    of every clip. This is the second half of `gated_conv2d`, for features computed elsewhere.
    Source: AdaFuse (Meng et al., ICLR 2021), Eq. 2.

    Args:
        input: [N, C, H, W] features y, N = clips * frames with frame t of clip b in row b * frames + t.
        policy: integer [N, C] of `Policy` values, or floating point [N, C, 3] weights in the order keep,
            reuse, skip, which get gradients and are converted to the input's dtype. The kernels do not read
            the features that a weight of exactly 0 belongs to, so non-finite ones do not spread there.
        frames: clip length T.

    Returns:
        [N, C, H, W] in the input's dtype and memory format.

    Raises:
        ValueError, TypeError: for a wrong rank, shape, dtype, device or range, or a policy value outside
            0..2 (looked at on the CPU always, elsewhere with `ADAKERNELS_DEBUG=1`).
    """
    backend = _plan("temporal_fuse", input, policy, frames)
    # The kernels for the CPU look at the values themselves, those for GPUs do not.
    if not is_soft(policy) and (backend == "reference" or _checks.debugging()):
        policy = checked_policy(policy, "temporal_fuse", "policy")
    if backend == "reference":
        return dense(temporal_fuse_reference(input, policy, frames=frames), like=input)
    policy = policy.to(input.dtype).contiguous() if is_soft(policy) else as_index(policy)
    return call(_operator, dense(input), policy, frames)


@backends.explains(temporal_fuse)
def _explain(input: Tensor, policy: Tensor, *, frames: int) -> Mapping[str, backends.Predicate]:
    what = facts("temporal_fuse", "input", input), facts("temporal_fuse", "policy", policy)
    _check(*what, frames)
    return _predicates(what[0])

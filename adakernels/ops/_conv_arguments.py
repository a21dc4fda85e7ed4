"""Validation and normal form of what every convolution takes, for any number of spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling

from adakernels import backends
from adakernels.ops import _checks
from adakernels.ops._checks import Facts
from adakernels.ops._layout import empty_in_format

ACTIVATIONS = (None, "relu", "relu6", "silu")
_SPATIAL = {2: ("H, W", "kh, kw"), 3: ("T, H, W", "kt, kh, kw")}


class ConvArguments(NamedTuple):
    """A convolution's arguments with every one of them spelled out.

    Attributes:
        stride, padding, dilation: one number per spatial dimension; padding is symmetric.
        groups: number of channel groups.
        pad: what `padding="same"` puts at one end only, as for `F.pad`; empty for none.
        activation: index into `ACTIVATIONS`.
        output: spatial size of the output.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...]
    activation: int
    output: tuple[int, ...]


def conv_arguments(
    op: str,
    input: Facts,
    weight: Facts,
    bias: Facts | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
    rank: int,
    unchecked: int = 0,
) -> ConvArguments:
    """Check a convolution over `rank` spatial dimensions and bring its arguments to normal form.

    Of the first `unchecked` of these the sizes are not known; `output` means nothing there.

    Raises:
        ValueError, TypeError: a sentence that names the operator, the argument, what it should be and what
            it is.
    """
    _, kernel = _SPATIAL[rank]
    check_operands(op, input, weight, rank)
    groups = _checks.integer(op, "groups", groups, 1)
    channels, out_channels = input[0][1], weight[0][0]
    _checks.check_value(
        channels % groups == 0 and out_channels % groups == 0,
        lambda: f"{op}: expected groups to divide C_in = {channels} and C_out = {out_channels}, got {groups}",
    )
    _checks.check_value(
        weight[0][1] * groups == channels,
        lambda: (
            f"{op}: expected weight of shape [C_out, C_in/groups, {kernel}] with C_in/groups = "
            f"{channels // groups}, got {list(weight[0])}"
        ),
    )
    if bias is not None:
        _checks.check_shape(op, "bias", bias[0], (out_channels,), "C_out")
        _checks.check_same(op, "bias", bias, "input", input)
    strides = _checks.per_dimension(op, "stride", stride, rank, 1)
    dilations = _checks.per_dimension(op, "dilation", dilation, rank, 1)
    reach = tuple(d * (k - 1) for d, k in zip(dilations, weight[0][2:], strict=True))
    paddings, pad = _padding(op, padding, strides, reach, rank)
    padded = tuple(size + 2 * p for size, p in zip(input[0][2:], paddings, strict=True))
    if pad:
        padded = tuple(size + extra for size, extra in zip(padded, reversed(pad[1::2]), strict=True))
    _checks.check_value(
        all(size > r for size, r in zip(padded[unchecked:], reach[unchecked:], strict=True)),
        lambda: (
            f"{op}: expected a kernel no larger than the padded input, got a kernel reaching over "
            f"{[r + 1 for r in reach[unchecked:]]} and a padded input of {list(padded[unchecked:])}"
        ),
    )
    _checks.check_value(
        activation is None or (isinstance(activation, str) and activation in ACTIVATIONS),
        lambda: f"{op}: expected activation None, 'relu', 'relu6' or 'silu', got {activation!r}",
    )
    output = tuple((size - r - 1) // s + 1 for size, r, s in zip(padded, reach, strides, strict=True))
    return ConvArguments(strides, paddings, dilations, groups, pad, ACTIVATIONS.index(activation), output)


def check_operands(op: str, input: Facts, weight: Facts, rank: int) -> None:
    """Check a convolution's input and weight as far as each can be wrong for itself."""
    image, kernel = _SPATIAL[rank]
    _checks.check_float(op, "input", input[1])
    _checks.check_rank(op, "input", input[0], f"N, C_in, {image}" if rank == 2 else f"B, C_in, {image}")
    _checks.check_rank(op, "weight", weight[0], f"C_out, C_in/groups, {kernel}")
    _checks.check_same(op, "weight", weight, "input", input)
    _checks.check_value(
        all(size >= 1 for size in weight[0]),
        lambda: f"{op}: expected weight without empty dimensions, got shape {list(weight[0])}",
    )


_CAN_RUN = {
    "cuda": backends.can_run_cuda,
    "triton": backends.can_run_triton,
    "cpu": backends.can_run_cpu,
}


def can_run(backend: str, op: str, input: Facts, groups: int, *, raise_error: bool = False) -> bool:
    """Whether a backend's kernels can run a convolution on such tensors, of one channel group or one each."""
    if not _CAN_RUN[backend](op, input[2], input[1], raise_error=raise_error):
        return False
    reason = f"it takes groups = 1 or C_in = {input[0][1]}, not {groups}"
    return groups in (1, input[0][1]) or backends.refuse(op, backend, reason, raise_error)


def can_run_on(op: str, input: Facts, groups: int) -> dict[str, backends.Predicate]:
    """`can_run` of every backend."""
    return {name: partial(can_run, name, op, input, groups) for name in _CAN_RUN}


def conv_predicates(op: str, input: Facts, weight: Facts, groups: int) -> Mapping[str, backends.Predicate]:
    """The same in the order in which they are to be tried."""
    return backends.in_order(op, can_run_on(op, input, groups), input, weight[0], groups)


def empty_output(
    input: Tensor,  # [N, C_in, ...]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_channels: int | None = None,
) -> Tensor:  # [N, C_out, ...]
    """What a convolution's output is before it is filled: of the input's dtype and memory format.

    `out_channels` stands for C_out where it is given.
    """
    size = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(input.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    channels = weight.shape[0] if out_channels is None else out_channels
    return empty_in_format(input, (input.shape[0], channels, *size))


def empty_gradients(
    input: Tensor,  # [N, C_in, ...]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    grad_input: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a convolution's gradients are before they are filled; [0] for one that is not wanted."""
    return (
        empty_in_format(input, input.shape if grad_input else (0,)),
        weight.new_empty(weight.shape if grad_weight else (0,)),
        weight.new_empty(weight.shape[:1] if grad_bias else (0,)),
    )


def dense_flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    """The dense count of a convolution, a multiply-add as two, for `flop_formula`."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


def dense_backward_flops(
    grad_shape: Sequence[int],
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """The same for its gradients, of an operator whose last arguments say which of the three are wanted."""
    grad_input, grad_weight = args[-3:-1]
    return (grad_input + grad_weight) * 2 * math.prod(grad_shape) * math.prod(weight_shape[1:])


def activate(input: Tensor, activation: str | None, inplace: bool = False) -> Tensor:
    """Apply an activation by name."""
    if activation == "relu":
        return F.relu(input, inplace)
    if activation == "relu6":
        return F.relu6(input, inplace)
    if activation == "silu":
        return F.silu(input, inplace)
    return input


def kept_output(output: Tensor, activation: str | None) -> Tensor | None:
    """What `before_activation` wants kept of an activation's result."""
    return output if activation in ("relu", "relu6") else None


def before_activation(
    grad: Tensor,  # [N, C_out, ...]
    activation: str | None,
    output: Tensor | None,  # [N, C_out, ...]
    linear: Callable[[], Tensor],
) -> Tensor:  # [N, C_out, ...]
    """The gradient of an activation's argument, from its result `output` or, for "silu", from `linear()`."""
    result: Tensor = grad
    if activation == "relu":
        result = torch.ops.aten.threshold_backward(grad, output, 0)
    elif activation == "relu6":
        result = torch.ops.aten.hardtanh_backward(grad, output, 0, 6)
    elif activation == "silu":
        result = torch.ops.aten.silu_backward(grad, linear())
    return result


def autocast(*arguments: Any) -> tuple[Any, ...]:
    """The arguments in autocast's dtype, where it is on for the device of the first one, the input."""
    # Mostly one question is enough: to Python that the caches have lost, each one takes microseconds.
    if not is_compiling() and not _is_any_autocast_enabled():
        return arguments
    input = arguments[0]
    if not isinstance(input, Tensor):  # refused later
        return arguments
    kind = input.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return arguments
    dtype = torch.get_autocast_dtype(kind)

    def cast(argument: Any) -> Any:
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64:
            return argument.to(dtype)
        return argument

    return tuple(map(cast, arguments))


def _padding(
    op: str, padding: Any, stride: tuple[int, ...], reach: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not isinstance(padding, str):
        return _checks.per_dimension(op, "padding", padding, rank, 0), ()
    _checks.check_value(
        padding in ("same", "valid"),
        lambda: f"{op}: expected padding to be numbers, 'same' or 'valid', got {padding!r}",
    )
    if padding == "valid":
        return (0,) * rank, ()
    _checks.check_value(
        all(s == 1 for s in stride),
        lambda: f"{op}: expected stride 1 with padding='same', got {list(stride)}",
    )
    if all(r % 2 == 0 for r in reach):
        return tuple(r // 2 for r in reach), ()
    # As torch does: the odd row or column goes to the far end.
    return tuple(r // 2 for r in reach), tuple(x for r in reversed(reach) for x in (0, r % 2))

"""Validation shared by the operators. It works on facts (shape, dtype, device), so results can be cached."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from adakernels import backends
from adakernels.ops._library import library

R = TypeVar("R")
Facts: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_value(condition: bool, message: Callable[[], str]) -> None:
    """Raise `ValueError` with the message where the condition does not hold."""
    # Decided here, since torch can't trace a message about symbolic sizes.
    if not condition:
        torch._check_value(False, message)


def check_type(condition: bool, message: Callable[[], str]) -> None:
    """Raise `TypeError` with the message where the condition does not hold."""
    if not condition:
        torch._check_type(False, message)


def facts(op: str, name: str, tensor: Any) -> Facts:
    """Shape, dtype and device of an argument, which must be a tensor."""
    if not isinstance(tensor, Tensor):
        check_type(False, lambda: f"{op}: expected {name} to be a Tensor, got {type(tensor).__name__}")
    return tensor.shape, tensor.dtype, tensor.device


def optional_facts(op: str, name: str, tensor: Any) -> Facts | None:
    """As `facts`, for an argument that may be None."""
    return None if tensor is None else facts(op, name, tensor)


def check_rank(op: str, name: str, shape: torch.Size, letters: str) -> None:
    """`letters` names the dimensions, such as "N, C_in, H, W"."""
    rank = letters.count(",") + 1
    check_value(
        len(shape) == rank,
        lambda: f"{op}: expected {name} of rank {rank} [{letters}], got shape {list(shape)}",
    )


def check_shape(op: str, name: str, shape: torch.Size, expected: Sequence[int], letters: str) -> None:
    check_value(
        tuple(shape) == tuple(expected),
        lambda: f"{op}: expected {name} of shape [{letters}] = {list(expected)}, got {list(shape)}",
    )


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    check_type(
        dtype in FLOATS,
        lambda: (
            f"{op}: expected {name} of dtype float32, float64, float16 or bfloat16, got {dtype_name(dtype)}"
        ),
    )


def check_integer(op: str, name: str, dtype: torch.dtype) -> None:
    check_type(
        dtype in INTEGERS, lambda: f"{op}: expected {name} of an integer dtype, got {dtype_name(dtype)}"
    )


def check_same(op: str, name: str, tensor: Facts, other_name: str, other: Facts, dtype: bool = True) -> None:
    """Same device and, unless told otherwise, same dtype as another tensor."""
    check_value(
        tensor[2] == other[2],
        lambda: f"{op}: expected {name} on the device of {other_name}, '{other[2]}', got '{tensor[2]}'",
    )
    check_type(
        not dtype or tensor[1] == other[1],
        lambda: (
            f"{op}: expected {name} of the dtype of {other_name}, {dtype_name(other[1])}, "
            f"got {dtype_name(tensor[1])}"
        ),
    )


def integer(op: str, name: str, value: Any, least: int) -> int:
    """The value, which must be an int of at least `least`."""
    check_type(
        isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool),
        lambda: f"{op}: expected {name} to be an int, got {type(value).__name__}",
    )
    check_value(value >= least, lambda: f"{op}: expected {name} of at least {least}, got {value}")
    return value


def per_dimension(op: str, name: str, value: Any, rank: int, least: int) -> tuple[int, ...]:
    """`rank` ints of at least `least`, from that many or from one for all."""
    if not isinstance(value, (tuple, list)):
        return (integer(op, name, value, least),) * rank
    check_value(
        len(value) == rank,
        lambda: f"{op}: expected {name} to be an int or {rank} of them, got {len(value)}",
    )
    return tuple(integer(op, name, v, least) for v in value)


# An operator, so that the check also runs inside a compiled graph.
library.define("checked_range(Tensor values, SymInt end, str sentence) -> Tensor")


@torch.library.impl(library, "checked_range", "CompositeExplicitAutograd")
def _checked_range(values: Tensor, end: int, sentence: str) -> Tensor:
    readable = values.device.type == "cpu" or debugging()
    if readable and values.numel() > 0:
        least, most = (int(value) for value in values.aminmax())
        check_value(
            least >= 0 and most < end,
            lambda: f"{sentence.format(end - 1)}, got {least if least < 0 else most}",
        )
    return values.to(torch.int64, copy=True)


@torch.library.register_fake("adakernels::checked_range", lib=library)
def _checked_range_fake(values: Tensor, end: int, sentence: str) -> Tensor:
    return torch.empty_like(values, dtype=torch.int64)


def debugging() -> bool:
    """Whether to look at numbers that only the device knows, which makes the host wait for it."""
    return os.environ.get("ADAKERNELS_DEBUG") == "1"


def checked_range(values: Tensor, end: int, sentence: str) -> Tensor:
    """Integers as int64, which must be in 0..end - 1: looked at on the CPU always, elsewhere with
    `ADAKERNELS_DEBUG=1`. The error is `sentence`, formatted with end - 1, and the number that is wrong."""
    return torch.ops.adakernels.checked_range.default(values, end, sentence)


# The same for weights that must not be negative.
library.define("checked_weights(Tensor values, str sentence) -> Tensor")


@torch.library.impl(library, "checked_weights", "CompositeExplicitAutograd")
def _checked_weights(values: Tensor, sentence: str) -> Tensor:
    readable = values.device.type == "cpu" or debugging()
    if readable and values.numel() > 0:
        wrong = values[~(values >= 0)]
        check_value(wrong.numel() == 0, lambda: f"{sentence}, got {wrong[0].item():g}")
    return values.clone()


@torch.library.register_fake("adakernels::checked_weights", lib=library)
def _checked_weights_fake(values: Tensor, sentence: str) -> Tensor:
    return torch.empty_like(values)


torch.library.register_autograd("adakernels::checked_weights", lambda ctx, grad: (grad, None), lib=library)


def checked_weights(values: Tensor, op: str, name: str) -> Tensor:
    """A copy of weights that must not be negative, nor NaN: looked at on the CPU always, elsewhere with
    `ADAKERNELS_DEBUG=1`."""
    sentence = f"{op}: expected {name} of non-negative weights"
    return torch.ops.adakernels.checked_weights.default(values, sentence)


def check_frames(op: str, frames: Any, batch: int) -> None:
    """`frames` is the clip length T: an int of at least 1 that divides the batch."""
    check_type(
        isinstance(frames, int) and not isinstance(frames, bool),
        lambda: f"{op}: expected frames to be an int, got {type(frames).__name__}",
    )
    check_value(frames >= 1, lambda: f"{op}: expected frames of at least 1, got {frames}")
    check_value(
        batch % frames == 0,
        lambda: f"{op}: expected a batch of whole clips of frames = {frames}, got N = {batch}",
    )


def check_channel_policy(
    op: str, name: str, policy: Facts, input: Facts, channels: int, letter: str, *, soft: bool
) -> None:
    """Integer [N, C] or, with `soft`, floating point [N, C, 3], on the input's device."""
    batch = input[0][0]
    if soft and policy[1].is_floating_point:
        check_shape(op, f"float {name}", policy[0], (batch, channels, 3), f"N, {letter}, 3")
    else:
        check_integer(op, name, policy[1])
        check_shape(op, name, policy[0], (batch, channels), f"N, {letter}")
    check_same(op, name, policy, "input", input, dtype=False)


# Immutable types, compared by value.
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format})
_REMEMBERED = 4096
_NOTHING: Any = object()


def planned(*names: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorator for what validates a call and plans it from static facts, which are the same for many calls.

    The function takes the requested backend, the operator's name, for each of `names` the facts of the
    tensor of that name ("bias?": or None), and any other arguments. What comes of it takes the name, the
    tensors and the other arguments, and remembers the results outside of compilation.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        results: dict[tuple[Any, ...], R] = {}

        def plan(requested: str, op: str, arguments: tuple[Any, ...]) -> R:
            tensors = [
                None if name[-1] == "?" and tensor is None else facts(op, name.rstrip("?"), tensor)
                for name, tensor in zip(names, arguments, strict=False)
            ]
            return function(requested, op, *tensors, *arguments[len(names) :])

        @wraps(function)
        def call(op: str, *arguments: Any) -> R:
            requested = backends.requested_backend()  # once: another thread may ask for another one meanwhile
            if is_compiling():
                return plan(requested, op, arguments)
            # In one loop of few words: the caches have often lost everything that Python needs for a call.
            parts: list[Any] = [requested, op]
            for argument in arguments:
                kind = type(argument)
                if kind is Tensor or kind is Parameter:
                    parts += argument.shape, argument.dtype, argument.device
                elif kind in _PLAIN:
                    parts += kind, argument  # 1 is also 1.0 and True
                elif kind is tuple and _holds_integers(argument):
                    parts.append(argument)
                else:  # lists, symbolic sizes, other kinds of tensors
                    return plan(requested, op, arguments)
            key = tuple(parts)
            try:
                result = results.get(key, _NOTHING)
            except TypeError:  # the shape of a tensor has symbolic sizes
                return plan(requested, op, arguments)
            if result is _NOTHING:
                result = plan(requested, op, arguments)
                if len(results) >= _REMEMBERED:
                    results.clear()
                results[key] = result
            return result

        return call

    return decorate


def _holds_integers(values: tuple[Any, ...]) -> bool:
    """Whether there are no numbers in it but ints, so that it only equals what is the same."""
    for value in values:
        if type(value) is not int and not (type(value) is tuple and _holds_integers(value)):
            return False
    return True


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")

"""Which implementation runs an operator: the choice, how to force it, and why it fell as it did.

Every operator has a reference in plain PyTorch and may have faster backends. Under `"auto"` the first of
`"cuda"`, `"triton"`, `"cpu"` whose predicate accepts the call runs, else the reference; where `configs` has
measurements of that GPU, the faster of `"cuda"` and `"triton"` comes first. The choice rests on static facts
only (shapes, dtypes, devices, arguments), never on what a tensor contains.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from adakernels import _extension

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
ON_GPU = ("cuda", "triton")
MEASURED = Path(__file__).with_name("configs")
"""`<device>.json` says which backend was the fastest: {"fastest": {operator: {class of shapes: backend}}}."""

# Frames of up to so many pixels are a class of their own: a tile of the output has several of them.
_SMALL_MAP = 256
_WHY_NO_TRITON = "" if importlib.util.find_spec("triton") else "triton is not installed"

logger = logging.getLogger("adakernels")


def _check_name(source: str, name: str) -> str:
    torch._check_value(name in NAMES, lambda: f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


_requested = _check_name("ADAKERNELS_BACKEND", os.environ.get("ADAKERNELS_BACKEND", "auto"))


def requested_backend() -> str:
    """The backend that the innermost `use_backend`, or else `ADAKERNELS_BACKEND`, asks for."""
    return _requested


class use_backend:
    """Context manager that fixes the backend of every operator called inside, in all threads.

    Args:
        name: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`. With a name other than `"auto"` and
            `"reference"`, a call which that backend cannot run raises `ValueError` and says why.

    Raises:
        ValueError: for any other name.
    """

    def __init__(self, name: str) -> None:
        self.name = _check_name("use_backend", name)
        self._outer: list[str] = []

    def __enter__(self) -> use_backend:
        global _requested
        self._outer.append(_requested)
        _requested = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._outer.pop()


class Predicate(Protocol):
    """Whether one backend can run one call. Where not, raises or logs the reason, the same sentence."""

    def __call__(self, *, raise_error: bool = False) -> bool: ...


def refuse(op: str, backend: str, reason: str, raise_error: bool) -> bool:
    """Report that `backend` cannot run a call of `op`: raise `ValueError` if asked to, else log it; False."""
    sentence = f"{op}: backend '{backend}' cannot run this call: {reason}"
    torch._check_value(not raise_error, lambda: sentence)
    if not torch.compiler.is_compiling():
        logger.debug(sentence)
    return False


def can_run_cpu(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    *,
    raise_error: bool = False,
) -> bool:
    """The part of every CPU predicate that depends on the operator in its name and `dtypes` only."""
    if not _extension.has_cpu:
        return refuse(
            op, "cpu", f"the compiled extension is not available: {_extension.why_not}", raise_error
        )
    if device.type != "cpu":
        return refuse(op, "cpu", f"the tensors are on '{device}'", raise_error)
    if dtype not in dtypes:
        return refuse(op, "cpu", _why_not_dtype(dtype, dtypes), raise_error)
    return True


def _why_not_dtype(dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str:
    *names, last, other = (str(d).removeprefix("torch.") for d in (*dtypes, dtype))
    return f"it has {', '.join(names)} and {last} kernels, not {other}"


def can_run_triton(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    *,
    raise_error: bool = False,
) -> bool:
    """The part of every operator's Triton predicate that does not depend on it but for its `dtypes`."""
    reason = _why_not_on_gpu(device, dtype, dtypes) or _WHY_NO_TRITON
    return not reason or refuse(op, "triton", reason, raise_error)


def can_run_cuda(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    *,
    raise_error: bool = False,
) -> bool:
    """The part of every operator's CUDA predicate that does not depend on it but for its `dtypes`."""
    reason = _why_not_on_gpu(device, dtype, dtypes)
    if not reason and not _extension.has_cuda:
        reason = f"the CUDA kernels are not available: {_extension.why_not_cuda}"
    return not reason or refuse(op, "cuda", reason, raise_error)


def _why_not_on_gpu(device: torch.device, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str:
    if device.type != "cuda":
        return f"the tensors are on '{device}'"
    if dtype not in dtypes:
        return _why_not_dtype(dtype, dtypes)
    return _why_not_this_gpu(device.index or 0)


def _why_not_this_gpu(index: int) -> str:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"it needs a GPU of compute capability 8.0 or newer, not {major}.{minor}"
    return ""


_Facts = tuple[Sequence[int], torch.dtype, torch.device]


def device_file(name: str) -> str:
    """What the files are called that hold measurements of a device: of "NVIDIA H200", nvidia-h200.json."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def shape_class(
    dtype: torch.dtype, input: Sequence[int], weight: Sequence[int] | None = None, groups: int = 1
) -> str:
    """What measurements of an operator are told apart by: number format, kernel size and size of the map.

    Args:
        dtype: of the features.
        input: their shape, [N, C, H, W] or [B, C, T, H, W].
        weight: shape of the weight of a convolution.
        groups: of the convolution.
    """
    words = [f"{8 * dtype.itemsize} bits"]
    if weight is not None:
        words += ["depthwise"] if groups > 1 else []
        words += ["x".join(str(size) for size in weight[2:])]
        words += ["small map" if input[-2] * input[-1] <= _SMALL_MAP else "large map"]
    return ", ".join(words)


@cache
def _fastest(device: torch.device) -> tuple[Mapping[str, Mapping[str, str]], str]:
    """What was measured on a device: by operator and class of shapes, the fastest backend; and its name."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}, ""
    name = torch.cuda.get_device_name(device)
    file = MEASURED / device_file(name)
    return (json.loads(file.read_text())["fastest"] if file.exists() else {}), name


def _order_on_gpu(op: str, input: _Facts, *conv: Any) -> tuple[Sequence[str], str]:
    """The backends for a GPU in order of preference, and what the first one has that the others have not."""
    shape, dtype, device = input
    classes, name = _fastest(device)
    if op in classes:
        first = classes[op].get(shape_class(dtype, shape, *conv))
        if first is not None:
            return sorted(ON_GPU, key=lambda other: other != first), f"was measured to be faster on {name}"
    return ON_GPU, "comes first"


class Predicates(dict[str, Predicate]):
    """A call's predicates by backend, in order of preference.

    Attributes:
        why: what the first one for GPUs has that the others have not, to be read after its name.
    """

    why = "comes first"


def in_order(op: str, predicates: Mapping[str, Predicate], input: _Facts, *conv: Any) -> Predicates:
    """The predicates with those of GPU backends in the order that measurements ask for.

    Args:
        op: name of the operator.
        predicates: by backend.
        input: shape, dtype and device of its features.
        *conv: of a convolution, the shape of the weight and the groups.
    """
    order, why = _order_on_gpu(op, input, *conv)
    ordered = Predicates({name: predicates[name] for name in order if name in predicates})
    ordered.update(predicates)
    ordered.why = why
    return ordered


def gpu_backend(op: str, input: _Facts, *conv: Any) -> str:
    """The backend that runs an operator which was given CUDA tensors."""
    if requested_backend() in ON_GPU:
        return requested_backend()
    return _order_on_gpu(op, input, *conv)[0][0] if _extension.has_cuda else "triton"


def choose(requested: str, predicates: Mapping[str, Predicate]) -> str:
    """The backend for a call, given the one asked for and the predicates in order of preference.

    No predicates at all mean that torch's own operators do the call, whatever is asked for.
    """
    if requested == "reference" or not predicates:
        return "reference"
    if requested != "auto":
        predicates[requested](raise_error=True)
        return requested
    for name, can_run in predicates.items():
        if can_run():
            return name
    return "reference"


def available_backends() -> dict[str, str]:
    """Every backend with the reason why it can't run anything here, `""` where it can."""
    return {
        "reference": "",
        "cpu": "" if _extension.has_cpu else f"the compiled extension is not available: {_extension.why_not}",
        "triton": _why_not_this_gpu(0) or _WHY_NO_TRITON,
        "cuda": _why_not_this_gpu(0)
        or ("" if _extension.has_cuda else f"the CUDA kernels are not available: {_extension.why_not_cuda}"),
    }


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is the answer in words.

    Attributes:
        op: name of the operator.
        backend: the backend that would run, None where the one asked for can't.
        reasons: for every other backend, why it would not run.
    """

    op: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        first = f"{self.op}: runs on '{self.backend}'" if self.backend else f"{self.op}: raises ValueError"
        return "\n".join([first, *(f"  not {name}: {reason}" for name, reason in self.reasons.items())])


_predicates: dict[Callable[..., Any], Callable[..., Mapping[str, Predicate]]] = {}


def explains(
    op: Callable[..., Any],
) -> Callable[[Callable[..., Mapping[str, Predicate]]], Callable[..., Mapping[str, Predicate]]]:
    """Decorator: the function takes the arguments of `op` and gives its predicates in order of preference."""

    def register(function: Callable[..., Mapping[str, Predicate]]) -> Callable[..., Mapping[str, Predicate]]:
        _predicates[op] = function
        return function

    return register


def _why_first(predicates: Mapping[str, Predicate], chosen: str, other: str) -> str:
    on_gpu = chosen in ON_GPU and other in ON_GPU
    return predicates.why if on_gpu and isinstance(predicates, Predicates) else Predicates.why


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run `op(*args, **kwargs)` and why each other would not, without running it.

    Args:
        op: an operator of this package, such as `adakernels.gated_conv2d`.
        *args, **kwargs: its arguments; bad ones raise what the call itself would raise.

    Raises:
        ValueError: if `op` is not an operator of this package.
    """
    torch._check_value(op in _predicates, lambda: f"explain: expected an operator of adakernels, got {op!r}")
    name = op.__name__
    requested = requested_backend()
    reasons: dict[str, str] = {}
    chosen: str | None = None
    predicates = _predicates[op](*args, **kwargs)
    if not predicates:
        own = "this call needs no kernel, torch's own operators do it"
        return Explanation(name, "reference", dict.fromkeys(("cuda", "triton", "cpu"), own))
    for backend, can_run in predicates.items():
        try:
            can_run(raise_error=True)
        except ValueError as error:
            reasons[backend] = str(error).split(": ", 2)[2]
            continue
        if requested not in ("auto", backend):
            reasons[backend] = f"backend '{requested}' is asked for"
        elif chosen is not None:
            reasons[backend] = f"'{chosen}' {_why_first(predicates, chosen, backend)}"
        else:
            chosen = backend
    if requested in ("auto", "reference") and chosen is None:
        chosen = "reference"
    else:
        reasons["reference"] = (
            f"'{chosen}' comes first" if requested == "auto" else f"backend '{requested}' is asked for"
        )
    return Explanation(name, chosen, reasons)

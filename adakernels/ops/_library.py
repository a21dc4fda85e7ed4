"""The dispatcher namespace that the operators are declared in, and how they are called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.library import Library

from adakernels import backends

library = Library("adakernels", "DEF")
_cuda_library = Library("adakernels_cuda", "DEF")

gpu_operators: list[str] = []
"""The operators that have GPU kernels, in CUDA and in Triton."""

# What the CUDA kernels have been told.
_multiplies_exactly = True

_flop_formulas: dict[Any, Callable[..., int]] = {}
_functions: dict[Any, type[torch.autograd.Function]] = {}


def run_on_gpu(*names: str) -> None:
    """Hand these operators, when they are given CUDA tensors, to the kernels of the same name.

    Those are either the operator of that name and schema in the namespace `adakernels_cuda`, which
    `_cuda_ops.so` implements, or the function of that name and those arguments in `adakernels.triton`.
    """
    for name in names:
        schema = str(getattr(torch.ops.adakernels, name).default._schema)
        _cuda_library.define(schema.removeprefix("adakernels::"))
        library.impl(name, _gpu_entry(name), "CUDA")
        gpu_operators.append(name)


def _gpu_entry(name: str) -> Callable[..., Any]:
    compiled = getattr(torch.ops.adakernels_cuda, name).default
    names = [argument.name for argument in compiled._schema.arguments]
    of_a_convolution = "weight" in names and "groups" in names
    first = names.index("input") if "input" in names else 0

    def entry(*args: Any) -> Any:
        input = args[first]
        conv = (args[names.index("weight")].shape, args[names.index("groups")]) if of_a_convolution else ()
        facts = (input.shape, input.dtype, input.device)
        if backends.gpu_backend(name, facts, *conv) == "cuda":
            _hand_over_precision()
            return compiled(*args)
        # Imports Triton, which takes a while.
        from adakernels import triton

        with torch.cuda.device_of(args[0]):
            return getattr(triton, name)(*args)

    return entry


def _hand_over_precision() -> None:
    """Tell the CUDA kernels how torch is to multiply float32; its stable interface does not tell them."""
    global _multiplies_exactly
    exactly = torch.get_float32_matmul_precision() == "highest"
    if exactly != _multiplies_exactly:
        torch.ops.adakernels_cuda.multiply_exactly(exactly)
        _multiplies_exactly = exactly


def flop_formula(op: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: an operator's dense count for `torch.utils.flop_counter`, where shapes stand for tensors."""

    def keep(formula: Callable[..., int]) -> Callable[..., int]:
        _flop_formulas[op] = formula
        return formula

    return keep


def register_gradient(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    made_by: Sequence[str] = (),
) -> None:
    """Give an operator its gradient: for the dispatcher, as `torch.library` does, and for `call`.

    The operators that make it, `made_by` (default: `<name>_backward`), refuse to have one themselves.
    """

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: no second derivative; adakernels.use_backend('reference') has it")

    for maker in made_by or (f"{name}_backward",):
        torch.library.register_autograd(f"adakernels::{maker}", refuse, lib=library)
    torch.library.register_autograd(f"adakernels::{name}", backward, setup_context=setup_context, lib=library)
    op = getattr(torch.ops.adakernels, name).default
    methods = {
        "forward": staticmethod(partial(below_autograd, op)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    _functions[op] = type(name, (torch.autograd.Function,), methods)


def call(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """Call an operator. The dispatcher's way to a gradient in Python costs more than a small kernel does.

    Callers look the operator up once, at import: that takes microseconds where caches are cold.
    """
    if is_compiling():
        return op(*args)
    if _flop_formulas:
        _hand_over_flop_formulas()
    if torch.is_grad_enabled():
        return _functions[op].apply(*args) if op in _functions else op(*args)
    if torch.is_inference_mode_enabled():  # below autograd already
        return op(*args)
    return below_autograd(op, *args)


def is_observed() -> bool:
    """Whether something records, counts or transforms the operators that are called."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def below_autograd(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Call an operator without recording for backward."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _hand_over_flop_formulas() -> None:
    # That module imports Triton, so it is left to whoever counts to import it.
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is not None:
        while _flop_formulas:
            op, formula = _flop_formulas.popitem()
            counter.register_flop_formula(op)(formula)

"""Batch normalisation folded into the linear operator before it, and the cache of such derived tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_T = TypeVar("_T")

_BATCH_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def is_foldable(norm: nn.Module) -> bool:
    """Whether `norm` is a batch normalisation that uses its running statistics, hence a fixed affine map."""
    return (
        isinstance(norm, _BatchNorm)
        and type(norm).forward in _BATCH_NORM_FORWARDS
        and not norm.training
        and norm.running_mean is not None
    )


def is_parametrised(module: nn.Module) -> bool:
    """Whether weight or bias of a convolution or a norm are made anew for every call."""
    return "weight" not in module._parameters or "bias" not in module._parameters


def fold_batch_norm(
    weight: Tensor,  # [C_out, ...]
    bias: Tensor | None,  # [C_out]
    norm: _BatchNorm,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the operator that equals `norm` (with running statistics) after (`weight`, `bias`).

    Differentiable in all of them; computed in at least float32, returned in the dtype of `weight`.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype) if bias is None else bias.to(dtype) - norm.running_mean.to(dtype)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    folded = weight.to(dtype) * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


def norm_tensors(norm: _BatchNorm) -> tuple[Tensor | None, ...]:
    """All that a change of `norm` shows in."""
    # The batch count is here because an update of running statistics does not touch their version counters.
    parameters, buffers = norm._parameters, norm._buffers
    if not is_parametrised(norm) and len(buffers) == 3:
        # Looked up as attributes they take 3 µs; a parametrised norm has them nowhere else.
        return parameters["weight"], parameters["bias"], *buffers.values()
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked


class DerivedCache(Generic[_T]):
    """Keeps one value computed from tensors for as long as none of them has changed.

    Changes are seen by the tensors' version counters, addresses and layouts, so in-place edits, optimiser
    steps, `load_state_dict`, `.to()` and replaced parameters are all followed; writes through `tensor.data`,
    NumPy or another process have no counter and need `clear()`. Copies and pickles of a cache are empty.
    """

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        self._entry: tuple[Any, tuple[Tensor, ...], _T] | None = None

    def clear(self) -> None:
        """Forgets the value."""
        self._entry = None

    @property
    def value(self) -> _T | None:
        """The value that is kept, of whatever sources it is."""
        entry = self._entry
        return None if entry is None else entry[2]

    def get(
        self, sources: tuple[Tensor | None, ...], compute: Callable[[], _T], *, tag: Any = None
    ) -> _T | None:
        """The value of `compute()`, from the cache if that ran with the same `sources` and `tag`.

        Returns:
            None, without computing, where the value may not be kept: when it is traced, when it needs a
            gradient, or when the sources have no version counter or address.
        """
        if torch.compiler.is_compiling():
            return None
        graded = torch.is_grad_enabled()
        key = [tag]
        try:
            for tensor in sources:
                if tensor is None:
                    key.append(None)
                    continue
                # Inference tensors have no version counter; to ask for it is slow.
                if (graded and tensor.requires_grad) or tensor.is_inference():
                    return None
                key += tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype
        except RuntimeError:  # wrapped tensors have no address
            return None
        entry = self._entry
        if entry is not None and entry[0] == key:
            return entry[2]
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
            # The aliases keep the storages alive, so that no other tensor can get their addresses.
            aliases = tuple(tensor.detach() for tensor in sources if tensor is not None)
            self._entry = (key, aliases, value)
        return value

    def __reduce__(self) -> tuple[type[DerivedCache[Any]], tuple[()]]:
        return (DerivedCache, ())


FoldCache = DerivedCache[tuple[Tensor, Tensor]]


def folded_batch_norm(
    weight: Tensor,  # [C_out, ...]
    bias: Tensor | None,  # [C_out]
    norm: _BatchNorm,
    cache: FoldCache,
) -> tuple[Tensor, Tensor]:
    """`fold_batch_norm`, from `cache` where that is possible."""
    sources = (weight, bias, *norm_tensors(norm))
    folded = cache.get(sources, lambda: fold_batch_norm(weight, bias, norm), tag=norm.eps)
    return fold_batch_norm(weight, bias, norm) if folded is None else folded

"""Batch normalisation folded into the linear operator before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_BATCH_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def is_foldable(norm: nn.Module) -> bool:
    """Whether `norm` is a batch normalisation that uses its running statistics, hence a fixed affine map."""
    return (
        isinstance(norm, _BatchNorm)
        and type(norm).forward in _BATCH_NORM_FORWARDS
        and not norm.training
        and norm.running_mean is not None
    )


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


class FoldCache:
    """Keeps the last result of `fold_batch_norm` for as long as nothing it was computed from has changed.

    Changes are seen by the tensors' version counters and addresses, so in-place edits, optimiser steps,
    `load_state_dict`, `.to()` and replaced parameters are all followed; writes through `tensor.data` have no
    counter and need `clear()`. A result that needs a gradient, or is traced, is computed anew and not kept.
    Copies and pickles of a cache are empty.
    """

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        self._entry: tuple[Any, tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None

    def clear(self) -> None:
        """Forgets the kept result."""
        self._entry = None

    def fold(
        self,
        weight: Tensor,  # [C_out, ...]
        bias: Tensor | None,  # [C_out]
        norm: _BatchNorm,
    ) -> tuple[Tensor, Tensor]:
        """`fold_batch_norm(weight, bias, norm)`, from the cache where that is possible."""
        if torch.compiler.is_compiling():
            return fold_batch_norm(weight, bias, norm)
        buffers = norm._buffers
        candidates = (
            weight,
            bias,
            norm.weight,
            norm.bias,
            buffers["running_mean"],
            buffers["running_var"],
            # Running statistics are updated without touching their version counters; this one's is.
            buffers["num_batches_tracked"],
        )
        sources = tuple(t for t in candidates if t is not None)
        if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
            return fold_batch_norm(weight, bias, norm)
        try:
            key = (norm.eps, *((t.data_ptr(), t._version) for t in sources))
        except RuntimeError:  # inference tensors have no version counter, wrapped tensors no address
            return fold_batch_norm(weight, bias, norm)
        entry = self._entry
        if entry is not None and entry[0] == key:
            return entry[2]
        with torch.inference_mode(False), torch.no_grad():
            result = fold_batch_norm(weight, bias, norm)
            # The aliases keep the storages alive, so that no other tensor can get their addresses.
            self._entry = (key, tuple(t.detach() for t in sources), result)
        return result

    def __reduce__(self) -> tuple[type[FoldCache], tuple[()]]:
        return (FoldCache, ())

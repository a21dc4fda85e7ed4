"""Fully connected layer with the normalisation after it, made for few rows."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adakernels.nn.folding import DerivedCache, fold_batch_norm, is_foldable, norm_tensors

PackedCache = DerivedCache[tuple[Tensor, Tensor | None]]


def linear_norm_act(
    input: Tensor,  # [N, C_in]
    weight: Tensor,  # [C_out, C_in]
    bias: Tensor | None,  # [C_out]
    norm: nn.Module | None,
    relu: bool,
    cache: PackedCache,
) -> Tensor:
    """relu(norm(linear(input))), [N, C_out].

    In inference on the CPU the normalisation is folded into the weights, and these are kept in oneDNN's
    blocked layout: with few rows the time is that of reading them, which takes twice as long in plain order.
    """
    batch_norm = cast(_BatchNorm, norm) if norm is not None and is_foldable(norm) else None
    if norm is not None and batch_norm is None:
        output = norm(F.linear(input, weight, bias))
        return output.relu_() if relu else output

    def fold() -> tuple[Tensor, Tensor | None]:
        return (weight, bias) if batch_norm is None else fold_batch_norm(weight, bias, batch_norm)

    def pack() -> tuple[Tensor, Tensor | None]:
        folded, shift = fold()
        return torch.ops.mkldnn._reorder_linear_weight(folded.detach()), shift

    if _can_pack(input, weight):
        sources = (weight, bias, *(() if batch_norm is None else norm_tensors(batch_norm)))
        packed = cache.get(sources, pack, tag=None if batch_norm is None else batch_norm.eps)
        if packed is not None:
            return torch.ops.mkldnn._linear_pointwise(input, *packed, "relu" if relu else "none", [], "")
    output = F.linear(input, *fold())
    return output.relu_() if relu else output


def _can_pack(
    input: Tensor,  # [N, C_in]
    weight: Tensor,  # [C_out, C_in]
) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and input.requires_grad)
        and input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.shape[0] > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )

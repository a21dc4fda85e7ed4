"""Multiply-adds of a model's call: what a dense network needs, and what its policies left of that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

counting = False
"""Whether a count is under way; operators look at it before they work out what to `record`."""

_records: list[tuple[str, float, Tensor]] = []


def record(op: str, dense: float, actual: Tensor) -> None:
    """Adds the work of one operator call to the count under way.

    Args:
        op: name of the operator.
        dense: multiply-adds of one row (sample or frame) without any policy; 0 for what only a policy causes.
        actual: [N] multiply-adds done for each row.
    """
    _records.append((op, dense, actual))


def stretch_last(factor: float) -> None:
    """Says of the last recorded operator that dense rows are longer than its own by a factor."""
    op, dense, actual = _records[-1]
    _records[-1] = (op, dense * factor, actual)


def record_dense(op: str, output: Tensor, reduction: int) -> None:
    """Records an operator without policy that sums `reduction` products for each element of `output`."""
    row = float(math.prod(output.shape[1:]) * reduction)
    record(op, row, every_row(output, row))


def every_row(
    tensor: Tensor,  # [N, ...]
    count: float,
) -> Tensor:  # [N]
    """The same count for every row, on the tensor's device unless that keeps no values."""
    return torch.full(tensor.shape[:1], count, dtype=torch.float64, device=_with_values(tensor.device))


def _with_values(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


@dataclass(frozen=True)
class FlopCount:
    """Result of `count_flops`, in the papers' GFLOPs: 1e9 multiply-adds of convolutions and linear layers.

    Attributes:
        dense: of one sample, all policies ignored and the heads that make them left out.
        actual: [B] float64, of each sample under its policies, their heads included.
    """

    dense: float
    actual: Tensor

    def __str__(self) -> str:
        return f"{self.actual.mean().item():.2f} of {self.dense:.2f} GF"


def count_flops(model: nn.Module, *inputs: Any) -> FlopCount:
    """Runs `model(*inputs)` in its present mode, without gradients, and counts its work.

    Counted are the operators of this package, the policy heads, and the convolution and linear modules of
    `torch.nn`; not normalisation, activation and pooling, nor convolutions called as functions of `torch`.

    Args:
        model: any module. A sample is a row of its (first) output: a clip where logits are averaged over
            frames, a frame where they are not.
        inputs: passed on to the model.

    Raises:
        ValueError: if the model gives no batch of tensors.
    """
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _recording(model) as records:
        output = model(*inputs)
    samples = _first_tensor(output)
    if samples is None or samples.dim() == 0:
        raise ValueError("count_flops: expected the model to return a batch of tensors")
    batch = samples.shape[0]
    dense = 0.0
    # Policies of meta tensors have no values, and so no count.
    counted = not any(rows.is_meta for _, _, rows in records)
    device = _with_values(samples.device) if counted else samples.device
    actual = torch.zeros(batch, dtype=torch.float64, device=device)
    if batch > 0:
        for _, row, rows in records:
            dense += row * len(rows) / batch
            actual += _per_sample(rows, batch).to(actual)
    return FlopCount(dense / 1e9, actual / 1e9)


def _per_sample(
    rows: Tensor,  # [N]
    batch: int,
) -> Tensor:  # [B]
    if len(rows) % batch == 0:
        return rows.unflatten(0, (batch, len(rows) // batch)).sum(1)
    # Rows that belong to no one sample are shared by all.
    return (rows.sum() / batch).expand(batch)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((tensor for tensor in map(_first_tensor, output) if tensor is not None), None)
    return None


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[tuple[str, float, Tensor]]]:
    global counting, _records
    outer = counting, _records
    handles = []
    for module in model.modules():
        if isinstance(module, (*_CONVS, nn.Linear)):
            hook = _LayerHook()
            handles.append(module.register_forward_pre_hook(hook.before))
            handles.append(module.register_forward_hook(hook.after))
    counting, _records = True, []
    try:
        yield _records
    finally:
        counting, _records = outer
        for handle in handles:
            handle.remove()


class _LayerHook:
    """Records a layer of `torch.nn`, unless what it called has recorded itself."""

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.start = len(_records)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if len(_records) == self.start:
            assert isinstance(module.weight, Tensor)
            record_dense(type(module).__name__, output, math.prod(module.weight.shape[1:]))

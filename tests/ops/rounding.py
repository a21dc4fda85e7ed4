"""How far a convolution may be from its reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def bound_of(tensor: Tensor | None) -> Tensor | None:
    """Every plane filled with its largest absolute value: Winograd's method rounds values of that size."""
    if tensor is None:
        return None
    tensor = tensor.detach().double().abs()
    return tensor.amax((-2, -1), keepdim=True).expand_as(tensor).clone() if tensor.dim() >= 4 else tensor


def tolerance(dtype: torch.dtype, magnitude: Tensor, rounded: Tensor) -> Tensor:
    """`magnitude` is the sum of the bounds of all that is added, `rounded` of all that is rounded to `dtype`.

    Sums are kept in float32 for both dtypes: of at most a few thousand products, they err by a few eps of
    their magnitude, and 16 leaves room. A rounding errs by half an eps of the value.
    """
    return 16 * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps / 2 * rounded


def assert_within_rounding(got: Tensor, want: Tensor, magnitude: Tensor, rounded: Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    assert got.isfinite().all(), f"{what} is not finite"
    excess = (got.double() - want).abs() - tolerance(got.dtype, magnitude, rounded)
    assert excess.numel() == 0 or excess.max() <= 1e-30, f"{what} is off by {excess.max():.3g} too much"

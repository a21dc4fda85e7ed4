"""What the layers around a convolution share: normalisation, activation, and when they leave it to torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from adakernels import backends, flops
from adakernels.nn.folding import (
    DerivedCache,
    FoldCache,
    fold_batch_norm,
    folded_batch_norm,
    is_foldable,
    is_parametrised,
)
from adakernels.ops._cpu_conv import conv_on_cpu
from adakernels.ops._layout import is_dense
from adakernels.ops._library import is_observed
from adakernels.ops._winograd import KernelSource, Transform, winograd_kernels

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "silu": F.silu,
}


class ConvNormAct(_ConvNd):
    """One of torch's convolutions with a normalisation and an activation after it.

    Args:
        *args, **kwargs: those of the convolution.
        norm: a module, or a callable that makes one from the number of channels.
        activation: a key of `ACTIVATIONS`.

    Raises:
        ValueError: for an unknown activation.
    """

    norm: nn.Module | None

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | Callable[[int], nn.Module] | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if activation not in ACTIVATIONS:
            names = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(
                f"{type(self).__name__}: expected activation to be one of {names}, got {activation!r}"
            )
        if not (norm is None or isinstance(norm, nn.Module)):
            norm = norm(self.out_channels).to(self.weight.device, self.weight.dtype)
        self.norm = norm
        self.activation = activation
        self._folded: FoldCache = FoldCache()
        self._kernels: DerivedCache[dict[Transform, Tensor]] = DerivedCache()

    def train(self, mode: bool = True) -> Any:
        """Sets the mode as `torch.nn.Module.train` does, and drops what was made from the weights so far."""
        self._folded.clear()
        self._kernels.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        """The arguments of the convolution, and the activation if there is one."""
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation}")

    def with_norm(self, norm: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias with `norm` in them; None if that is no fixed map of each channel."""
        if norm is None:
            return self.weight, self.bias
        if not is_foldable(norm):
            return None
        norm = cast(_BatchNorm, norm)
        if is_parametrised(self) or is_parametrised(norm):
            return fold_batch_norm(self.weight, self.bias, norm)
        return folded_batch_norm(self.weight, self.bias, norm, self._folded)

    def suits_cpu_kernel(
        self,
        op: str,
        input: Tensor,  # [N, C_in, ...]
        weight: Tensor,  # [C_out, C_in/groups, ...]
    ) -> bool:
        """Whether the CPU kernel of `op` may run this as a plain convolution, in inference and unobserved."""
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and type(input) is Tensor
            and type(weight) in (Tensor, nn.Parameter)
            and input.is_cpu
            and input.dtype == weight.dtype == torch.float32
            and input.dim() == weight.dim()
            and not torch.is_autocast_enabled("cpu")
            and backends.requested_backend() in ("auto", "cpu")
            and not is_observed()
            and backends.can_run_cpu(op, input.device, input.dtype)
        )

    def conv_act(
        self,
        op: str,
        input: Tensor,  # [N, C_in, H, W] or [B, C_in, T, H, W]
        weight: Tensor,  # [C_out, C_in/groups, ...]
        bias: Tensor | None,  # [C_out]
        activation: str | None,
    ) -> Tensor:
        """`activation(conv(input) + bias)` of everything: by torch, or in inference on the CPU by the fastest
        kernel for it, which may round otherwise."""
        output = self.conv_act_on_cpu(op, input, weight, bias, activation)
        if output is None:
            output = ACTIVATIONS[activation](self._conv_forward(input, weight, bias))
        if flops.counting:
            flops.record_dense(f"conv{len(self.kernel_size)}d", output, math.prod(weight.shape[1:]))
        return output

    def conv_act_on_cpu(
        self,
        op: str,
        input: Tensor,  # [N, C_in, H, W] or [B, C_in, T, H, W]
        weight: Tensor,  # [C_out, C_in/groups, ...]
        bias: Tensor | None,  # [C_out]
        activation: str | None,
    ) -> Tensor | None:
        """As `conv_act`, or None where the CPU's kernels may not run it.

        Packed frames come with their weight without its time dimension.
        """
        if (
            not self.suits_cpu_kernel(op, input, weight)
            or self.padding_mode != "zeros"
            or not is_dense(input)
        ):
            return None
        geometry = self.geometry(weight.dim() - 2)
        return conv_on_cpu(op, input, weight, bias, self._kernels_of_folded, *geometry, activation)

    def kernel_source(
        self,
        op: str,
        input: Tensor,  # [N, C_in, H, W]
        weight: Tensor,  # [C_out, C_in/groups, kh, kw]
    ) -> KernelSource | None:
        """Where the CPU kernel of `op` gets transformed kernels; None where it may not run this."""
        if weight.shape[2:] != (3, 3):  # first what leaves most of the other layers out
            return None
        return self._kernels_of_any if self.suits_cpu_kernel(op, input, weight) else None

    # A weight that is neither the parameter nor folded for many calls is new in every call.

    def _kernels_of_any(self, weight: Tensor, transform: Transform) -> Tensor | None:
        """A `KernelSource`."""
        parameter = self._parameters.get("weight")
        if parameter is not None and weight.data_ptr() == parameter.data_ptr():
            return self._kept_kernels(weight, transform)
        return self._kernels_of_folded(weight, transform)

    def _kernels_of_folded(self, weight: Tensor, transform: Transform) -> Tensor | None:
        """A `KernelSource` for plain calls. Like torch's layers these must see writes to the parameter that
        leave no trace, so nothing of the parameter itself is kept for them."""
        folded = self._folded.value
        if folded is None or weight.data_ptr() != folded[0].data_ptr():
            return None
        return self._kept_kernels(weight, transform)

    def _kept_kernels(
        self,
        weight: Tensor,  # [C_out, C_in, 3, 3]
        transform: Transform,
    ) -> Tensor | None:  # [C_out, points, C_in]
        """`winograd_kernels`, made once and kept for as long as `weight` does not change."""
        kept = self._kernels.get((weight,), dict)
        if kept is None:
            return None
        kernels = kept.get(transform)
        if kernels is None:
            with torch.inference_mode(False), torch.no_grad():
                kernels = kept[transform] = winograd_kernels(weight, transform)
        return kernels

    def geometry(self, rank: int) -> tuple[Any, ...]:
        """Stride, padding and dilation of the last `rank` dimensions, and groups."""
        padding = self.padding if isinstance(self.padding, str) else self.padding[-rank:]
        return self.stride[-rank:], padding, self.dilation[-rank:], self.groups

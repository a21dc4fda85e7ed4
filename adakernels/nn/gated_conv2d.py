"""Convolution whose output channels are kept, reused from the frame before, or skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adakernels import backends, flops
from adakernels.nn.folding import FoldCache, folded_batch_norm, is_foldable
from adakernels.ops import gated_conv2d, temporal_fuse
from adakernels.ops._layout import shares_memory
from adakernels.ops.conv2d_add import conv2d_add_

_Pair: TypeAlias = int | tuple[int, int]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "silu": F.silu,
}


class GatedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that computes, per frame, only the channels a policy asks for (AdaFuse, Eq. 3).

    Takes the constructor arguments of `torch.nn.Conv2d`, has its `state_dict` keys, and is exactly that
    module when called without a policy.

    Args:
        norm: normalisation of the computed features, applied before they are fused over time: a module, or a
            callable that makes one from the number of channels (`torch.nn.BatchNorm2d`). Its keys are
            `norm.*`. A batch normalisation in evaluation mode is folded into the weights.
        activation: None, "relu", "relu6" or "silu", applied after `norm` and before fusion.

    Raises:
        ValueError: for an unknown activation.
    """

    norm: nn.Module | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | str = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: nn.Module | Callable[[int], nn.Module] | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if activation not in ACTIVATIONS:
            names = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(f"GatedConv2d: expected activation to be one of {names}, got {activation!r}")
        if not (norm is None or isinstance(norm, nn.Module)):
            norm = norm(out_channels).to(self.weight.device, self.weight.dtype)
        self.norm = norm
        self.activation = activation
        self._folded: FoldCache = FoldCache()

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d) -> GatedConv2d:
        """A module that computes what `conv` does, with the very same parameters."""
        gated = cls(
            conv.in_channels,
            conv.out_channels,
            cast(_Pair, conv.kernel_size),
            cast(_Pair, conv.stride),
            cast(_Pair, conv.padding),
            cast(_Pair, conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        gated.weight, gated.bias = conv.weight, conv.bias
        gated.training = conv.training
        return gated

    def forward(
        self,
        input: Tensor,  # [N, C_in, H, W]
        policy: Tensor | None = None,  # [N, C_out] integer or [N, C_out, 3] float
        *,
        frames: int = 1,
        in_policy: Tensor | None = None,  # [N, C_in]
    ) -> Tensor:
        """Convolution, normalisation, activation and fusion with the frame before, as `ak.gated_conv2d`.

        Args:
            policy: which channels to keep, reuse or skip; None keeps all.
            frames: frames per clip; row b * frames + t of `input` is frame t of clip b.
            in_policy: input channels marked SKIP are known to be zero and are not read.

        Returns:
            [N, C_out, H', W'].
        """
        return conv_norm_act(
            self, self.norm, self.activation, input, policy, frames=frames, in_policy=in_policy
        )

    def train(self, mode: bool = True) -> GatedConv2d:
        """Sets the mode as `torch.nn.Module.train` does, and drops weights folded so far."""
        self._folded.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        """The arguments of the convolution, and the activation if there is one."""
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation}")


def conv_norm_act(
    conv: GatedConv2d,
    norm: nn.Module | None,
    activation: str | None,
    input: Tensor,  # [N, C_in, H, W]
    policy: Tensor | None = None,  # [N, C_out] integer or [N, C_out, 3] float
    *,
    frames: int = 1,
    in_policy: Tensor | None = None,  # [N, C_in]
) -> Tensor:
    """`temporal_fuse(activation(norm(conv(input))), policy)`, for a norm that `conv` need not hold itself.

    Where `norm` is an affine map with fixed coefficients it is folded into the weights, and only the channels
    that `policy` asks for are computed. Batch statistics need every channel: then the convolution is dense.

    Returns:
        [N, C_out, H', W'].
    """
    if norm is None:
        return _conv_act(conv, conv.weight, conv.bias, activation, input, policy, frames, in_policy)
    if is_foldable(norm):
        weight, bias = folded_batch_norm(conv.weight, conv.bias, cast(_BatchNorm, norm), conv._folded)
        return _conv_act(conv, weight, bias, activation, input, policy, frames, in_policy)
    output = norm(_conv_act(conv, conv.weight, conv.bias, None, input, None, frames, in_policy))
    output = ACTIVATIONS[activation](output)
    return output if policy is None else temporal_fuse(output, policy, frames=frames)


def conv_norm_add_act(
    conv: GatedConv2d,
    norm: nn.Module,
    activation: str | None,
    input: Tensor,  # [N, C_in, H, W]
    residual: Tensor,  # [N, C_out, H', W']
    *,
    in_policy: Tensor | None = None,  # [N, C_in]
    overwrite: bool = False,
) -> Tensor:
    """`activation(norm(conv(input)) + residual)`.

    Args:
        overwrite: `residual` is not needed afterwards, and the result may be written in its place.

    Returns:
        [N, C_out, H', W'].
    """
    if is_foldable(norm) and _can_add_in_place(conv, input, residual):
        weight, bias = folded_batch_norm(conv.weight, conv.bias, cast(_BatchNorm, norm), conv._folded)
        target = residual if overwrite and not shares_memory(residual, input) else residual.clone()
        padding = cast(tuple[int, int], conv.padding)
        return conv2d_add_(
            target, input, weight, bias, in_policy, conv.stride, padding, conv.dilation, activation
        )
    output = conv_norm_act(conv, norm, None, input, in_policy=in_policy)
    return ACTIVATIONS[activation](output.add_(residual))


def _conv_act(
    conv: GatedConv2d,
    weight: Tensor,  # [C_out, C_in / groups, k_h, k_w]
    bias: Tensor | None,  # [C_out]
    activation: str | None,
    input: Tensor,  # [N, C_in, H, W]
    policy: Tensor | None,  # [N, C_out] or [N, C_out, 3]
    frames: int,
    in_policy: Tensor | None,  # [N, C_in]
) -> Tensor:
    if policy is None and in_policy is None and _outruns_torch(conv, input):
        # An input policy that keeps everything changes nothing but the kernel.
        in_policy = torch.zeros(input.shape[:2], dtype=torch.int64)
    if policy is None and in_policy is None:
        output = conv._conv_forward(input, weight, bias)
        if flops.counting:
            flops.record_dense("conv2d", output, math.prod(weight.shape[1:]))
        return ACTIVATIONS[activation](output)
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    return gated_conv2d(
        input,
        weight,
        bias,
        policy,
        frames=frames,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        in_policy=in_policy,
        activation=activation,
    )


def _outruns_torch(
    conv: GatedConv2d,
    input: Tensor,  # [N, C_in, H, W]
) -> bool:
    """Whether the package's kernel is the faster one for a convolution without any policy.

    oneDNN brings planar tensors to a layout of its own: for large 1x1 maps, more work than the convolution.
    """
    return (
        conv.kernel_size == (1, 1)
        and math.prod(input.shape[2:]) // math.prod(conv.stride) >= 28 * 28
        and _suits_kernel(conv, input)
    )


def _can_add_in_place(
    conv: GatedConv2d,
    input: Tensor,  # [N, C_in, H, W]
    residual: Tensor,  # [N, C_out, H', W']
) -> bool:
    # Sums cost another pass elsewhere, which makes the package's kernel the faster one for all sizes.
    return (
        conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and residual.dtype == input.dtype
        and residual.is_contiguous()
        and _suits_kernel(conv, input)
    )


def _suits_kernel(
    conv: GatedConv2d,
    input: Tensor,  # [N, C_in, H, W]
) -> bool:
    """Whether the package's kernel for the CPU may run a plain convolution, in a format that suits it."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and input.dim() == 4
        and conv.groups == 1
        and input.dtype == conv.weight.dtype == torch.float32
        and input.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and backends.requested_backend() in ("auto", "cpu")
        and backends.can_run_cpu("gated_conv2d", input.device, input.dtype)
    )

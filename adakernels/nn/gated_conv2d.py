"""Convolution whose output channels are kept, reused from the frame before, or skipped."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch.nn.functional as F
from torch import Tensor, nn

from adakernels.nn._conv_norm_act import ACTIVATIONS, ConvNormAct
from adakernels.ops import temporal_fuse
from adakernels.ops._layout import shares_memory
from adakernels.ops.conv2d_add import conv2d_add_
from adakernels.ops.gated_conv2d import gated_conv2d_with

_Pair: TypeAlias = int | tuple[int, int]


class GatedConv2d(ConvNormAct, nn.Conv2d):
    """`torch.nn.Conv2d` that computes, per frame, only the channels a policy asks for (AdaFuse, Eq. 3).

    Takes the constructor arguments of `torch.nn.Conv2d`, has its `state_dict` keys, and is that module when
    called without a policy (in inference on the CPU, by the fastest kernel, which may round otherwise).

    In inference on the CPU it keeps what Winograd's method makes of 3x3 kernels, two to five times the size
    of a weight with 64 input channels or more (or the sum of both, for two sizes of maps), until the weight
    changes or `train()` or `eval()` is called. Call one of these after writing to the weight's memory through
    `weight.data`, NumPy or another process, which shows nowhere. A plain call keeps nothing unless there is a
    norm, and follows such writes.

    Args:
        norm: normalisation of the computed features, applied before they are fused over time: a module, or a
            callable that makes one from the number of channels (`torch.nn.BatchNorm2d`). Its keys are
            `norm.*`. A batch normalisation in evaluation mode is folded into the weights.
        activation: None, "relu", "relu6" or "silu", applied after `norm` and before fusion.

    Raises:
        ValueError: for an unknown activation.
    """

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
    folded = conv.with_norm(norm)
    if folded is not None:
        return _conv_act(conv, *folded, activation, input, policy, frames, in_policy)
    assert norm is not None
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
    folded = conv.with_norm(norm) if _can_add_in_place(conv, input, residual) else None
    if folded is not None:
        target = residual if overwrite and not shares_memory(residual, input) else residual.clone()
        padding = cast(tuple[int, int], conv.padding)
        source = conv.kernel_source("gated_conv2d", input, folded[0])
        return conv2d_add_(
            target,
            input,
            *folded,
            in_policy,
            conv.stride,
            padding,
            conv.dilation,
            activation,
            kernel_source=source,
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
    if policy is None and in_policy is None:
        return conv.conv_act("gated_conv2d", input, weight, bias, activation)
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    return gated_conv2d_with(
        conv.kernel_source("gated_conv2d", input, weight),
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


def _can_add_in_place(
    conv: GatedConv2d,
    input: Tensor,  # [N, C_in, H, W]
    residual: Tensor,  # [N, C_out, H', W']
) -> bool:
    # Sums cost another pass elsewhere, which makes the package's kernel the faster one for all sizes.
    return (
        conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.groups == 1
        and residual.dtype == input.dtype
        and input.is_contiguous()
        and residual.is_contiguous()
        and conv.suits_cpu_kernel("gated_conv2d", input, conv.weight)
    )

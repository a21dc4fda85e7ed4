"""oneDNN's convolutions, whose activation is a part of them and which read weights as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adakernels.ops._conv_arguments import ACTIVATIONS, activate
from adakernels.ops._layout import CHANNELS_LAST
from adakernels.ops._library import library

# In the order of `ACTIVATIONS`.
ONEDNN_ACTIVATIONS: tuple[tuple[str, list[float]], ...] = (
    ("none", []),
    ("relu", []),
    ("hardtanh", [0.0, 6.0]),
    ("swish", []),
)

_CONV = (
    "Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "int activation"
)
library.define(f"channels_last_conv({_CONV}) -> Tensor")
library.define(f"channels_last_conv_(Tensor(a!) target, {_CONV}) -> ()")
library.define(
    "channels_last_conv_backward_(Tensor(a!) grad_input, Tensor(b!) grad_weight, Tensor(c!) grad_bias, "
    "Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "bool want_input, bool want_weight, bool want_bias) -> ()"
)


# Torch for other processors may be built without these operators.
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


onednn_enabled = torch._C._get_mkldnn_enabled
"""`torch.backends.mkldnn.enabled`, which as an attribute takes several Python calls."""


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's convolutions for such tensors and is to use them."""
    if not (_AVAILABLE and onednn_enabled()):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.library.impl(library, "channels_last_conv", "CPU")
def _conv(
    input: Tensor,  # [N, C_in, H, W] or [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw] or [C_out, C_in, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: int,
) -> Tensor:  # [N, C_out, H', W'] or [B, C_out, T', H', W']
    """activation(conv(input) + bias), channels last, of such an input and a weight of any strides."""
    if has_onednn(input.dtype):
        output = torch.ops.mkldnn._convolution_pointwise.default(
            input, weight, bias, padding, stride, dilation, 1, *ONEDNN_ACTIVATIONS[activation], ""
        )
    else:
        conv = F.conv2d if input.dim() == 4 else F.conv3d
        output = activate(
            conv(input, weight, bias, stride, padding, dilation), ACTIVATIONS[activation], inplace=True
        )
    return output.contiguous(memory_format=CHANNELS_LAST[input.dim()])


@torch.library.impl(library, "channels_last_conv_", "CPU")
def _conv_to(
    target: Tensor,  # [N, C_out, H', W'] or [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] or [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw] or [C_out, C_in, kt, kh, kw]
    bias: Tensor | None,  # [C_out]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: int,
) -> None:
    """Makes `target` what `channels_last_conv` returns, without memory for that."""
    conv = input, weight, bias
    if not has_onednn(input.dtype):
        target.copy_(_conv(*conv, stride, padding, dilation, activation))
        return
    # torch's binding of oneDNN can only add to what is there, and has no activation but ReLU then.
    name = ACTIVATIONS[activation]
    fused = name == "relu"
    torch.ops.mkldnn._convolution_pointwise_.binary(
        target.zero_(),
        *conv,
        padding,
        stride,
        dilation,
        1,
        "add",
        None,
        name if fused else None,
        [],
        "",
    )
    if not fused:
        activate(target, name, inplace=True)


@torch.library.impl(library, "channels_last_conv_backward_", "CPU")
def _conv_backward(
    grad_input: Tensor,  # [N, C_in, H, W] or [B, C_in, T, H, W]
    grad_weight: Tensor,  # [C_out, C_in, kh, kw] or [C_out, C_in, kt, kh, kw]
    grad_bias: Tensor,  # [C_out]
    grad_output: Tensor,  # [N, C_out, H', W'] or [B, C_out, T', H', W']
    input: Tensor,  # [N, C_in, H, W] or [B, C_in, T, H, W]
    weight: Tensor,  # [C_out, C_in, kh, kw] or [C_out, C_in, kt, kh, kw]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> None:
    """Writes the input's gradient where it is wanted, and adds the others to what is there."""
    grads = torch.ops.aten.convolution_backward.default(
        grad_output,
        input,
        weight,
        weight.shape[:1],
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        1,
        [want_input, want_weight, want_bias],
    )
    if want_input:
        grad_input.copy_(grads[0])
    if want_weight:
        grad_weight.add_(grads[1])
    if want_bias:
        grad_bias.add_(grads[2])

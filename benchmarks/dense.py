"""Plain convolutions of clips, and networks of them, in the ways that PyTorch has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakernels.nn.folding import fold_batch_norm

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
DENSE_FORMS = ("contiguous", "channels_last", "channels_last_2d")


def in_form(
    clips: Tensor,  # [B, C, T, H, W]
    form: str,
) -> Tensor:
    """The clips in the memory format that a form of `DENSE_FORMS` works on."""
    return clips.contiguous(memory_format=FORMATS[form.removesuffix("_2d")])


class DenseConv:
    """A plain convolution over clips, in one of the forms.

    "contiguous" and "channels_last" are `F.conv3d`. Where the kernel has no extent in time, or only that,
    "channels_last_2d" is `F.conv2d` on frames, or on maps of time by all pixels; both are views.
    """

    def __init__(
        self,
        form: str,
        weight: Tensor,  # [C_out, C_in, kt, kh, kw]
        bias: Tensor,  # [C_out]
        stride: Sequence[int],
    ) -> None:
        padding = [size // 2 for size in weight.shape[2:]]
        self.flat, self.frame_stride = "", stride[0]
        if form == "channels_last_2d":
            self.flat = "frames" if weight.shape[2] == 1 else "columns" if weight.shape[3] == 1 else ""
        if self.flat == "frames":
            weight, stride, padding = weight[:, :, 0], stride[1:], padding[1:]
        elif self.flat == "columns":
            weight, stride, padding = weight[..., 0], stride[:2], padding[:2]
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        order = torch.contiguous_format if form == "contiguous" else formats[weight.dim()]
        self.weight, self.bias = weight.contiguous(memory_format=order), bias
        self.stride, self.padding = tuple(stride), tuple(padding)

    def __call__(self, input: Tensor) -> Tensor:  # [B, C_in, T, H, W]
        if self.flat == "frames":
            clips = input[:, :, :: self.frame_stride].transpose(1, 2)
            output = F.conv2d(clips.flatten(0, 1), self.weight, self.bias, self.stride, self.padding)
            return output.unflatten(0, clips.shape[:2]).transpose(1, 2)
        if self.flat == "columns":
            output = F.conv2d(input.flatten(3), self.weight, self.bias, self.stride, self.padding)
            return output.unflatten(3, input.shape[3:])
        return F.conv3d(input, self.weight, self.bias, self.stride, self.padding)


class DenseNetwork:
    """A plain network as fast as eager PyTorch runs it: batch norm folded, every convolution in one form."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.convs: dict[nn.Module, DenseConv] = {}

    def fold(self, conv: Any, norm: Any) -> None:
        """Make the plain form of a convolution and the batch norm after it."""
        with torch.no_grad():
            weight, bias = fold_batch_norm(conv.weight, conv.bias, norm)
        self.convs[conv] = DenseConv(self.form, weight, bias, conv.stride)

    def pool(self, features: Tensor) -> Tensor:  # [B, C, T, H, W]
        """The maximum of 3 x 3 pixels at every second one."""
        if self.form == "contiguous":
            return F.max_pool3d(features, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        frames = features.transpose(1, 2)
        pooled = F.max_pool2d(frames.flatten(0, 1), 3, stride=2, padding=1)
        return pooled.unflatten(0, frames.shape[:2]).transpose(1, 2)


def sum_of_2d(
    clips: Tensor,  # [B, C_in, T, H, W]
    taps: Sequence[Tensor],  # kt of [C_out, C_in / groups, kh, kw]
    bias: Tensor,  # [C_out]
    stride: int,
    padding: int,
    groups: int = 1,
) -> Tensor:  # [B, C_out, T, H', W']
    """The 3D convolution as a sum over its temporal taps of 2D convolutions of all frames."""
    centre, length = len(taps) // 2, clips.shape[2]
    frames = clips.transpose(1, 2)

    def convolve(begin: int, end: int, tap: int) -> Tensor:
        part = frames[:, begin:end].flatten(0, 1)
        output = F.conv2d(part, taps[tap], bias if tap == centre else None, stride, padding, groups=groups)
        return output.unflatten(0, (len(frames), end - begin))

    output = convolve(0, length, centre)
    for tap in range(len(taps)):
        shift = tap - centre
        if shift != 0 and abs(shift) < length:
            begin, end = max(0, -shift), min(length, length - shift)
            output[:, begin:end] += convolve(begin + shift, end + shift, tap)
    return output.transpose(1, 2)

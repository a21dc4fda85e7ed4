"""Convolutions and a linear layer that run with the first channels of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adakernels import flops
from adakernels.nn._conv_norm_act import ACTIVATIONS, ConvNormAct
from adakernels.nn.folding import DerivedCache, fold_batch_norm, is_foldable, is_parametrised, norm_tensors
from adakernels.ops import slim_conv2d, slim_conv3d
from adakernels.ops._checks import facts
from adakernels.ops._layout import dense
from adakernels.ops.slim_conv import (
    CpuConv,
    Segments,
    cpu_call,
    cpu_settings,
    prepare,
    record_work,
    slim_weight,
)

__all__ = ["SlimConv2d", "SlimConv3d", "SlimLinear"]


PREPARED = 2
"""How many widths a layer keeps prepared weights for."""

CALLS = 4
"""How many calls a layer knows again, such as those with other sizes of clips."""


class _Call(NamedTuple):
    """A call with a prepared weight.

    Attributes:
        seen, segments: what it follows from besides the weights.
        run: the convolution.
        weight, bias: as prepared for that.
    """

    seen: tuple[Any, ...]
    segments: Segments | None
    run: CpuConv
    weight: Tensor  # [out_channels, C/groups, ...]
    bias: Tensor | None  # [out_channels]


class _Prepared:
    """Weights prepared for some widths, and the latest different calls with them."""

    __slots__ = ("calls", "widths")

    def __init__(self) -> None:
        self.calls: tuple[_Call, ...] = ()
        self.widths: dict[Any, tuple[Tensor, Tensor | None]] = {}


class _SlimConv(ConvNormAct):
    """What `SlimConv2d` and `SlimConv3d` share."""

    operator: Callable[..., Tensor]  # slim_conv2d or slim_conv3d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepared: DerivedCache[_Prepared] = DerivedCache()

    def forward(
        self,
        input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
        *,
        out_channels: int | None = None,
        segments: Segments | None = None,
    ) -> Tensor:  # [N, out_channels, H', W'] or [B, out_channels, T', H', W']
        """Convolution, normalisation and activation at a width.

        Args:
            input: with the channels of `segments`; with all of them and no other argument, what the class of
                torch takes, which may be without N or B.
            out_channels: how many output channels to compute, counted from the first; None for all.
            segments: (start, stop) ranges of the weight's input channels that the input's are; None for one
                range from 0.

        Raises:
            ValueError, TypeError: as `slim_conv2d` and `slim_conv3d`; and for a norm that is no batch
                normalisation, unless all channels are computed.
        """
        prepared, seen = self._prepared_for(input), None
        if prepared is not None:
            # All that a call follows from besides the weights. Caches are cold after a convolution, so that a
            # call like one before looks at little more than that it is.
            seen = (
                input.shape,
                input.stride(),
                input.dtype,
                out_channels,
                type(out_channels),
                self.stride,
                self.padding,
                self.padding_mode,
                self.dilation,
                self.groups,
                self.activation,
                cpu_settings(),
            )
            for call in prepared.calls:
                # Equal segments may have other types in them.
                if call.segments is segments and call.seen == seen and not flops.counting:
                    return call.run(input, call.weight, call.bias)
        facts(self.operator.__name__, "input", input)
        if out_channels is None and segments is None and self._is_plain(input):
            return self._plain_forward(input)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding, seen = 0, None
        norm = self.norm
        fixed = norm is None or is_foldable(norm)
        arguments = (
            out_channels,
            segments,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.activation if fixed else None,
        )
        if prepared is not None and input.dim() == self.weight.dim():
            output = self._first_call(prepared, seen, input, arguments)
            if output is not None:
                return output
        weight, bias = self.with_norm(norm) or (self.weight, self.bias)
        names = ("out_channels", "segments", "stride", "padding", "dilation", "groups", "activation")
        output = self.operator(input, weight, bias, **dict(zip(names, arguments, strict=True)))
        if fixed:
            return output
        assert norm is not None
        return ACTIVATIONS[self.activation](_slim_norm(norm, output, self.out_channels))

    def _is_plain(
        self,
        input: Tensor,  # [(N,) C, H, W] or [(B,) C, T, H, W]
    ) -> bool:
        """Whether to leave a call with all channels to torch: its convolutions have derivatives of any order,
        and take what is no batch."""
        rank = len(self.kernel_size)
        if input.dim() not in (rank + 1, rank + 2) or input.shape[-1 - rank] != self.in_channels:
            return False
        return input.dim() == rank + 1 or torch.is_grad_enabled()

    def _plain_forward(
        self,
        input: Tensor,  # [(N,) C_in, H, W] or [(B,) C_in, T, H, W]
    ) -> Tensor:  # [(N,) C_out, H', W'] or [(B,) C_out, T', H', W']
        op, folded = self.operator.__name__, self.with_norm(self.norm)
        if folded is not None:
            return self.conv_act(op, input, *folded, self.activation)
        assert self.norm is not None
        output: Tensor = self.norm(self.conv_act(op, input, self.weight, self.bias, None))
        return ACTIVATIONS[self.activation](output)

    def _prepared_for(
        self,
        input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
    ) -> _Prepared | None:
        """What is prepared of the weights as they are, in inference on the CPU; else None."""
        if (
            torch.is_grad_enabled()
            or type(input) is not Tensor  # others have no memory to read, or behaviour of their own
            or not input.is_cpu
            or torch.is_autocast_enabled("cpu")
            or torch._C._len_torch_dispatch_stack() > 0  # of those that count or record calls
        ):
            return None
        norm = self._modules.get("norm")
        if norm is not None and not is_foldable(norm):
            return None
        if is_parametrised(self) or (norm is not None and is_parametrised(norm)):
            return None
        # Looked up as attributes they take a microsecond.
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if norm is None:
            return self._prepared.get((weight, bias), _Prepared)
        norm = cast(_BatchNorm, norm)
        return self._prepared.get((weight, bias, *norm_tensors(norm)), _Prepared, tag=norm.eps)

    def _first_call(
        self,
        prepared: _Prepared,
        seen: tuple[Any, ...] | None,
        input: Tensor,  # [N, C, H, W] or [B, C, T, H, W]
        arguments: tuple[Any, ...],
    ) -> Tensor | None:
        """The result with a weight that is prepared for its width, now if need be; None where the CPU's
        convolutions are not to make it.

        Args:
            seen: what to know this call by when it is repeated, if that is possible.
        """
        weight, bias = self.weight, self.bias
        as_it_was = input.stride()
        input = dense(input)
        planned = cpu_call(self.operator.__name__, input, weight, bias, *arguments)
        if planned is None:
            return None
        slim, run = planned
        key = run.form, run.transform, slim.out_channels, slim.segments
        # Other threads may add widths and drop this one meanwhile.
        tensors = prepared.widths.get(key)
        if tensors is None:
            norm = cast("_BatchNorm | None", self.norm)
            with torch.inference_mode(False), torch.no_grad():
                folded = (weight, bias) if norm is None else fold_batch_norm(weight, bias, norm)
                tensors = prepare(run, *folded, slim, input.shape)
            widths = list(prepared.widths)
            for width in widths[: max(0, len(widths) + 1 - PREPARED)]:
                dropped = prepared.widths.pop(width, (None,))[0]
                prepared.calls = tuple(call for call in prepared.calls if call.weight is not dropped)
            prepared.widths[key] = tensors
        segments = arguments[1]
        # What is a list may be another one in the next call.
        fixed = segments is None or {type(segments), *map(type, segments)} == {tuple}
        fixed = fixed and list not in map(type, (self.stride, self.padding, self.dilation))
        if seen is not None and fixed and input.stride() == as_it_was and not flops.counting:
            call = _Call(seen, segments, run, *tensors)
            prepared.calls = (call, *prepared.calls[: CALLS - 1])
        record_work(self.operator.__name__, slim, input, weight)
        return run(input, *tensors)

    def train(self, mode: bool = True) -> Any:
        """Sets the mode as `torch.nn.Module.train` does, and drops what was made from the weights so far."""
        self._prepared.clear()
        return super().train(mode)


class SlimConv2d(_SlimConv, nn.Conv2d):
    """`torch.nn.Conv2d` that can run with the first of its output channels and some of its input channels.

    Takes the constructor arguments of `torch.nn.Conv2d`, has its `state_dict` keys, and is that module when
    called with its input alone. In inference on the CPU it takes the fastest kernel, which may round
    otherwise, and keeps copies of the weight for the last two widths it was called with (or one, if its maps
    want two methods), in the layout that the convolution reads (A3D, §3.2), or 3x3 kernels as Winograd's
    method multiplies with them.

    Args:
        norm: normalisation of the result: a module, or a callable that makes one from the number of channels
            (`torch.nn.BatchNorm2d`). Its keys are `norm.*`. A batch normalisation runs with the first of its
            channels, and in evaluation mode is folded into the weights.
        activation: None, "relu", "relu6" or "silu", applied after `norm`.

    Raises:
        ValueError: for an unknown activation.
    """

    operator = staticmethod(slim_conv2d)


class SlimConv3d(_SlimConv, nn.Conv3d):
    """As `SlimConv2d`, from `torch.nn.Conv3d`."""

    operator = staticmethod(slim_conv3d)


class SlimLinear(nn.Linear):
    """`torch.nn.Linear` that can run with some of its input features. Has the keys of that module."""

    def forward(
        self,
        input: Tensor,  # [*, F]
        segments: Segments | None = None,
    ) -> Tensor:  # [*, F_out]
        """The outputs from the features in the (start, stop) ranges of `segments`; None for one from 0."""
        weight = slim_weight(self.weight, self.out_features, segments or ((0, input.shape[-1]),))
        output = F.linear(input, weight, self.bias)
        if flops.counting:
            rows = math.prod(output.shape[1:])
            used = flops.every_row(output, float(rows * input.shape[-1]))
            flops.record("linear", float(rows * self.in_features), used)
        return output


def _slim_norm(norm: nn.Module, input: Tensor, channels: int) -> Tensor:  # [N, C, ...]
    """A normalisation of `channels` channels applied to the first of them."""
    count = input.shape[1]
    if count == channels:
        output: Tensor = norm(input)
        return output
    if not isinstance(norm, _BatchNorm):
        raise ValueError(
            f"expected a batch normalisation with {count} of {channels} channels, got {type(norm).__name__}"
        )
    # Slices are views: running statistics are updated where they are.
    tensors = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    first = {name: tensor[:count] for name, tensor in tensors.items() if tensor.dim() > 0}
    return torch.func.functional_call(norm, first, (input,))

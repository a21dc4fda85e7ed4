"""One gated layer in its three forms: plain dense, dense with masks as done today, and ours."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from benchmarks.cases import CLIP, KEEP, REUSE, SKIP, LayerCase, draw_in_policy, draw_policy, work_ratio
from benchmarks.measure import FORMATS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "silu": lambda y: F.silu(y, inplace=True),
}


class Layer:
    """A layer with random inputs, weights and policies, contiguous.

    Channels that `in_policy` skips hold exact zeros, as the gated layer before would have left them.
    """

    def __init__(self, case: LayerCase) -> None:
        self.shape = shape = case.shape
        self.frames = min(CLIP, case.batch)
        random = torch.Generator().manual_seed(case.seed)
        fan_in = shape.kernel**2 * shape.in_channels // shape.groups
        weight_shape = (shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.kernel)
        self.input = torch.randn(case.batch, shape.in_channels, shape.size, shape.size, generator=random)
        self.weight = torch.randn(weight_shape, generator=random) * (2 / fan_in) ** 0.5
        self.bias = torch.randn(shape.out_channels, generator=random) * 0.1
        self.policy = self.in_policy = None
        if case.updated is not None:
            self.policy = draw_policy(case.updated, case.batch, shape.out_channels, self.frames, case.seed)
        if case.skipped is not None:
            self.in_policy = draw_in_policy(case.skipped, case.batch, shape.in_channels, case.seed)
            self.input *= (self.in_policy != SKIP)[..., None, None]
        self._bind()

    def _bind(self) -> None:
        """Put the arguments of the operators together, so that no timed call has to, and the layer as models
        hold it."""
        shape = self.shape
        channels = shape.in_channels, shape.out_channels
        geometry = shape.kernel, shape.stride, shape.padding, 1, shape.groups
        self._layer = ak.GatedConv2d(*channels, *geometry, activation=shape.activation, device="meta").eval()
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            setattr(self._layer, name, nn.Parameter(tensor, requires_grad=False))
        self._dense = (self.input, self.weight, self.bias, shape.stride, shape.padding, 1, shape.groups)
        self._positional = (self.input, self.weight, self.bias, self.policy)
        self._named = {
            "frames": self.frames,
            "stride": shape.stride,
            "padding": shape.padding,
            "groups": shape.groups,
            "in_policy": self.in_policy,
            "activation": shape.activation,
        }

    def in_format(self, name: str) -> Layer:
        """The same layer in the memory format of that name."""
        other = copy(self)
        other.input = self.input.contiguous(memory_format=FORMATS[name])
        other.weight = self.weight.contiguous(memory_format=FORMATS[name])
        other._bind()
        return other

    @property
    def work(self) -> float:
        """work_ours / work_dense, from the policies drawn."""
        return work_ratio(self.shape, self.policy, self.in_policy, self.frames)

    def _activate(self, output: Tensor) -> Tensor:
        activation = self.shape.activation
        return output if activation is None else ACTIVATIONS[activation](output)

    def dense(self) -> Tensor:
        """The plain layer: convolution with bias, then the activation in place."""
        return self._activate(F.conv2d(*self._dense))

    def masked(self) -> Tensor:
        """The same math as ours by dense convolution and multiplication with masks."""
        input = (
            self.input if self.in_policy is None else self.input * (self.in_policy != SKIP)[..., None, None]
        )
        output = self._activate(F.conv2d(input, *self._dense[1:]))
        if self.policy is None:
            return output
        clips = output.unflatten(0, (-1, self.frames))
        policy = self.policy.unflatten(0, (-1, self.frames))[..., None, None]
        previous = torch.cat([torch.zeros_like(clips[:, :1]), clips[:, :-1]], dim=1)
        return (clips * (policy == KEEP) + previous * (policy == REUSE)).flatten(0, 1)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of the package's operator."""
        return self._positional, self._named

    def ours(self) -> Tensor:
        """The package's layer, policy included."""
        return self._layer(self.input, self.policy, frames=self.frames, in_policy=self.in_policy)

    def operator(self) -> Tensor:
        """The package's operator, policy included."""
        return ak.gated_conv2d(*self._positional, **self._named)

    def fused(self) -> Tensor:
        """The package's mixing alone, of an input as large as the layer's output."""
        assert self.policy is not None
        return ak.temporal_fuse(self.input, self.policy, frames=self.frames)

    def backend(self) -> str | None:
        """The backend that runs the operator."""
        return ak.explain(ak.gated_conv2d, *self._positional, **self._named).backend

    def reference(self) -> Tensor:
        """The operator's reference."""
        with ak.use_backend("reference"):
            return self.operator()

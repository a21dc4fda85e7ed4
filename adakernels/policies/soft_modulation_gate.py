"""Policy head that weighs the temporal and channel levels of a dynamic convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adakernels import flops
from adakernels.nn.linear import PackedCache, linear_norm_act


class SoftModulationGate(nn.Module):
    """Weights of the levels of a `DynamicConv3d`, from its pooled input (VA-RED², Eq. 4).

    A fully connected layer, batch normalisation, tanh, a fully connected layer, and max(tanh, 0). Levels
    whose weight is 0 are not computed; the greatest level with another weight decides about the work.

    Args:
        in_channels: channels of the convolution's input.
        frames: frames T of that input, which is pooled to C_in * T numbers as in the paper; None pools over
            time too, to C_in, and so takes clips of any length.
        temporal_levels, channel_levels: how many levels there are of either kind, 1 to 3.
        hidden: width of the hidden layer, of which the paper does not say how large it is.
    """

    def __init__(
        self,
        in_channels: int,
        frames: int | None = None,
        *,
        temporal_levels: int = 2,
        channel_levels: int = 2,
        hidden: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.frames = frames
        self.temporal_levels = temporal_levels
        self.channel_levels = channel_levels
        self.fc1 = nn.Linear(in_channels * (frames or 1), hidden, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, temporal_levels + channel_levels, device=device, dtype=dtype)
        self._packed: tuple[PackedCache, PackedCache] = (PackedCache(), PackedCache())
        # Every level starts alive, since a dead one gets no gradient.
        nn.init.normal_(self.fc2.weight, std=0.01)
        nn.init.ones_(self.fc2.bias)

    def forward(
        self,
        input: Tensor,  # [B, C_in, T, H, W]
    ) -> tuple[Tensor, Tensor]:
        """The weights of the temporal and of the channel levels, [B, S_t] and [B, S_c], both in [0, 1).

        Raises:
            ValueError: if `input` is not [B, in_channels, T, H, W] with T = `frames`, where that is given.
        """
        frames = "T" if self.frames is None else self.frames
        if (
            input.dim() != 5
            or input.shape[1] != self.in_channels
            or self.frames not in (None, input.shape[2])
        ):
            expected = f"[B, {self.in_channels}, {frames}, H, W]"
            raise ValueError(
                f"SoftModulationGate: expected input of shape {expected}, got {list(input.shape)}"
            )
        pooled = input.mean((2, 3, 4)) if self.frames is None else input.mean((3, 4)).flatten(1)
        if flops.counting:
            work = self.fc1.weight.numel() + self.fc2.weight.numel()
            flops.record(
                "soft_modulation_gate", 0.0, pooled.new_full((len(pooled),), work, dtype=torch.float64)
            )
        first, second = self._packed
        hidden = linear_norm_act(pooled, self.fc1.weight, None, self.bn, False, first).tanh()
        weights = linear_norm_act(hidden, self.fc2.weight, self.fc2.bias, None, False, second).tanh().relu()
        temporal, channel = weights.split((self.temporal_levels, self.channel_levels), 1)
        return temporal, channel

    def train(self, mode: bool = True) -> SoftModulationGate:
        """Sets the mode as `torch.nn.Module.train` does, and drops weights prepared so far."""
        for cache in self._packed:
            cache.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Channels and frames of the input, and the levels."""
        return (
            f"{self.in_channels}, frames={self.frames}, levels={self.temporal_levels}x{self.channel_levels}"
        )

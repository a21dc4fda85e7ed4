"""Policy head that decides which channels of a gated convolution to keep, reuse or skip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakernels import flops
from adakernels.nn.linear import PackedCache, linear_norm_act
from adakernels.ops import Policy


class ChannelPolicy(nn.Module):
    """Channel-wise policy from the pooled features of the present frame and the one before (AdaFuse, Eq. 2).

    Two fully connected layers with batch normalisation and ReLU between them. In training the choice is drawn
    by a hard Gumbel-softmax with straight-through gradients (Eq. 7); in evaluation it is the most likely one.

    Args:
        in_channels: channels of the features the decision is made from.
        out_channels: channels to decide about.
        hidden: width of the hidden layer.
        temperature: of the Gumbel-softmax.

    Attributes:
        sample: draw the policy in evaluation too, instead of taking the most likely one.
        generator: source of the random numbers of all draws; None is the default generator of the device.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden: int = 1024,
        temperature: float = 0.67,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.temperature = temperature
        self.sample = False
        self.generator: torch.Generator | None = None
        self.fc1 = nn.Linear(2 * in_channels, hidden, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, len(Policy) * out_channels, device=device, dtype=dtype)
        self._packed: tuple[PackedCache, PackedCache] = (PackedCache(), PackedCache())
        # Small logits: training starts from a nearly uniform choice.
        nn.init.normal_(self.fc2.weight, std=0.001)
        nn.init.zeros_(self.fc2.bias)

    def logits(
        self,
        input: Tensor,  # [N, C_in, H, W]
        *,
        frames: int,
    ) -> Tensor:
        """Unnormalised log-probabilities of keep, reuse and skip, [N, C_out, 3].

        Raises:
            ValueError: if `input` is not [N, in_channels, H, W] with whole clips of `frames` frames.
        """
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            expected = f"[N, {self.in_channels}, H, W]"
            raise ValueError(f"ChannelPolicy: expected input of shape {expected}, got {list(input.shape)}")
        if frames < 1 or input.shape[0] % frames != 0:
            raise ValueError(
                f"ChannelPolicy: expected N to be a multiple of frames = {frames}, got N = {input.shape[0]}"
            )
        present = input.mean((2, 3)).unflatten(0, (input.shape[0] // frames, frames))
        # Padding by one frame in front and cropping one behind moves each frame to its successor.
        past = F.pad(present, (0, 0, 1, -1))
        pooled = torch.cat((past, present), 2).flatten(0, 1)
        if flops.counting:
            work = self.fc1.weight.numel() + self.fc2.weight.numel()
            flops.record("channel_policy", 0.0, pooled.new_full(pooled.shape[:1], work, dtype=torch.float64))
        first, second = self._packed
        hidden = linear_norm_act(pooled, self.fc1.weight, None, self.bn, True, first)
        logits = linear_norm_act(hidden, self.fc2.weight, self.fc2.bias, None, False, second)
        return logits.unflatten(1, (self.out_channels, len(Policy)))

    def forward(
        self,
        input: Tensor,  # [N, C_in, H, W]
        *,
        frames: int,
    ) -> Tensor:
        """The policy for each frame and channel.

        Args:
            frames: frames per clip; row b * frames + t of `input` is frame t of clip b. The first frame of a
                clip sees zeros in place of the frame before.

        Returns:
            In training a one-hot float policy [N, C_out, 3] that passes gradients on to the logits; in
            evaluation an int64 policy [N, C_out], in which REUSE in the first frame of a clip is written as
            SKIP, which there it is.

        Raises:
            ValueError: if `input` is not [N, in_channels, H, W] with whole clips of `frames` frames.
        """
        logits = self.logits(input, frames=frames)
        if self.training:
            return straight_through_gumbel_softmax(logits, self.temperature, generator=self.generator)
        if self.sample:
            logits = logits + gumbel_noise(logits, generator=self.generator)
        policy = logits.argmax(2)
        first = policy[::frames]
        # Compiled code takes no enum for a number.
        first.masked_fill_(first == Policy.REUSE.value, Policy.SKIP.value)
        return policy

    def train(self, mode: bool = True) -> ChannelPolicy:
        """Sets the mode as `torch.nn.Module.train` does, and drops weights prepared so far."""
        for cache in self._packed:
            cache.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Channels in and out, and the temperature."""
        return f"{self.in_channels}, {self.out_channels}, temperature={self.temperature}"


def gumbel_noise(like: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Independent standard Gumbel noise of the shape, dtype and device of `like`."""
    return -torch.empty_like(like, requires_grad=False).exponential_(generator=generator).log()


def straight_through_gumbel_softmax(
    logits: Tensor,  # [..., K]
    temperature: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One-hot draws with probabilities softmax(`logits`), [..., K], float32 or wider (AdaFuse, Eq. 7).

    The value is exactly one-hot; the gradient is that of the softmax of (logits + noise) / temperature.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    soft = ((logits + gumbel_noise(logits, generator=generator)) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    # The parenthesis is exactly zero, so that the value stays one-hot.
    return hard + (soft - soft.detach())

"""AdaFuse on ResNet: the first convolution of a residual block keeps, reuses or skips channels over time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from adakernels.models.checkpoints import load_backbone
from adakernels.models.resnet import ResidualBlock, ResNet
from adakernels.policies import ChannelPolicy


class AdaFuseResNet(ResNet):
    """ResNet for clips with a policy between the first two convolutions of its residual blocks (AdaFuse, §3).

    Args:
        depth: 18, 34 or 50.
        num_classes: width of the classifier.
        frames: frames per clip. The attribute of that name can be changed later.
        shift: shift an eighth of the channels each way in time at the head of every residual branch (TSM).
        gated_stages: which of the stages 1 to 4 (`layer1` to `layer4`) get policies, None for all;
            `shift=True, gated_stages=(4,)` is the paper's "TSM+Last".
        hidden: width of the hidden layer of the policy heads.

    Raises:
        ValueError: for another depth, fewer frames than one, or a stage that does not exist.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 1000,
        frames: int = 8,
        *,
        shift: bool = False,
        gated_stages: Collection[int] | None = None,
        hidden: int = 1024,
    ) -> None:
        super().__init__(depth, num_classes)
        gate_blocks(self, frames=frames, shift=shift, gated_stages=gated_stages, hidden=hidden)
        self._frames = frames

    @property
    def frames(self) -> int:
        """Frames per clip."""
        return self._frames

    @frames.setter
    def frames(self, frames: int) -> None:
        check_gating(frames, None)
        self._frames = frames
        for _, block in self.blocks():
            block.frames = frames

    @overload
    def forward(self, input: Tensor, *, return_policies: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(
        self, input: Tensor, *, return_policies: bool
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

    def forward(
        self,
        input: Tensor,  # [B, 3, T, H, W] or [B * T, 3, H, W]
        *,
        return_policies: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits of each clip, averaged over its frames.

        Args:
            input: clips, or their frames with frame t of clip b in row b * T + t; T is `frames`.
            return_policies: return the policies, too.

        Returns:
            [B, num_classes]; with `return_policies` also a dictionary from the name of each gated block
            ("layer1.0") to the policy it ran with, float [N, C, 3] in training, integer [N, C] in evaluation.

        Raises:
            ValueError: if `input` is not of one of the two shapes.
        """
        if input.dim() == 5:
            if input.shape[2] != self.frames:
                raise ValueError(
                    f"AdaFuseResNet: expected clips of {self.frames} frames, got input of shape "
                    f"{list(input.shape)}"
                )
            input = input.transpose(1, 2).flatten(0, 1)
        elif input.dim() != 4 or input.shape[0] % self.frames != 0:
            raise ValueError(
                f"AdaFuseResNet: expected input of shape [B, 3, {self.frames}, H, W] or "
                f"[B * {self.frames}, 3, H, W], got {list(input.shape)}"
            )
        policies = {}
        features = self.stem(input)
        for name, block in self.blocks():
            features, policy = block.forward_with_policy(features, overwrite=True)
            if policy is not None:
                policies[name] = policy
        # The classifier is linear: averaging the features averages its logits.
        clips = (features.shape[0] // self.frames, self.frames)
        logits = self.fc(features.unflatten(0, clips).mean((1, 3, 4)))
        return (logits, policies) if return_policies else logits

    def load_backbone(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Loads a checkpoint of the plain ResNet, such as torchvision's; the policy heads stay as they are.

        A classifier of another width is left out.

        Returns:
            The keys of this model that `state_dict` did not provide.

        Raises:
            ValueError: if a key of the backbone is missing, or `state_dict` has one that the model lacks.
            RuntimeError: if a tensor has another shape.
        """
        return load_backbone(self, state_dict, heads=(".policy.",))

    def sample_policies(self, enabled: bool = True, generator: torch.Generator | None = None) -> None:
        """Makes the policies of evaluation random draws (`enabled`) or the most likely choice (the default).

        Args:
            generator: source of the random numbers, in training too; None is the device's own.
        """
        for module in self.modules():
            if isinstance(module, ChannelPolicy):
                module.sample, module.generator = enabled, generator


def gate_blocks(
    model: nn.Module,
    *,
    frames: int,
    shift: bool,
    gated_stages: Collection[int] | None,
    hidden: int,
) -> None:
    """Gives the residual blocks in `layer1` to `layer4` of `model` policies for their first convolution.

    Raises:
        ValueError: for fewer frames than one, or a stage that does not exist.
    """
    check_gating(frames, gated_stages)
    for stage in (1, 2, 3, 4):
        for block in getattr(model, f"layer{stage}"):
            assert isinstance(block, ResidualBlock)
            block.frames, block.shift = frames, shift
            if gated_stages is None or stage in gated_stages:
                conv = block.conv1
                block.policy = ChannelPolicy(
                    conv.in_channels,
                    conv.out_channels,
                    hidden=hidden,
                    device=conv.weight.device,
                    dtype=conv.weight.dtype,
                ).train(block.training)


def check_gating(frames: int, gated_stages: Collection[int] | None) -> None:
    """Raises ValueError for fewer frames than one, or a stage that does not exist."""
    if frames < 1:
        raise ValueError(f"expected frames to be positive, got {frames}")
    if gated_stages is not None and not set(gated_stages) <= {1, 2, 3, 4}:
        raise ValueError(
            f"expected gated_stages to be among 1, 2, 3, 4 (layer1 to layer4), got {gated_stages}"
        )


def adafuse_resnet18(
    num_classes: int = 1000,
    frames: int = 8,
    *,
    shift: bool = False,
    gated_stages: Collection[int] | None = None,
) -> AdaFuseResNet:
    """AdaFuse on ResNet-18; see `AdaFuseResNet` for the arguments."""
    return AdaFuseResNet(18, num_classes, frames, shift=shift, gated_stages=gated_stages)


def adafuse_resnet34(
    num_classes: int = 1000,
    frames: int = 8,
    *,
    shift: bool = False,
    gated_stages: Collection[int] | None = None,
) -> AdaFuseResNet:
    """AdaFuse on ResNet-34; see `AdaFuseResNet` for the arguments."""
    return AdaFuseResNet(34, num_classes, frames, shift=shift, gated_stages=gated_stages)


def adafuse_resnet50(
    num_classes: int = 1000,
    frames: int = 8,
    *,
    shift: bool = False,
    gated_stages: Collection[int] | None = None,
) -> AdaFuseResNet:
    """AdaFuse on ResNet-50; see `AdaFuseResNet` for the arguments."""
    return AdaFuseResNet(50, num_classes, frames, shift=shift, gated_stages=gated_stages)

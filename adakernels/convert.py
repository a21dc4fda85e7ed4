"""Conversion of existing models to dynamic ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar, cast

from torch import nn

from adakernels.models.adafuse import check_gating, gate_blocks
from adakernels.models.resnet import Downsample, ResidualBlock
from adakernels.nn import GatedConv2d

_Model = TypeVar("_Model", bound=nn.Module)

_BASIC_PARTS = {"conv1", "bn1", "conv2", "bn2"}
_BOTTLENECK_PARTS = _BASIC_PARTS | {"conv3", "bn3"}


def convert(
    model: _Model,
    method: str = "adafuse",
    *,
    frames: int = 8,
    shift: bool = False,
    gated_stages: Collection[int] | None = None,
    hidden: int = 1024,
) -> _Model:
    """Turns a ResNet for images, in place, into one that works on the frames of clips.

    The model keeps its class, its own forward, its parameters and their names; gated blocks take the place of
    its residual blocks and bring policy heads along (`layer1.0.policy.*`). It then takes frames of clips,
    [B * frames, 3, H, W] with frame t of clip b in row b * frames + t, and gives one row per frame: average
    them over the clip.

    Args:
        model: torchvision's ResNet, one of `ak.models`, or any other with stages `layer1` to `layer4` whose
            blocks are made of `conv1`, `bn1`, `conv2`, `bn2`, for bottlenecks `conv3`, `bn3`, a ReLU, and an
            optional `downsample`.
        method: "adafuse".
        frames: frames per clip.
        shift: shift an eighth of the channels each way in time at the head of every residual branch (TSM).
        gated_stages: which of the stages 1 to 4 get policies; None for all.
        hidden: width of the hidden layer of the policy heads.

    Returns:
        `model`.

    Raises:
        ValueError: for an unknown method, fewer frames than one or a stage that does not exist, and for a
            model with blocks that can't be gated or already are; the model is then unchanged.
    """
    if method != "adafuse":
        raise ValueError(f"convert: expected method to be 'adafuse', got {method!r}")
    check_gating(frames, gated_stages)
    replacements: list[tuple[nn.Module, str, ResidualBlock]] = []
    for stage in (1, 2, 3, 4):
        layer = getattr(model, f"layer{stage}", None)
        if not isinstance(layer, nn.Module) or not len(list(layer.children())):
            raise ValueError(
                f"convert: {type(model).__name__} has no residual blocks in layer{stage} to gate"
            )
        for name, block in layer.named_children():
            replacements.append((layer, name, _gateable(block, f"layer{stage}.{name}")))
    for layer, name, block in replacements:
        layer.add_module(name, block)
    gate_blocks(model, frames=frames, shift=shift, gated_stages=gated_stages, hidden=hidden)
    return model


def _gateable(block: nn.Module, name: str) -> ResidualBlock:
    if isinstance(block, ResidualBlock):
        if block.policy is not None:
            raise ValueError(f"convert: block {name} has a policy already")
        return block
    parts = {key: module for key, module in block.named_children() if module is not None}
    downsample = parts.pop("downsample", None)
    relu = parts.pop("relu", None)
    if set(parts) not in (_BASIC_PARTS, _BOTTLENECK_PARTS):
        raise ValueError(
            f"convert: block {name} ({type(block).__name__}) can't be gated: expected the parts "
            f"{sorted(_BASIC_PARTS)} or {sorted(_BOTTLENECK_PARTS)}, got {sorted(parts)}"
        )
    if not isinstance(relu, nn.ReLU | None):
        raise ValueError(
            f"convert: block {name} can't be gated: its activation is {type(relu).__name__}, not ReLU"
        )
    layers = []
    for i in range(1, len(parts) // 2 + 1):
        conv = parts[f"conv{i}"]
        if type(conv) is not nn.Conv2d:
            raise ValueError(
                f"convert: block {name} can't be gated: its conv{i} is a {type(conv).__name__}, not a Conv2d"
            )
        layers.append((GatedConv2d.from_conv2d(conv), parts[f"bn{i}"]))
    if isinstance(downsample, nn.Sequential) and [type(m) for m in downsample] == [nn.Conv2d, nn.BatchNorm2d]:
        training = downsample.training
        downsample = Downsample(GatedConv2d.from_conv2d(cast(nn.Conv2d, downsample[0])), downsample[1])
        # Not .train(), which would reach into the parts: a frozen normalisation keeps its mode.
        downsample.training = training
    replacement = ResidualBlock(layers, downsample)
    replacement.training = block.training
    return replacement

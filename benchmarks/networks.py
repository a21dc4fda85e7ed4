"""Gated networks made ready for measuring, and the plain backbone they are measured against."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakernels import models, use_backend
from adakernels.flops import count_flops
from adakernels.models import AdaFuseResNet
from adakernels.policies import ChannelPolicy
from benchmarks.cases import CLIP, KEEP, REUSE, ModelCase

Model = TypeVar("Model", bound=nn.Module)
REUSE_BIAS = -0.9


class FoldedResNet:
    """A plain ResNet as fast as eager PyTorch runs it: batch norm folded into convolutions, ReLU in place.

    Takes the weights of any ResNet with torchvision's parameter names and gives the logits averaged over each
    clip of `frames`. `memory_format` is that of the residual blocks; the stem is always channels-last,
    because max pooling is far faster that way on the CPU.
    """

    def __init__(self, model: Any, frames: int, memory_format: torch.memory_format) -> None:
        self.frames = frames
        self.memory_format = memory_format
        self.stem = _fold(model.conv1, model.bn1, torch.channels_last)
        self.blocks = []
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                names = [i for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
                convs = [
                    _fold(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), memory_format) for i in names
                ]
                shortcut = block.downsample
                self.blocks.append(
                    (convs, None if shortcut is None else _fold(shortcut[0], shortcut[1], memory_format))
                )
        self.fc = model.fc

    def __call__(self, frames: Tensor) -> Tensor:  # [B * T, 3, H, W]
        frames = frames.contiguous(memory_format=torch.channels_last)
        features = F.max_pool2d(self.stem(frames).relu_(), 3, stride=2, padding=1)
        features = features.contiguous(memory_format=self.memory_format)
        for convs, shortcut in self.blocks:
            branch = features
            for conv in convs[:-1]:
                branch = conv(branch).relu_()
            branch = convs[-1](branch)
            features = branch.add_(features if shortcut is None else shortcut(features)).relu_()
        return self.fc(features.mean((2, 3)).unflatten(0, (-1, self.frames)).mean(1))


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, memory_format: torch.memory_format) -> nn.Conv2d:
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.kernel_size[0] // 2
    )
    assert norm.running_mean is not None and norm.running_var is not None and folded.bias is not None
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        folded.weight.copy_(conv.weight * scale[:, None, None, None])
        folded.bias.copy_(norm.bias - norm.running_mean * scale)
    return in_format(folded, memory_format)


def in_format(model: Model, memory_format: torch.memory_format) -> Model:
    """A copy of `model` with its weights in `memory_format`."""
    copy: Model = deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
    return copy


def prepare(case: ModelCase, clips: Tensor) -> tuple[AdaFuseResNet, float]:  # [B * T, 3, 224, 224]
    """The gated model of `case` in evaluation mode, and the share of the dense work it does on `clips`.

    Weights are random (seed 0); batch norm has the statistics of `clips`. The logits of the policy heads get
    unit variance, and one bias of all KEEP logits is set by bisection to make `count_flops` give `case.work`.
    """
    torch.manual_seed(0)
    model: AdaFuseResNet = getattr(models, case.model)(frames=CLIP)
    heads = [module for module in model.modules() if isinstance(module, ChannelPolicy)]
    for head in heads:
        nn.init.normal_(head.fc2.weight, std=(2 / head.fc2.in_features) ** 0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), use_backend("reference"):
        model.train()(clips)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()

    low, high = -4.0, 4.0
    with torch.inference_mode():
        for _ in range(14):
            keep = (low + high) / 2
            share = _work_with_bias(model, heads, keep, clips)
            low, high = (keep, high) if share < case.work else (low, keep)
            if abs(share - case.work) < 1e-3:
                break
    return model, share


def _work_with_bias(model: AdaFuseResNet, heads: list[ChannelPolicy], keep: float, clips: Tensor) -> float:
    for head in heads:
        bias = head.fc2.bias.view(-1, 3)
        bias.zero_()
        bias[:, KEEP] = keep
        bias[:, REUSE] = REUSE_BIAS
    flops = count_flops(model, clips)
    return float(flops.actual.mean() / flops.dense)

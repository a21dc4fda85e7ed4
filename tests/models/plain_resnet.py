"""What the ResNets are compared with, written from torch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def norm_shapes(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for key in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{key}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def torchvision_shapes(depth: int, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state dict of torchvision's ResNet."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **dict(norm_shapes("bn1", 64))}
    expansion, kernels = (4, (1, 3, 1)) if depth == 50 else (1, (3, 3))
    inputs = 64
    for stage, count in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        outputs = width * expansion
        for i in range(count):
            name = f"layer{stage + 1}.{i}"
            channels = [inputs, *[width] * (len(kernels) - 1), outputs]
            for j, k in enumerate(kernels):
                shapes[f"{name}.conv{j + 1}.weight"] = (channels[j + 1], channels[j], k, k)
                shapes.update(norm_shapes(f"{name}.bn{j + 1}", channels[j + 1]))
            if i == 0 and (stage > 0 or inputs != outputs):
                shapes[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                shapes.update(norm_shapes(f"{name}.downsample.1", outputs))
            inputs = outputs
    shapes["fc.weight"], shapes["fc.bias"] = (num_classes, inputs), (num_classes,)
    return shapes


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def shake_norms(model: nn.Module) -> nn.Module:
    """Makes every batch normalisation do something that can be seen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def plain_forward(model: nn.Module, x: Tensor) -> Tensor:
    """torchvision's forward, written with torch alone from the model's parameters, for evaluation."""

    def norm(name: str, x: Tensor) -> Tensor:
        bn = model.get_submodule(name)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = model.get_parameter(f"{name}.weight")
        return F.conv2d(x, weight, None, stride, weight.shape[2] // 2)

    keys = shapes_of(model)
    x = F.max_pool2d(F.relu(norm("bn1", conv("conv1", x, 2))), 3, 2, 1)
    for stage in range(1, 5):
        i = 0
        while f"layer{stage}.{i}.conv1.weight" in keys:
            name = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            bottleneck = f"{name}.conv3.weight" in keys
            y = F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", x, 1 if bottleneck else stride)))
            y = norm(f"{name}.bn2", conv(f"{name}.conv2", y, stride if bottleneck else 1))
            if bottleneck:
                y = norm(f"{name}.bn3", conv(f"{name}.conv3", F.relu(y)))
            if f"{name}.downsample.0.weight" in keys:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride))
            x = F.relu(x + y)
            i += 1
    return F.linear(x.mean((2, 3)), model.fc.weight, model.fc.bias)

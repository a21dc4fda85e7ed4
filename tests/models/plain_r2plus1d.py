"""torchvision's r2plus1d_18, written with torch alone: its keys and shapes, and its forward."""

from __future__ import annotations

import torch.nn.functional as F
from plain_resnet import norm_shapes
from torch import Tensor, nn


def torchvision_shapes(num_classes: int = 400) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state dict of torchvision's VideoResNet with Conv2Plus1D and R2Plus1dStem."""
    shapes: dict[str, tuple[int, ...]] = {
        "stem.0.weight": (45, 3, 1, 7, 7),
        **dict(norm_shapes("stem.1", 45)),
    }
    shapes |= {"stem.3.weight": (64, 45, 3, 1, 1), **dict(norm_shapes("stem.4", 64))}
    inputs = 64
    for stage, planes in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            # Both pairs of a block have the width that the first one needs.
            middle = inputs * planes * 3 * 3 * 3 // (inputs * 3 * 3 + 3 * planes)
            for part, channels in (("conv1", inputs), ("conv2", planes)):
                shapes[f"{name}.{part}.0.0.weight"] = (middle, channels, 1, 3, 3)
                shapes |= dict(norm_shapes(f"{name}.{part}.0.1", middle))
                shapes[f"{name}.{part}.0.3.weight"] = (planes, middle, 3, 1, 1)
                shapes |= dict(norm_shapes(f"{name}.{part}.1", planes))
            if stage > 1 and block == 0:
                shapes[f"{name}.downsample.0.weight"] = (planes, inputs, 1, 1, 1)
                shapes |= dict(norm_shapes(f"{name}.downsample.1", planes))
            inputs = planes
    return shapes | {"fc.weight": (num_classes, 512), "fc.bias": (num_classes,)}


def plain_forward(model: nn.Module, x: Tensor) -> Tensor:
    """torchvision's forward from a model's parameters, for evaluation; any widths."""
    tensors = model.state_dict()

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            tensors[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def conv(name: str, x: Tensor, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        weight = tensors[f"{name}.weight"]
        return F.conv3d(x, weight, None, stride, [size // 2 for size in weight.shape[2:]])

    x = F.relu(norm("stem.1", conv("stem.0", x, (1, 2, 2))))
    x = F.relu(norm("stem.4", conv("stem.3", x)))
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            s = 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(f"{name}.conv1.0.1", conv(f"{name}.conv1.0.0", x, (1, s, s))))
            y = F.relu(norm(f"{name}.conv1.1", conv(f"{name}.conv1.0.3", y, (s, 1, 1))))
            y = F.relu(norm(f"{name}.conv2.0.1", conv(f"{name}.conv2.0.0", y)))
            y = norm(f"{name}.conv2.1", conv(f"{name}.conv2.0.3", y))
            if s == 2:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, (s, s, s)))
            x = F.relu(x + y)
    return F.linear(F.adaptive_avg_pool3d(x, 1).flatten(1), tensors["fc.weight"], tensors["fc.bias"])

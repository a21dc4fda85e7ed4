"""Real pictures for the model suite: a crop that moves over photographs which scikit-image installs."""

from __future__ import annotations

import torch
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIZE = 224
STEP = (3, 5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_clips(clips: int, frames: int) -> Tensor:  # [clips * frames, 3, 224, 224]
    """Float32 clips, one per photograph, normalised as for ImageNet; frame t of clip b is row b * frames + t.

    The shorter side of each photograph is scaled to 256 pixels and the crop moves by (3, 5) pixels per frame.
    Raises ValueError when more clips are asked for than there are photographs, and ImportError without
    scikit-image.
    """
    if clips > len(PHOTOGRAPHS):
        raise ValueError(f"expected at most {len(PHOTOGRAPHS)} clips, got {clips}")
    from skimage import data

    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    rows = []
    for name in PHOTOGRAPHS[:clips]:
        pixels = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1).float() / 255
        scale = 256 / min(pixels.shape[1:])
        size = [round(side * scale) for side in pixels.shape[1:]]
        picture = torch.nn.functional.interpolate(
            pixels[None], size, mode="bilinear", align_corners=False, antialias=True
        )[0]
        picture = (picture - mean) / std
        for t in range(frames):
            top = min(STEP[0] * t, size[0] - SIZE)
            left = min(STEP[1] * t, size[1] - SIZE)
            rows.append(picture[:, top : top + SIZE, left : left + SIZE])
    return torch.stack(rows)

"""Cuts patches where a policy's actions say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adakernels.ops import _checks
from adakernels.ops.patch_gather import patch_gather


class PatchGather(nn.Module):
    """Cuts a patch out of each frame at a place given in [0, 1]² (AdaFocusV2, Wang et al., CVPR 2022).

    The action (0, 0) means the frame's top left corner, (1, 1) the bottom right one; in between the patch's
    origin is action · (S - P), for a frame of S and a patch of P pixels. Actions beyond [0, 1] are clamped.

    Args:
        size: (P_h, P_w) in pixels, or one number for both.
        mean, std: a number for each channel, as in `adakernels.patch_gather`, or None. No part of the state.

    Raises:
        ValueError, TypeError: for a size below 1 or of a wrong type; when called, as `patch_gather`.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        size: int | Sequence[int],
        *,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.size = _checks.per_dimension("PatchGather", "size", size, 2, 1)
        for name, constant in (("mean", mean), ("std", std)):
            tensor = None if constant is None else torch.as_tensor(constant, dtype=torch.float32)
            self.register_buffer(name, tensor, persistent=False)

    def forward(
        self,
        input: Tensor,  # [N, C, H, W]
        action: Tensor,  # [M, 2]
        *,
        frame_index: Tensor | None = None,  # [M]
    ) -> Tensor:  # [M, C, P_h, P_w]
        """Patches at action · (S - P); `input`, `frame_index` and result are those of `patch_gather`.

        Args:
            action: [M, 2] in (y, x) order; half precision is computed with in float32.
        """
        # What is no frame or action is refused by the operator.
        if input.dim() == 4 and action.dim() == 2 and action.shape[1] == 2:
            if action.dtype in (torch.float16, torch.bfloat16):
                action = action.to(torch.float32)
            height, width = (extent - p for extent, p in zip(input.shape[2:], self.size, strict=True))
            if height == width:
                action = action * height
            else:
                action = torch.stack((action[:, 0] * height, action[:, 1] * width), 1)
        return patch_gather(input, action, self.size, frame_index=frame_index, mean=self.mean, std=self.std)

    def extra_repr(self) -> str:
        return f"size={self.size}"

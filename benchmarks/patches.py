"""Patches of frames in their forms: sampled on a grid as done today, cut as integer slices, and ours."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import adakernels as ak
from benchmarks.cases import PatchCase
from benchmarks.measure import FORMATS


class Patches:
    """Random frames, origins and upstream gradients of a case, contiguous; uint8 frames are normalised."""

    def __init__(self, case: PatchCase) -> None:
        self.case = case
        random = torch.Generator().manual_seed(case.seed)
        shape = (case.frames or case.batch, case.channels, case.extent, case.extent)
        self.mean = self.std = self.frame_index = None
        if case.dtype == torch.uint8:
            self.input = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
            self.mean, self.std = (torch.rand(case.channels, generator=random) + 0.1 for _ in range(2))
        else:
            self.input = torch.randn(shape, generator=random)
        if case.frames is not None:
            self.frame_index = torch.randint(0, case.frames, (case.batch,), generator=random)
        self.origin = torch.rand(case.batch, 2, generator=random) * (case.extent - case.patch)
        self.corners = self.origin.round().int().tolist()
        self.upstream = torch.randn(case.batch, case.channels, case.patch, case.patch, generator=random)
        self.origin.requires_grad_(case.gradients is not None)
        self.input.requires_grad_(case.gradients == "both")

    def in_format(self, name: str) -> Patches:
        """The same patches of frames in the memory format of that name."""
        other = copy(self)
        other.input = self.input.detach().contiguous(memory_format=FORMATS[name])
        other.input.requires_grad_(self.input.requires_grad)
        other.upstream = self.upstream.contiguous(memory_format=FORMATS[name])
        return other

    def _normalised(self, pixels: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return pixels
        return (pixels / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def _gradients(self, output: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.case.gradients is None:
            return output
        leaves = (self.origin, self.input) if self.case.gradients == "both" else (self.origin,)
        return torch.autograd.grad(output, leaves, self.upstream)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional = self.input, self.origin, self.case.patch
        return positional, {"frame_index": self.frame_index, "mean": self.mean, "std": self.std}

    def ours(self) -> Tensor | tuple[Tensor, ...]:
        """The package's operator, and the case's gradients."""
        positional, named = self._arguments()
        return self._gradients(ak.patch_gather(*positional, **named))

    def sampled(self) -> Tensor | tuple[Tensor, ...]:
        """`affine_grid` and `grid_sample` of the normalised frames, and the case's gradients."""
        frames = self._normalised(self.input)
        if self.frame_index is not None:
            frames = frames[self.frame_index]
        case = self.case
        scale = torch.full_like(self.origin[:, 0], case.patch / case.extent)
        y, x = (2 * self.origin / case.extent + case.patch / case.extent - 1).unbind(1)
        zero = torch.zeros_like(scale)
        theta = torch.stack((scale, zero, x, zero, scale, y), 1).unflatten(1, (2, 3))
        grid = F.affine_grid(theta, list(self.upstream.shape), align_corners=False)
        return self._gradients(F.grid_sample(frames, grid, align_corners=False))

    def slices(self) -> Tensor:
        """The patches at the nearest whole pixels, cut in a loop: what has no gradient to the origin."""
        size = self.case.patch
        rows = range(self.case.batch) if self.frame_index is None else self.frame_index.tolist()
        cut = [
            self.input[row, :, y : y + size, x : x + size]
            for row, (y, x) in zip(rows, self.corners, strict=True)
        ]
        return self._normalised(torch.stack(cut))

    def backend(self) -> str | None:
        """The backend that runs the operator."""
        positional, named = self._arguments()
        return ak.explain(ak.patch_gather, *positional, **named).backend

"""The tests of the GPU kernels: called directly, so they also run where no GPU is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that nothing uninitialised passes unseen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    # On a GPU the reference would convolve float32 as TF32.
    torch.backends.cudnn.allow_tf32 = False
    # On a GPU the gradient of the reference has no deterministic algorithm.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

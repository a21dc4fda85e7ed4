"""Fixtures of the operator tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from adakernels import _extension, use_backend


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that nothing uninitialised passes unseen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cpu_backend() -> Iterator[None]:
    """Runs the test on the C++ kernels. Without them it is skipped, but fails in CI, where they must be."""
    if not _extension.has_cpu:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must test the compiled extension: {_extension.why_not}")
        pytest.skip(_extension.why_not)
    with use_backend("cpu"):
        yield


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every backend in turn."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_backend")
    with use_backend(request.param):
        yield request.param

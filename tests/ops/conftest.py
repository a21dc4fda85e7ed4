"""Fixtures of the operator tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

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


@pytest.fixture(params=["portable", "avx2", "avx512"])
def on_instruction_set(request: pytest.FixtureRequest, cpu_backend: None) -> Callable[..., None]:
    """Runs tests, named as for pytest's command, in a process of their own on each instruction set."""
    environment = os.environ | {"ADAKERNELS_CPU_ISA": request.param}
    command = [sys.executable, "-c", "from adakernels import _C; print(_C.best_isa())"]
    chosen = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if chosen.stdout.strip() != request.param:
        pytest.skip(f"this processor has no {request.param}")

    def run(*tests: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

    return run

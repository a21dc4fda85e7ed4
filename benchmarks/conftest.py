from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from benchmarks import cases, dynamic, memory, sliced, slim


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adakernels")
    group.addoption("--quick", action="store_true", help="a small part of every suite")
    group.addoption("--threads", type=int, help="threads that PyTorch and adakernels may use")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sources: dict[str, Sequence[Any]] = {
        "layer_case": cases.LAYERS,
        "backward_case": cases.BACKWARD,
        "model_case": cases.MODELS,
        "patch_case": cases.PATCHES,
        "memory_case": cases.MEMORY,
        "clip_memory_case": memory.MEMORY_3D,
        "clip_case": sliced.CLIPS,
        "clip_backward_case": sliced.BACKWARD,
        "ada3d_case": sliced.MODELS,
        "slim_case": slim.SLIM,
        "slim_backward_case": slim.BACKWARD,
        "slim_model_case": slim.SLIM_MODELS,
        "dynamic_case": dynamic.LAYERS,
        "vared2_case": dynamic.MODELS,
    }
    for argument, source in sources.items():
        if argument in metafunc.fixturenames:
            chosen = [case for case in source if case.quick or not metafunc.config.getoption("--quick")]
            metafunc.parametrize(argument, chosen, ids=lambda case: f"{case.family}-{case.name}")


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether to take as few rounds and variants as the protocol allows."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads") or before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)

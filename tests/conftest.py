"""What every test shares: a fixed number of threads and the settings of the fuzzing."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# The first call of a shape may compile, allocate or wait for another process: no deadline holds.
hypothesis.settings.register_profile(
    "ci", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)

"""What every test shares: a fixed number of threads and the settings of the fuzzing."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Compiled and multi-threaded calls have no steady run time, so that no deadline holds.
hypothesis.settings.register_profile("ci", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)

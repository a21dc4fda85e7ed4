"""Patches against affine_grid + grid_sample, against integer slices, and against a copy of the output."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

import adakernels as ak
from benchmarks.cases import PatchCase
from benchmarks.measure import FORMATS, contest, medians
from benchmarks.patches import Patches

# Calls of ours are too short to be timed one by one. Of several in a row the later ones find the frames where
# the first left them; so do the baselines.
SAMPLE_TIME = 1e-2
# Ours sums in another order than the reference; the baseline's float32 grid is off by some 1e-4 of a pixel.
TOLERANCES = {"ours": 1e-4, "sampled": 1e-2}


def test_patches(benchmark: Any, patch_case: PatchCase, quick: bool) -> None:
    plain = Patches(patch_case)
    forms = {name: plain.in_format(name) for name in FORMATS}
    groups = {
        "copy": {"contiguous": plain.upstream.clone},
        "sampled": {name: form.sampled for name, form in forms.items()},
        "ours": {name: form.ours for name, form in forms.items()},
    }
    recording = patch_case.gradients is not None
    if not recording:
        groups["slices"] = {name: form.slices for name, form in forms.items()}
    with torch.inference_mode(not recording):
        with ak.use_backend("reference"):
            expected = plain.ours()
        record = contest(benchmark, groups, expected, TOLERANCES, quick=quick, sample_time=SAMPLE_TIME)
    seconds = medians(record)
    benchmark.group = patch_case.family
    benchmark.extra_info.update(
        family=patch_case.family,
        case=patch_case.name,
        shape=asdict(patch_case) | {"dtype": str(patch_case.dtype).removeprefix("torch.")},
        backend=plain.backend(),
        bytes=patch_case.bytes,
        **record,
        speedup=seconds["sampled"] / seconds["ours"],
        copy_ratio=seconds["ours"] / seconds["copy"],
    )

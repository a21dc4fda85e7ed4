"""Whole networks on clips of real pictures, policy heads included and running."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import adakernels as ak
from benchmarks.cases import CLIP, ModelCase
from benchmarks.clips import load_clips
from benchmarks.measure import FORMATS, compare
from benchmarks.networks import FoldedResNet, in_format, prepare


def test_model(benchmark: Any, model_case: ModelCase, quick: bool) -> None:
    """Ours against the plain backbone; the masked baseline is our model on the reference backend."""
    frames = load_clips(model_case.clips, CLIP)
    ours, work = prepare(model_case, frames)
    inputs = {name: frames.contiguous(memory_format=order) for name, order in FORMATS.items()}
    models = {name: in_format(ours, order) for name, order in FORMATS.items()}
    dense = {name: FoldedResNet(ours, CLIP, order) for name, order in FORMATS.items()}

    def masked(name: str) -> torch.Tensor:
        with ak.use_backend("reference"):
            return models[name](inputs[name])

    with torch.inference_mode():
        policies = ours(frames, return_policies=True)[1]
        record = compare(
            benchmark,
            ours={name: partial(models[name], inputs[name]) for name in FORMATS},
            dense={name: partial(dense[name], inputs[name]) for name in FORMATS},
            masked={name: partial(masked, name) for name in FORMATS},
            expected=masked("contiguous"),
            work=work,
            quick=quick,
            tolerance=1e-3,
        )
    shares = torch.cat([policy.flatten() for policy in policies.values()]).bincount(minlength=3)
    benchmark.group = "model"
    benchmark.extra_info.update(
        family="model",
        case=model_case.name,
        clips=model_case.clips,
        frames=CLIP,
        target_work=model_case.work,
        policy_shares=dict(zip(("keep", "reuse", "skip"), (shares / shares.sum()).tolist(), strict=True)),
        **record,
    )

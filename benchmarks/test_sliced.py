"""Sliced 3D convolutions against dense and masked ones, and Ada3D against the plain 3D network."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import adakernels as ak
from benchmarks.dense import DENSE_FORMS, FORMATS
from benchmarks.measure import WARM_UP_3D, contest, contest_of_networks, report_3d, upstream_gradient
from benchmarks.sliced import Ada3DCase, ClipCase, Clips, FoldedI3D


def test_clips(benchmark: Any, clip_case: ClipCase, quick: bool) -> None:
    plain = Clips(clip_case)
    forms = {name: plain.in_format(name) for name in FORMATS}
    groups = {
        "dense": {name: form.dense for name, form in forms.items()}
        | {f"{name}, summed": form.summed for name, form in forms.items()},
        "masked": {name: form.masked for name, form in forms.items()},
        "ours": {name: form.ours for name, form in forms.items()},
    }
    with torch.inference_mode():
        expected = plain.reference()
        tolerances = {"ours": 1e-4, "masked": 1e-4}
        record = contest(
            benchmark, groups, expected, tolerances, quick=quick, warm_up=WARM_UP_3D, together=plain.together
        )
    facts = {"shape": asdict(clip_case), "backend": plain.backend()}
    report_3d(benchmark, clip_case, record, plain.work, **facts)


def test_clips_backward(benchmark: Any, clip_backward_case: ClipCase, quick: bool) -> None:
    """Forward and backward to input, weight and bias; the result that is checked is the three gradients."""
    plain = Clips(clip_backward_case)
    forms = {name: plain.in_format(name) for name in FORMATS}
    for form in forms.values():
        for leaf in (*form.leaves("ours"), *form.leaves("summed")):
            leaf.requires_grad_()
    output = plain.reference()
    upstream = upstream_gradient(output, clip_backward_case.seed)
    upstreams = {name: upstream.contiguous(memory_format=order) for name, order in FORMATS.items()}

    def variants(way: str) -> dict[str, Any]:
        return {name: partial(form.gradients, way, upstreams[name]) for name, form in forms.items()}

    with ak.use_backend("reference"):
        expected = forms["contiguous"].gradients("ours", upstream)
    summed = {f"{name}, summed": runner for name, runner in variants("summed").items()}
    groups = {
        "dense": variants("dense") | summed,
        "masked": variants("masked"),
        "ours": variants("ours"),
    }
    tolerances = {"ours": 1e-3, "masked": 1e-3}
    record = contest(benchmark, groups, expected, tolerances, quick=quick, warm_up=WARM_UP_3D)
    facts = {"shape": asdict(clip_backward_case), "backend": plain.backend()}
    report_3d(benchmark, clip_backward_case, record, plain.work, **facts)


def test_ada3d(benchmark: Any, ada3d_case: Ada3DCase, quick: bool) -> None:
    """Ours against the plain network on all frames; policies are given, their heads are not run."""
    torch.manual_seed(0)
    model = ak.models.ada3d_i3d_resnet50().eval()
    clips = torch.randn(ada3d_case.clips, 3, 8, 256, 256)
    temporal, keep = ada3d_case.policies()
    groups = {
        "dense": {form: partial(FoldedI3D(model, form), clips) for form in DENSE_FORMS},
        "ours": {"channels_last": partial(model, clips, temporal, keep)},
    }
    with torch.inference_mode():
        with ak.use_backend("reference"):
            expected = model(clips, temporal, keep)
        record = contest_of_networks(benchmark, groups, expected, quick=quick, clips=ada3d_case.clips)
        count = ak.count_flops(model, clips, temporal, keep)
    work = float(count.actual.mean() / count.dense)
    report_3d(benchmark, ada3d_case, record, work, clips=ada3d_case.clips, frames=clips.shape[2])

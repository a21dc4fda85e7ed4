"""Dynamic 3D convolutions against dense and masked ones, and VA-RED² against the plain network."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import adakernels as ak
from benchmarks.dense import DENSE_FORMS, FORMATS
from benchmarks.dynamic import DynamicCase, DynamicLayer, FoldedR2Plus1d, VARed2Case, prepare
from benchmarks.measure import WARM_UP_3D, contest, contest_of_networks, efficiency, medians, report_3d


def test_dynamic_layer(benchmark: Any, dynamic_case: DynamicCase, quick: bool) -> None:
    plain = DynamicLayer(dynamic_case)
    forms = {name: plain.in_format(name) for name in FORMATS}
    groups = {
        "dense": {name: form.dense for name, form in forms.items()}
        | {f"{name}, 2D": form.summed for name, form in forms.items()},
        "masked": {name: form.masked for name, form in forms.items()},
        "ours": {name: form.ours for name, form in forms.items()},
    }
    with torch.inference_mode():
        expected = plain.reference()
        record = contest(
            benchmark,
            groups,
            expected,
            {"ours": 1e-4, "masked": 1e-4},
            quick=quick,
            warm_up=WARM_UP_3D,
        )
    seconds = medians(record)
    computed = dynamic_case.work(filters=False)
    report_3d(benchmark, dynamic_case, record, dynamic_case.work(filters=True))
    benchmark.extra_info.update(
        shape=asdict(dynamic_case),
        backend=plain.backend(),
        computed_ratio=computed,
        eta_without_filters=efficiency(seconds["dense"], seconds["ours"], computed),
    )


def test_vared2(benchmark: Any, vared2_case: VARed2Case, quick: bool) -> None:
    """Ours, gates running, against the plain network."""
    model, clips, work = prepare(vared2_case)
    groups = {
        "dense": {form: partial(FoldedR2Plus1d(model, form), clips) for form in DENSE_FORMS},
        "ours": {"contiguous": partial(model, clips)},
    }
    with torch.inference_mode():
        with ak.use_backend("reference"):
            expected = model(clips)
        record = contest_of_networks(benchmark, groups, expected, quick=quick, clips=vared2_case.clips)
    report_3d(benchmark, vared2_case, record, work)
    benchmark.extra_info.update(
        clips=vared2_case.clips, target_work=vared2_case.work, published=vared2_case.published
    )

"""Slimmed layers against layers allocated at that width, and A3D networks against the whole network."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import adakernels as ak
from adakernels.models import a3d_slow_resnet50
from benchmarks.dense import DENSE_FORMS
from benchmarks.measure import contest, efficiency, masked_ratio, medians
from benchmarks.slim import DenseSlow, SlimCase, SlimLayer, SlimModelCase


def test_slim(benchmark: Any, slim_case: SlimCase, quick: bool) -> None:
    layer = SlimLayer(slim_case)
    with torch.inference_mode():
        groups = {"dense": layer.dense(), "masked": layer.sliced(), "ours": layer.ours()}
        expected, tolerances = layer.reference(), {"dense": 1e-4, "masked": 1e-4, "ours": 1e-4}
        record = contest(benchmark, groups, expected, tolerances, quick=quick)
    _report(benchmark, slim_case, layer, record)


def test_slim_backward(benchmark: Any, slim_backward_case: SlimCase, quick: bool) -> None:
    """Forward and backward to input, weight and bias; the result that is checked is the three gradients."""
    layer = SlimLayer(slim_backward_case)
    groups = layer.gradients()
    with ak.use_backend("reference"):
        expected = groups["ours"]["contiguous"]()
    record = contest(benchmark, groups, expected, {"masked": 1e-3, "ours": 1e-3}, quick=quick)
    _report(benchmark, slim_backward_case, layer, record)


def _report(benchmark: Any, case: SlimCase, layer: SlimLayer, record: dict[str, Any]) -> None:
    seconds = medians(record)
    benchmark.group = case.family
    benchmark.extra_info.update(
        family=case.family,
        case=case.name,
        backend=layer.backend(),
        width=case.width,
        macs=case.macs,
        time_ratio=seconds["ours"] / seconds["dense"],
        masked_ratio=masked_ratio(record),
        **record,
    )


def test_slim_model(benchmark: Any, slim_model_case: SlimModelCase, quick: bool) -> None:
    """Ours within a budget, the fitting of the clip included, against the whole network on the whole clip."""
    torch.manual_seed(0)
    model = a3d_slow_resnet50().eval()
    clip = torch.randn(1, 3, 8, 256, 256)
    budget = {"width": slim_model_case.width, "size": slim_model_case.size, "frames": slim_model_case.frames}
    model.set_budget(**budget)
    with torch.inference_mode():
        count = ak.count_flops(model, clip)
        whole = ak.count_flops(_unbounded(model), clip)
        model.set_budget(**budget)
        with ak.use_backend("reference"):
            expected = model(clip)
        record = contest(
            benchmark,
            {
                "dense": {form: partial(DenseSlow(model, form), clip) for form in DENSE_FORMS},
                "ours": {"model": partial(model, clip)},
            },
            expected,
            {"ours": 1e-3},
            quick=quick,
            finalists=1,
        )
    seconds = medians(record)
    work = float(count.actual.mean()) / whole.dense
    benchmark.group = "slim_model"
    benchmark.extra_info.update(
        family="slim_model",
        case=slim_model_case.name,
        macs=float(count.actual.mean()) * 1e9,
        work_ratio=work,
        time_ratio=seconds["ours"] / seconds["dense"],
        eta=efficiency(seconds["dense"], seconds["ours"], work),
        **record,
    )


def _unbounded(model: Any) -> Any:
    model.set_budget()
    return model

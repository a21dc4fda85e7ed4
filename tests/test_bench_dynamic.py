"""The forms of the dynamic suite compute the same, and their records make a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import dynamic, measure, report
from benchmarks.dense import DENSE_FORMS, FORMATS
from benchmarks.dynamic import DynamicCase, DynamicLayer, VARed2Case


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
def test_layer_forms_agree(kernel: tuple[int, int, int], groups: int) -> None:
    levels = ((0, 0), (1, 2), (2, 1))
    plain = DynamicLayer(DynamicCase("dynamic_conv3d", 6, 12, 5, 8, levels, kernel, stride=2, groups=groups))
    assert plain.case.out_size == 4
    dense = plain.dense()
    for name in FORMATS:
        form = plain.in_format(name)
        for forward in (form.ours, form.masked):
            measure.assert_matches(forward(), plain.reference())
        for forward in (form.dense, form.summed):
            measure.assert_matches(forward(), dense)


def test_work() -> None:
    case = DynamicCase("dynamic_conv3d", 4, 8, 4, 5, ((0, 0), (1, 0), (1, 1), (0, 2)))
    assert case.work(filters=False) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 4) / 4)
    made = (0 + 1 / 2 + (1 / 4 + 1 / 2) + 3 / 4) / 4
    assert case.work(filters=True) == pytest.approx(case.work(filters=False) + made * 9 / 36)


def test_plain_network_and_share_of_work() -> None:
    small = VARed2Case(1, size=32)
    model, clips, share = dynamic.prepare(small)
    assert abs(share - small.work) < 0.03
    with torch.inference_mode():
        expected = model(clips, {})
        for form in DENSE_FORMS:
            measure.assert_matches(dynamic.FoldedR2Plus1d(model, form)(clips), expected, 1e-3)


def test_table() -> None:
    times = {"dense contiguous, 2D": {"p50": 2e-3}, "ours contiguous": {"p50": 1e-3}}
    record = {
        "family": "dynamic_conv3d",
        "case": "a",
        "times": times,
        "best": {"dense": "dense contiguous, 2D", "ours": "ours contiguous"},
        "computed_ratio": 0.25,
        "work_ratio": 0.375,
        "time_ratio": 0.5,
        "eta": 0.75,
    }
    network = record | {"family": "vared2_model", "published": 0.893}
    other = record | {"family": "gated_3x3"}
    lines = report.render_3d({"records": [record, network, other]}, report.DYNAMIC).splitlines()[2:]
    assert lines[0] == "| a | 0.38 | 2.00 (contiguous, 2D) |  | 1.00 (contiguous) | 0.50 | 0.75 | 0.25 |  |"
    assert len(lines) == 2 and "| 0.89 |" in lines[1]

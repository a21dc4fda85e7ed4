"""The benchmarks' own arithmetic: policies, protocol, memory, report and command."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import adakernels as ak
from adakernels import bench, models
from adakernels.ops import gated_conv2d_flops, needed_channels

ROOT = Path(__file__).resolve().parents[1]
# The suites are no part of the installed package.
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    cases,
    clips,
    dynamic,
    gpu,
    measure,
    memory,
    networks,
    report,
    sliced,
    slim,
)
from benchmarks.cases import KEEP, REUSE, SKIP, ConvShape, LayerCase  # noqa: E402
from benchmarks.dense import DENSE_FORMS, FORMATS  # noqa: E402
from benchmarks.layers import Layer  # noqa: E402
from benchmarks.patches import Patches  # noqa: E402


class Clock:
    """Time that passes only in runners."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, seconds: float, result: Any = None) -> Callable[[], Any]:
        def run() -> Any:
            self.now += seconds
            self.log.append(name)
            return result

        return run


class FakeBenchmark:
    """The part of pytest-benchmark's fixture that the protocol uses, on a clock of ours."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.stats: Any = None

    def pedantic(
        self, target: Callable[[], Any], setup: Callable[[], None], rounds: int, iterations: int
    ) -> Any:
        assert iterations == 1
        data = []
        for _ in range(rounds):
            setup()
            start = self.clock()
            result = target()
            data.append(self.clock() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))
        return result


def test_efficiency() -> None:
    assert measure.efficiency(dense=1.0, ours=0.5, work=0.5) == 1.0
    assert measure.efficiency(dense=1.0, ours=1.7, work=0.7) == pytest.approx(0.4118, abs=1e-4)


def test_spread() -> None:
    spread = measure.spread([float(i) for i in range(15, 0, -1)])
    assert spread == {"p20": 3.0, "p50": 8.0, "p80": 12.0, "rounds": 15}
    assert measure.spread([1.0, 2.0])["p50"] == 1.5
    assert measure.spread([4.0]) == {"p20": 4.0, "p50": 4.0, "p80": 4.0, "rounds": 1}


def test_runners_take_turns() -> None:
    clock = Clock()
    race = measure.Race({name: clock.runner(name, 1.0) for name in "ABC"}, timer=clock)
    race.run(4)
    assert "".join(clock.log) == "ABC" + "BCA" + "CAB" + "ABC"
    assert all(samples == [1.0] * 4 for samples in race.samples.values())


def test_short_runners_are_timed_in_blocks() -> None:
    clock = Clock()
    race = measure.Race(
        {"A": clock.runner("A", 0.25), "B": clock.runner("B", 1.0)}, sample_time=1.0, timer=clock
    )
    race.warm_up()
    assert race.calls == {"A": 4, "B": 1}
    clock.log.clear()
    race.run(1)
    assert clock.log == ["A"] * 4 + ["B"]
    assert race.samples == {"A": [0.25], "B": [1.0]}


def test_pytest_benchmark_holds_our_samples() -> None:
    clock = Clock()
    race = measure.Race({"A": clock.runner("A", 1.0), "B": clock.runner("B", 2.0, "result")}, timer=clock)
    benchmark = FakeBenchmark(clock)
    assert race.run_for(benchmark, "B", rounds=3) == "result"
    assert clock.log == ["A", "B"] * 3
    assert race.samples == {"A": [1.0] * 3, "B": [2.0] * 3}
    assert benchmark.stats.stats.data == race.samples["B"]


def test_rounds() -> None:
    assert measure.rounds_for(10.0, 1.0) == 15
    assert measure.rounds_for(0.04, 1.0) == 25
    assert measure.rounds_for(1e-6, 1.0) == 60


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "Race", partial(measure.Race, timer=clock))
    return clock


def race_of(clock: Clock, result: Tensor, expected: Tensor, quick: bool) -> dict[str, Any]:
    def variants(name: str, slow: float, fast: float) -> dict[str, Callable[[], Tensor]]:
        return {"x": clock.runner(f"{name} x", slow, result), "y": clock.runner(f"{name} y", fast, result)}

    return measure.compare(
        FakeBenchmark(clock),
        ours=variants("ours", 0.5, 0.45),
        dense=variants("dense", 1.2, 1.0),
        masked=variants("masked", 2.7, 1.8),
        expected=expected,
        work=0.36,
        quick=quick,
    )


@pytest.mark.parametrize("quick", [False, True])
def test_fastest_variants_are_compared(clock: Clock, quick: bool) -> None:
    record = race_of(clock, torch.ones(2), torch.ones(2), quick)
    assert record["best"] == {"dense": "dense y", "masked": "masked y", "ours": "ours y"}
    assert record["time_ratio"] == pytest.approx(0.45)
    assert record["masked_ratio"] == pytest.approx(0.25)
    assert record["eta"] == pytest.approx(0.8)
    # What is 25 % slower than its set's best in the warm-up can't win; --quick keeps the winners only.
    winners = {"ours y", "dense y", "masked y"}
    assert set(record["times"]) == winners | (set() if quick else {"ours x", "dense x"})
    assert all(record["times"][name]["rounds"] == 15 for name in winners)
    # The last two races are between two each.
    assert clock.log[-30:] == ["dense y", "ours y"] * 15
    assert sorted(clock.log[-60:-30]) == ["masked y"] * 15 + ["ours y"] * 15


@pytest.mark.parametrize("finalists", [1, 2])
def test_finalists_and_untimed_reshaping(clock: Clock, finalists: int) -> None:
    seconds = {"x": 1.0, "y": 1.1, "z": 1.2}
    groups = {
        group: {
            name: clock.runner(f"{group} {name}", time, [torch.ones(2)]) for name, time in seconds.items()
        }
        for group in ("dense", "ours")
    }

    def together(result: measure.Result) -> measure.Result:
        clock.now += 1000
        return torch.cat(tuple(result))

    record = measure.contest(
        FakeBenchmark(clock),
        groups,
        torch.ones(2),
        {"ours": 1e-4},
        quick=False,
        finalists=finalists,
        together=together,
    )
    kept = list(seconds)[:finalists]
    assert set(record["times"]) == {f"{group} {name}" for group in groups for name in kept}
    assert measure.medians(record) == pytest.approx({"dense": 1.0, "ours": 1.0})


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_wrong_result_has_no_speed(clock: Clock, wrong: float) -> None:
    with pytest.raises(AssertionError, match="result is off by"):
        race_of(clock, torch.tensor([1.0, wrong]), torch.ones(2), quick=True)


def test_matching_several_results() -> None:
    measure.assert_matches((torch.ones(2), torch.zeros(0)), (torch.ones(2), torch.zeros(0)))
    with pytest.raises(AssertionError, match=r"expected a result of shape \[3\], got \[2\]"):
        measure.assert_matches(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("batch", cases.BATCHES)
@pytest.mark.parametrize("updated", cases.UPDATED)
def test_policies_reach_u(updated: float, batch: int) -> None:
    policy = cases.draw_policy(updated, batch, 512, cases.CLIP, seed=3)
    assert policy.shape == (batch, 512) and policy.dtype == torch.int64
    share = cases.updated_mask(policy, cases.CLIP).double().mean().item()
    assert share == pytest.approx(updated, abs=0.02)
    kept, reused = (policy == KEEP).double().mean(), (policy == REUSE).double().mean()
    if updated < 1:
        assert float(reused / kept) == pytest.approx(cases.REUSED_PER_KEPT, abs=0.04)
    else:
        assert float(kept) == 1
    assert torch.equal(policy, cases.draw_policy(updated, batch, 512, cases.CLIP, seed=3))


@pytest.mark.parametrize("skipped", cases.SKIPPED)
def test_in_policies_reach_their_share(skipped: float) -> None:
    policy = cases.draw_in_policy(skipped, 32, 512, seed=4)
    assert (policy == SKIP).double().mean().item() == pytest.approx(skipped, abs=0.02)
    assert set(policy.unique().tolist()) == {KEEP, REUSE, SKIP}


def test_updated_channels() -> None:
    policy = torch.tensor([[KEEP, SKIP, SKIP], [SKIP, REUSE, SKIP], [KEEP, KEEP, REUSE], [SKIP, REUSE, KEEP]])
    expected = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(cases.updated_mask(policy, 2), expected)
    drawn = cases.draw_policy(0.5, 32, 64, 8, seed=0)
    assert torch.equal(cases.updated_mask(drawn, 8), needed_channels(drawn, 8))


@pytest.mark.parametrize("groups", [1, 12])
def test_work_ratio_is_the_operators_count(groups: int) -> None:
    shape = ConvShape(12, 24 if groups == 1 else 12, 6, groups=groups)
    policy = cases.draw_policy(0.5, 16, shape.out_channels, 8, seed=1)
    in_policy = cases.draw_in_policy(0.25, 16, 12, seed=2)
    dense, actual = gated_conv2d_flops(
        (16, 12, 6, 6),
        (shape.out_channels, 12 // groups, 3, 3),
        policy,
        frames=8,
        output_size=(6, 6),
        groups=groups,
        in_policy=in_policy,
    )
    ratio = cases.work_ratio(shape, policy, in_policy, 8)
    assert ratio == pytest.approx(actual.mean().item() / dense)
    assert shape.macs_per_channel * shape.out_channels == dense
    operations, _ = cases.floor(shape, policy, in_policy, 8, 16)
    assert operations == pytest.approx(2 * actual.sum().item())


def test_floor_counts_bytes() -> None:
    in_policy = torch.tensor([[KEEP, SKIP], [KEEP, SKIP]])
    _, moved = cases.floor(ConvShape(2, 3, 4, stride=2), None, in_policy, 2, 2)
    live_input, output, weights = 2 * 1 * 16, 2 * 3 * 4, 3 * 2 * 9
    assert moved == 4 * (live_input + output + weights)


def test_cases() -> None:
    known = cases.LAYERS + cases.BACKWARD + cases.MODELS + cases.MEMORY + cases.PATCHES
    known = [*known, *sliced.CLIPS, *sliced.MODELS, *slim.SLIM, *slim.SLIM_MODELS, *memory.MEMORY_3D]
    known += [*dynamic.LAYERS, *dynamic.MODELS, *sliced.BACKWARD, *slim.BACKWARD]
    names = [f"{case.family}-{case.name}" for case in known]
    assert len(set(names)) == len(names)
    assert {case.batch for case in cases.LAYERS} == {8, 32}
    assert ConvShape(64, 128, 56, stride=2).out_size == 28
    for target in cases.TARGETS:
        found = [c for c in known if target.gathers(as_record(c))]
        assert found or target.family == "overhead", target


def test_layer_forms_agree() -> None:
    policies = {"updated": 0.5, "skipped": 0.25}
    for shape in (ConvShape(6, 8, 7), ConvShape(6, 6, 7, kernel=5, groups=6, activation="silu")):
        layer = Layer(LayerCase("gated_3x3", shape, 16, **policies))
        expected = layer.reference()
        for name in measure.FORMATS:
            form = layer.in_format(name)
            measure.assert_matches(form.masked(), expected)
            measure.assert_matches(form.ours(), expected)
        assert 0 < layer.work < 0.6


def test_slim_forms_agree() -> None:
    for case in (
        slim.SlimCase(64, 32, (1, 3, 3), 9, 2, 0.63, stride=2),
        slim.SlimCase(96, 32, (3, 1, 1), 7, 3, 0.5, lateral=32),
        slim.SlimCase(32, 48, (1, 1, 1), 6, 2, 0.83),
    ):
        layer = slim.SlimLayer(case)
        with torch.inference_mode():
            expected = layer.reference()
            assert case.macs * expected.shape[0] == expected.numel() * case.slimmed[0] * math.prod(
                case.kernel
            )
            for form in (layer.dense(), layer.sliced(), layer.ours()):
                for runner in form.values():
                    measure.assert_matches(runner(), expected)
        assert layer.backend() == "cpu"


def test_dense_slow_is_the_network_at_full_budget() -> None:
    torch.manual_seed(0)
    model = models.a3d_slow_resnet50(num_classes=3, frames=2).eval()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm3d)):
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
        torch.nn.init.normal_(norm.running_mean)
    clip = torch.randn(1, 3, 2, 40, 40)
    with torch.inference_mode():
        for form in DENSE_FORMS:
            measure.assert_matches(slim.DenseSlow(model, form)(clip), model(clip), 1e-3)


def test_slim_table() -> None:
    record = {
        "family": "slim",
        "case": "layer",
        "macs": 5e8,
        "time_ratio": 0.5,
        "times": {"a": {"p50": 2e-3}, "b": {"p50": 1e-3}, "c": {"p50": 4e-3}},
        "best": {"dense": "a", "ours": "b", "masked": "c"},
    }
    rows = slim.render_slim([record, record | {"family": "model"}])
    assert rows == [("layer", "0.500", "2.000", "4.000", "1.000", "0.50x")]
    assert len(rows[0]) == len(slim.SLIM_HEADER)
    assert "<!-- bench:slim -->" in (ROOT / "docs" / "slim_conv.md").read_text()


@pytest.mark.parametrize("gradients", [None, "origin", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("frames", [None, 3])
def test_patch_forms_agree(dtype: torch.dtype, frames: int | None, gradients: str | None) -> None:
    if dtype == torch.uint8 and gradients == "both":
        gradients = "origin"
    plain = Patches(cases.PatchCase(4, 2, 17, 6, dtype, gradients, frames))
    expected = plain.ours()
    for name in measure.FORMATS:
        form = plain.in_format(name)
        measure.assert_matches(form.ours(), expected)
        measure.assert_matches(form.sampled(), expected, 1e-3)
    # Slices are what whole origins give.
    plain.origin = torch.tensor(plain.corners, dtype=torch.float32)
    plain.case, plain.input = replace(plain.case, gradients=None), plain.input.detach()
    measure.assert_matches(plain.slices(), plain.ours())


def test_patch_bytes() -> None:
    case = cases.PatchCase(4, 3, 10, 5, torch.uint8, frames=2)
    read, patches = 4 * 3 * 6 * 6, 4 * 3 * 5 * 5 * 4
    assert case.bytes == read + patches
    assert replace(case, gradients="origin").bytes == 2 * (read + patches)
    both = replace(case, gradients="both", dtype=torch.float32)
    assert both.bytes == 2 * (4 * read + patches) + patches + 2 * 3 * 10 * 10 * 4


def as_patch_record(case: cases.PatchCase, speedup: float, copy_ratio: float) -> dict[str, Any]:
    seconds = {"copy": 1e-3, "sampled": 2e-2, "ours": 2e-3}
    times = {name: {"p20": t, "p50": t, "p80": t, "rounds": 15} for name, t in seconds.items()}
    return {
        "family": case.family,
        "case": case.name,
        "bytes": 4e7,
        "times": times,
        "best": {name: name for name in times},
        "speedup": speedup,
        "copy_ratio": copy_ratio,
    }


def test_patch_rows() -> None:
    records = [as_patch_record(cases.PATCH, 12.0, 1.5), as_patch_record(cases.PATCHES[1], 3.0, 6.0)]
    rows = report.summarise(records)
    assert [row.verdict for row in rows] == ["hit", ""]
    assert rows[0].cells()[2] == "12.0x faster (1.50x a copy)" and "≥ 10.00 each" in rows[0].cells()
    assert rows[1].cells()[2] == "6.0x faster mean, 3.0x min (3.00x a copy)"
    assert [row.verdict for row in report.summarise([as_patch_record(cases.PATCH, 9.9, 1.0)])] == ["miss", ""]
    # 40 MB at 20 GB/s take 2 ms.
    page = report.render_patches(results_with(records))
    name = cases.PATCH.name
    assert f"| forward | {name} | 40.0 | 2.000 | 1.000 | 2.000 |  | 20.000 | 1.0x | 12.0x |" in page


@pytest.mark.parametrize("lengths", [(3, 3), (2, 1, 4)])
def test_clip_forms_agree(lengths: tuple[int, ...]) -> None:
    case = sliced.ClipCase(4, 6, 9, lengths, taps=3, kernel=3, stride=2)
    plain = sliced.Clips(case)
    twos = sum(lengths[::2])
    assert plain.work == pytest.approx(1 - twos / sum(lengths) * 2 / 3)
    with torch.inference_mode():
        expected, dense = plain.reference(), plain.together(plain.dense())
        assert not torch.allclose(expected, dense)
        for name, order in FORMATS.items():
            form = plain.in_format(name)
            assert all(clip.is_contiguous(memory_format=order) for clip in form.clips)
            measure.assert_matches(form.ours(), expected)
            measure.assert_matches(plain.together(form.masked()), expected)
            measure.assert_matches(plain.together(form.dense()), dense)
            measure.assert_matches(plain.together(form.summed()), dense)


def test_gradients_of_clip_forms_agree() -> None:
    plain = sliced.Clips(sliced.ClipBackwardCase(4, 6, 5, (3, 3)))
    plain.temporal = torch.ones(2, dtype=torch.bool)
    upstream = torch.randn(plain.reference().shape)
    with ak.use_backend("reference"):
        for leaf in plain.leaves("ours"):
            leaf.requires_grad_()
        expected = plain.gradients("ours", upstream)
    for name in FORMATS:
        form = plain.in_format(name)
        for tensor in (form.input, form.weight, form.bias, *form.taps):
            tensor.detach_().requires_grad_()
        for way in ("dense", "masked", "ours"):
            measure.assert_matches(form.gradients(way, upstream), expected)
        to_input, *to_taps, to_bias = form.gradients("summed", upstream)
        measure.assert_matches((to_input, torch.stack(to_taps, 2), to_bias), expected)


def test_gradients_of_slim_forms_agree() -> None:
    case = slim.SlimBackwardCase(32, 48, (3, 1, 1), 6, 2, 0.5)
    groups = slim.SlimLayer(case).gradients()
    with ak.use_backend("reference"):
        to_input, to_weight, to_bias = expected = groups["ours"]["contiguous"]()
    for group in ("masked", "ours"):
        for runner in groups[group].values():
            measure.assert_matches(runner(), expected)
    inputs, outputs = case.slimmed
    part = to_input, to_weight[:outputs, :inputs], to_bias[:outputs]
    for runner in groups["dense"].values():
        to_input, to_weight, to_bias = runner()
        measure.assert_matches((to_input, to_weight.reshape(part[1].shape), to_bias), part)


def test_folded_i3d_is_the_network() -> None:
    torch.manual_seed(0)
    model = models.ada3d_i3d_resnet50(num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    frames = torch.randn(1, 3, 3, 32, 32)
    with torch.inference_mode():
        for form in DENSE_FORMS:
            measure.assert_matches(sliced.FoldedI3D(model, form)(frames), model(frames), 1e-4)


@pytest.mark.parametrize("case", sliced.MODELS, ids=lambda case: case.name)
def test_ada3d_policies(case: sliced.Ada3DCase) -> None:
    temporal, keep = case.policies()
    assert temporal.shape == (case.clips, 5) and keep.shape == (case.clips, 8)
    assert temporal.sum() / case.clips == pytest.approx(2.2, abs=0.21)
    assert keep.sum() / case.clips == pytest.approx(5.7, abs=0.31) and keep.any(1).all()


def test_sliced_rows() -> None:
    records = [
        as_record(sliced.CLIPS[0], eta=0.9),
        as_record(sliced.MODELS[0], work_ratio=0.6, time_ratio=0.7, excess=0.1),
    ]
    assert [row.verdict for row in report.summarise(records)] == ["hit", "miss"]
    assert report.summarise(records)[1].cells()[2] == "+0.10 of dense"
    page = report.render_3d(results_with(records), report.SLICED)
    assert f"| {sliced.MODELS[0].name} | 0.60 | 2.00" in page


def test_clips() -> None:
    pytest.importorskip("skimage")
    frames = clips.load_clips(2, 8)
    assert frames.shape == (16, 3, 224, 224) and frames.dtype == torch.float32
    top, left = clips.STEP
    assert torch.equal(frames[0, :, top:, left:], frames[1, :, :-top, :-left])
    assert 0.3 < float(frames.std()) < 2
    with pytest.raises(ValueError, match="expected at most 4 clips, got 5"):
        clips.load_clips(5, 8)


@pytest.mark.parametrize("memory_format", measure.FORMATS.values(), ids=measure.FORMATS)
def test_folded_backbone_is_the_backbone(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight)
            torch.nn.init.normal_(module.bias)
    model.eval()
    frames = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        folded = networks.FoldedResNet(model, 2, memory_format)
        expected = model(frames).unflatten(0, (2, 2)).mean(1)
        measure.assert_matches(folded(frames), expected)


def test_model_reaches_its_work() -> None:
    case = cases.MODELS[0]
    frames = torch.randn(cases.CLIP, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    model, work = networks.prepare(case, frames)
    assert work == pytest.approx(case.work, abs=0.01)
    assert not model.training
    again, _ = networks.prepare(case, frames)
    with torch.inference_mode():
        assert torch.equal(model(frames), again(frames))


@pytest.mark.skipif(not memory.available(), reason="peak memory is read from Linux's /proc/self/clear_refs")
def test_peak_memory_sees_tensors_and_native_scratch() -> None:
    script = (
        "import ctypes, torch\n"
        "from benchmarks.memory import peak_of_call\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "def call():\n"
        "    tensor = torch.ones(16 << 20)\n"
        "    scratch = libc.malloc(32 << 20)\n"
        "    ctypes.memset(scratch, 1, 32 << 20)\n"
        "    libc.free(scratch)\n"
        "    return tensor\n"
        "peak_of_call(call)\n"
        "print(peak_of_call(call))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=memory.child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == pytest.approx(96 << 20, rel=0.05)


def as_record(
    case: LayerCase
    | cases.ModelCase
    | cases.PatchCase
    | sliced.ClipCase
    | sliced.Ada3DCase
    | slim.SlimCase
    | slim.SlimModelCase,
    eta: float = 0.9,
    **more: Any,
) -> dict[str, Any]:
    times = {
        name: {"p20": t, "p50": t, "p80": t, "rounds": 15} for name, t in (("dense", 2e-3), ("ours", 1e-3))
    }
    return {
        "family": case.family,
        "case": case.name,
        "batch": getattr(case, "batch", None),
        "updated": getattr(case, "updated", None),
        "skipped": getattr(case, "skipped", None),
        "operations": 2e9,
        "bytes": 3e6,
        "times": times,
        "best": {"dense": "dense", "ours": "ours"},
        "work_ratio": 0.45,
        "time_ratio": 0.5,
        "masked_ratio": 0.25,
        "eta": eta,
        **more,
    }


def results_with(records: list[dict[str, Any]]) -> dict[str, Any]:
    raw = {
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [{"extra_info": record} for record in records] + [{"extra_info": {}}],
    }
    machine = {
        "device": "AMD EPYC 7R13",
        "threads": 2,
        "instruction_set": "AVX2",
        "conv_gflops": 100.0,
        "copy_gb_per_s": 20.0,
    }
    return report.collect(raw, machine, {"quick": False, "filter": None, "failed": []})


GATED = [case for case in cases.LAYERS if case.family == "gated_3x3"]


def test_table() -> None:
    halves = [case for case in GATED if case.updated == 0.5]
    full = next(case for case in GATED if case.updated == 1)
    records = [
        as_record(halves[0], eta=1.0),
        as_record(halves[1], eta=0.81),
        as_record(full, time_ratio=1.04),
    ]
    records.append({"family": "overhead", "case": "policy", "overhead_us": -3.0})
    rows = report.summarise(records)
    assert [row.cases for row in rows] == [2, 1, 1]
    assert [row.verdict for row in rows] == ["hit", "hit", "hit, aim too"]
    assert rows[0].mean == pytest.approx(0.9) and rows[0].worst == 0.81
    text = report.render_text(rows)
    assert "η 0.90 mean, 0.81 min" in text and "1.04x" in text and "-3.0 µs" in text
    assert text.splitlines()[0].startswith("family")
    markdown = report.render_markdown(rows)
    assert len({line.count("|") for line in markdown.splitlines()}) == 1

    missed = report.summarise([as_record(halves[0], eta=1.0), as_record(halves[1], eta=0.79)])
    assert [row.verdict for row in missed] == ["miss"]
    model = report.summarise([as_record(cases.MODELS[1], eta=0.93, time_ratio=0.72)])
    assert model[0].cells()[2] == "0.72x (η 0.93)" and model[0].verdict == "hit, aim too"


def test_result_file(tmp_path: Path) -> None:
    results = results_with([as_record(case) for case in GATED[:4]] + [as_record(cases.MODELS[0])])
    file, picture = report.save(results, tmp_path / "device")
    assert picture.read_bytes().startswith(b"\x89PNG")
    loaded = report.load(file)
    assert set(loaded) == {
        "schema",
        "created",
        "commit",
        "versions",
        "build",
        "machine",
        "settings",
        "records",
    }
    assert loaded["commit"] == {"id": "0123456789abcdef", "dirty": False}
    assert set(loaded["versions"]) == {"adakernels", "torch", "python"}
    assert len(loaded["records"]) == 5
    assert loaded["records"][0]["times"]["ours"] == {"p20": 1e-3, "p50": 1e-3, "p80": 1e-3, "rounds": 15}
    file.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="expected a result file of schema 1"):
        report.load(file)


def test_committed_results_are_readable() -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*/results.json"):
        results = report.load(file)
        assert report.summarise(results["records"])
        assert not results["settings"]["quick"] and results["settings"]["filter"] is None
        assert file.with_name("results.png").exists()


def test_pages_are_rewritten(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "gated.md"
    readme.write_text("above\n<!-- bench:table -->\nold\n<!-- /bench:table -->\nbelow\n")
    page.write_text("<!-- bench:gap -->\n<!-- /bench:gap -->\n")
    half = next(case for case in GATED if case.updated == 0.5 and case.batch == 32)
    file, _ = report.save(results_with([as_record(half)]), tmp_path / "results")
    assert report.rewrite_pages(tmp_path, file) == [readme, page]
    text = readme.read_text()
    assert text.startswith("above\n<!-- bench:table -->\n") and text.endswith(
        "<!-- /bench:table -->\nbelow\n"
    )
    assert "old" not in text and "(results/results.json)" in text and "![" in text
    # 2 GFLOP at 100 GFLOP/s take 20 ms, 3 MB at 20 GB/s take 0.15 ms.
    assert "| 64to64k3at56-u0.50 | 2.00 | 3.0 | 20.00 (operations) | 2.00 | 1.00 |" in page.read_text()
    assert report.rewrite_pages(tmp_path, file) == []
    results = results_with([as_record(half)])
    results["settings"]["failed"] = ["benchmarks/test_layers.py::test_gated[gated_3x3-some-case]"]
    file, _ = report.save(results, tmp_path / "results")
    assert report.rewrite_pages(tmp_path, file) == [readme]
    assert "Without a speed, because they failed: `gated_3x3-some-case`." in readme.read_text()
    readme.write_text("<!-- bench:table -->\n")
    with pytest.raises(ValueError, match="expected <!-- /bench:table --> after"):
        report.rewrite_pages(tmp_path, file)


def test_our_pages_show_the_committed_results(tmp_path: Path) -> None:
    names = set(re.findall(r"benchmarks/results/[\w-]+/results\.json", (ROOT / "README.md").read_text()))
    assert len(names) == 1
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    assert report.rewrite_pages(tmp_path, tmp_path / names.pop()) == []


def test_our_pages_have_their_markers() -> None:
    assert "<!-- bench:table -->" in (ROOT / "README.md").read_text()
    assert "<!-- bench:gap -->" in (ROOT / "docs" / "gated_conv2d.md").read_text()
    assert "<!-- bench:patches -->" in (ROOT / "docs" / "patch_gather.md").read_text()


def test_device_slug() -> None:
    assert report.device_slug("AMD EPYC 7R13 Processor", 2) == "amd-epyc-7r13-2-threads"
    assert report.device_slug("Intel(R) Xeon(R) CPU @ 2.20GHz", 1) == "intel-xeon-1-thread"


def run_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing in a process of pytest-xdist, by whose variables it knows one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "adakernels", "bench", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_command(tmp_path: Path) -> None:
    done = run_command(
        "--quick", "-k", "overhead and in_policy", "--output", "out", "--threads", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "call overhead" in done.stdout and "1/1" in done.stderr
    results = report.load(tmp_path / "out" / "results.json")
    assert [record["case"] for record in results["records"]] == ["in_policy"]
    assert results["settings"] == {"quick": True, "filter": "overhead and in_policy", "failed": []}
    assert results["machine"]["threads"] == 1
    assert results["records"][0]["times"]["ours"]["rounds"] >= 15
    assert not (ROOT / "out").exists()


def test_command_without_a_match(tmp_path: Path) -> None:
    done = run_command("-k", "no_such_case", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: no case matches the filter" in done.stderr


def test_command_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "adakernels" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--quick"]) == 2
    assert "part of the source checkout, not of the installed package" in capsys.readouterr().err


def test_command_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.REQUIREMENTS, "no_such_module_a", "package-a")
    monkeypatch.setitem(bench.REQUIREMENTS, "no_such_module_b", "package-b")
    assert bench.main(["--quick"]) == 2
    assert "the benchmarks need package-a, package-b: pip install" in capsys.readouterr().err


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench.main(["--threads", "0"]) == 2
    assert "expected --threads to be at least 1, got 0" in capsys.readouterr().err
    assert bench.main(["--readme", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_readme_example() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert names["output"].shape == (16, 64, 56, 56)


def test_times_on_a_gpu_choose_a_backend() -> None:
    def record(op: str, shapes: str, **times: float) -> dict[str, Any]:
        spreads = {f"{name}, graph": {"p50": time} for name, time in times.items()}
        return {"decides": (op, shapes), "times": spreads}

    records = [
        record("a", "small", cuda=1.0, triton=2.0, dense=0.1),
        record("a", "small", cuda=4.0, triton=2.0),
        record("a", "large", cuda=1.0, triton=2.0),
        record("b", "small", triton=1.0),
    ]
    assert gpu.fastest(records) == {"a": {"small": "triton", "large": "cuda"}}


@pytest.mark.parametrize(
    "make",
    [
        partial(gpu.sliced_contest, 3, 5, 4, gradient=True),
        partial(gpu.dynamic_contest, 3, 6, 3, 4, ((0, 0), (1, 0), (0, 1), (1, 1)), gradient=True),
        partial(gpu.slim_contest, 16, 5, 0.6),
    ],
    ids=["sliced_conv3d", "dynamic_conv3d", "slim_conv"],
)
def test_contests_of_convolutions(make: Callable[..., gpu.Contest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "backends", lambda: ["cpu"])
    monkeypatch.setattr(gpu, "sets_of_inputs", lambda make, bytes_each: [make(0), make(1)])
    contest = make(dtype=torch.float32)
    assert set(contest.calls) == {"dense", "masked", "cpu"} and 0 < contest.work <= 1
    for number in range(2):
        results = [contest.calls[name][number]() for name in ("masked", "cpu")]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        assert contest.calls["dense"][number]() is not None

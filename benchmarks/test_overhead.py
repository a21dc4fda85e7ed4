"""What a call costs beside its arithmetic, and how much memory it takes at its peak."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import adakernels as ak
from benchmarks import memory
from benchmarks.cases import INFERENCE_CALLS, LAYER_CALLS, TINY, TRAINING_CALLS, MemoryCase
from benchmarks.layers import Layer
from benchmarks.measure import FORMATS, Race, assert_matches
from benchmarks.test_layers import describe

SAMPLE_TIME = 2e-3
CALLS = dict(
    zip(
        INFERENCE_CALLS + TRAINING_CALLS + LAYER_CALLS,
        (replace(TINY, updated=None), TINY, replace(TINY, updated=None, skipped=0.5), TINY, TINY),
        strict=True,
    )
)


@pytest.mark.parametrize("call", CALLS)
def test_call_overhead(benchmark: Any, call: str) -> None:
    """Ours minus `F.conv2d` on a tensor so small that only the way to the kernel takes time."""
    recording = call in TRAINING_CALLS
    layer = Layer(CALLS[call])
    layer.weight.requires_grad_(recording)
    shape = layer.shape
    positional, named = layer.arguments()
    ours = layer.ours if call in LAYER_CALLS else partial(ak.gated_conv2d, *positional, **named)
    dense = partial(F.conv2d, layer.input, layer.weight, layer.bias, shape.stride, shape.padding)

    with torch.inference_mode(not recording):
        race = Race({"dense": dense, "ours": ours}, sample_time=SAMPLE_TIME)
        race.warm_up(20)
        assert_matches(race.run_for(benchmark, "ours", rounds=41), layer.reference())
    times = race.times()
    benchmark.group = "overhead"
    benchmark.extra_info.update(
        family="overhead",
        case=call,
        times=times,
        best={"dense": "dense", "ours": "ours"},
        calls_per_round=race.calls,
        overhead_us=(times["ours"]["p50"] - times["dense"]["p50"]) * 1e6,
    )


@pytest.mark.skipif(not memory.available(), reason="peak memory is read from Linux's /proc/self/clear_refs")
def test_peak_memory(benchmark: Any, memory_case: MemoryCase, threads: int, quick: bool) -> None:
    """Peak of ours against the dense layer's in the same memory format, each in a fresh process."""
    form = memory_case.form
    plain = Layer(memory_case)
    layers = {name: plain.in_format(name) for name in FORMATS}
    with torch.inference_mode():
        with ak.use_backend("reference"):
            expected = getattr(plain, form)()
        for layer in layers.values():
            assert_matches(getattr(layer, form)(), expected)
        benchmark.pedantic(getattr(layers["channels_last"], form), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(describe(memory_case, plain))
    _report(
        benchmark, memory_case, ("dense", form) if quick else ("dense", "masked", form), expected, threads
    )


@pytest.mark.skipif(not memory.available(), reason="peak memory is read from Linux's /proc/self/clear_refs")
def test_peak_memory_of_clips(benchmark: Any, clip_memory_case: memory.ClipMemoryCase, threads: int) -> None:
    """The same for the layers over clips, 3D convolutions."""
    case = clip_memory_case.layer
    runners = {name: memory.clip_runner(case, "ours", name) for name in FORMATS}
    with torch.inference_mode():
        with ak.use_backend("reference"):
            expected = runners["contiguous"]()
        assert isinstance(expected, torch.Tensor)
        for runner in runners.values():
            assert_matches(runner(), expected)
        benchmark.pedantic(runners["channels_last"], rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(family=clip_memory_case.family, case=clip_memory_case.name)
    _report(benchmark, clip_memory_case, ("dense", "ours"), expected, threads)


def _report(
    benchmark: Any,
    case: MemoryCase | memory.ClipMemoryCase,
    forms: tuple[str, ...],
    expected: torch.Tensor,
    threads: int,
) -> None:
    index = memory.CASES.index(case)
    peaks = {
        f"{one} {name}": memory.peak_in_fresh_process(one, name, index, threads)
        for one in forms
        for name in FORMATS
    }
    benchmark.group = "memory"
    benchmark.extra_info.update(
        peak_bytes=peaks,
        output_bytes=expected.numel() * expected.element_size(),
        memory_ratio=max(peaks[f"{forms[-1]} {name}"] / peaks[f"dense {name}"] for name in FORMATS),
    )

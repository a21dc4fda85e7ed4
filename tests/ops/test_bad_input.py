"""Every bad argument is refused with a sentence that says what is wrong, on every path alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import adakernels as ak
from adakernels.ops import _checks


@pytest.fixture(params=["eager", "reference", "fake", "cpu", "meta"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ways that a call can take; a fake tensor has no values and a meta tensor no kernels."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_backend")
    with ak.use_backend("reference") if request.param == "reference" else nullcontext():
        with FakeTensorMode() if request.param == "fake" else nullcontext():
            with torch.device("meta") if request.param == "meta" else nullcontext():
                yield request.param


def ints(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


BAD_CONVOLUTIONS: list[tuple[Callable[[], dict[str, Any]], type[Exception], str]] = [
    # Things that are no tensors.
    (lambda: {"input": [1.0]}, TypeError, "expected input to be a Tensor, got list"),
    (lambda: {"input": None}, TypeError, "expected input to be a Tensor, got NoneType"),
    (lambda: {"weight": np.zeros((6, 4, 3, 3))}, TypeError, "expected weight to be a Tensor, got ndarray"),
    (lambda: {"bias": 1.0}, TypeError, "expected bias to be a Tensor, got float"),
    (lambda: {"policy": [[0]]}, TypeError, "expected policy to be a Tensor, got list"),
    (lambda: {"in_policy": 2}, TypeError, "expected in_policy to be a Tensor, got int"),
    # Ranks and shapes.
    (
        lambda: {"input": torch.ones(4, 7, 7)},
        ValueError,
        "expected input of rank 4 [N, C_in, H, W], got shape [4, 7, 7]",
    ),
    (
        lambda: {"weight": torch.ones(6, 4, 3)},
        ValueError,
        "expected weight of rank 4 [C_out, C_in/groups, kh, kw], got shape [6, 4, 3]",
    ),
    (
        lambda: {"weight": torch.ones(6, 5, 3, 3)},
        ValueError,
        "expected weight of shape [C_out, C_in/groups, kh, kw] with C_in/groups = 4, got [6, 5, 3, 3]",
    ),
    (
        lambda: {"weight": torch.ones(6, 4, 0, 3)},
        ValueError,
        "expected weight without empty dimensions, got shape [6, 4, 0, 3]",
    ),
    (lambda: {"bias": torch.ones(5)}, ValueError, "expected bias of shape [C_out] = [6], got [5]"),
    (
        lambda: {"policy": ints(4, 5)},
        ValueError,
        "expected policy of shape [N, C_out] = [4, 6], got [4, 5]",
    ),
    (
        lambda: {"policy": ints(4, 6, 3)},
        ValueError,
        "expected policy of shape [N, C_out] = [4, 6], got [4, 6, 3]",
    ),
    (
        lambda: {"policy": torch.ones(4, 6)},
        ValueError,
        "expected float policy of shape [N, C_out, 3] = [4, 6, 3], got [4, 6]",
    ),
    (
        lambda: {"in_policy": ints(4, 6)},
        ValueError,
        "expected in_policy of shape [N, C_in] = [4, 4], got [4, 6]",
    ),
    # Dtypes.
    (
        lambda: {"input": ints(4, 4, 7, 7)},
        TypeError,
        "expected input of dtype float32, float64, float16 or bfloat16, got int64",
    ),
    (
        lambda: {"input": torch.ones(4, 4, 7, 7, dtype=torch.complex64)},
        TypeError,
        "expected input of dtype float32, float64, float16 or bfloat16, got complex64",
    ),
    (
        lambda: {"weight": torch.ones(6, 4, 3, 3, dtype=torch.bfloat16)},
        TypeError,
        "expected weight of the dtype of input, float32, got bfloat16",
    ),
    (
        lambda: {"bias": torch.ones(6, dtype=torch.float64)},
        TypeError,
        "expected bias of the dtype of input, float32, got float64",
    ),
    (
        lambda: {"policy": torch.ones(4, 6, dtype=torch.bool)},
        TypeError,
        "expected policy of an integer dtype, got bool",
    ),
    (
        lambda: {"in_policy": torch.ones(4, 4, 3)},
        TypeError,
        "expected in_policy of an integer dtype, got float32",
    ),
    # Numbers.
    (lambda: {"frames": 0}, ValueError, "expected frames of at least 1, got 0"),
    (lambda: {"frames": 3}, ValueError, "expected a batch of whole clips of frames = 3, got N = 4"),
    (lambda: {"frames": 2.0}, TypeError, "expected frames to be an int, got float"),
    (lambda: {"frames": True}, TypeError, "expected frames to be an int, got bool"),
    (lambda: {"stride": 0}, ValueError, "expected stride of at least 1, got 0"),
    (lambda: {"stride": (1, -2)}, ValueError, "expected stride of at least 1, got -2"),
    (lambda: {"stride": 1.5}, TypeError, "expected stride to be an int, got float"),
    (lambda: {"stride": (1, 1, 1)}, ValueError, "expected stride to be an int or 2 of them, got 3"),
    (lambda: {"stride": [2]}, ValueError, "expected stride to be an int or 2 of them, got 1"),
    (lambda: {"padding": -1}, ValueError, "expected padding of at least 0, got -1"),
    (
        lambda: {"padding": "full"},
        ValueError,
        "expected padding to be numbers, 'same' or 'valid', got 'full'",
    ),
    (
        lambda: {"padding": "same", "stride": 2},
        ValueError,
        "expected stride 1 with padding='same', got [2, 2]",
    ),
    (lambda: {"dilation": 0}, ValueError, "expected dilation of at least 1, got 0"),
    (lambda: {"dilation": None}, TypeError, "expected dilation to be an int, got NoneType"),
    (
        lambda: {"dilation": 4},
        ValueError,
        "expected a kernel no larger than the padded input, got a kernel reaching over [9, 9] and a padded "
        "input of [7, 7]",
    ),
    (
        lambda: {"input": torch.ones(4, 4, 0, 7)},
        ValueError,
        "expected a kernel no larger than the padded input, got a kernel reaching over [3, 3] and a padded "
        "input of [0, 7]",
    ),
    (lambda: {"groups": 0}, ValueError, "expected groups of at least 1, got 0"),
    (lambda: {"groups": 3}, ValueError, "expected groups to divide C_in = 4 and C_out = 6, got 3"),
    (lambda: {"groups": 4}, ValueError, "expected groups to divide C_in = 4 and C_out = 6, got 4"),
    (
        lambda: {"groups": 2},
        ValueError,
        "expected weight of shape [C_out, C_in/groups, kh, kw] with C_in/groups = 2, got [6, 4, 3, 3]",
    ),
    (
        lambda: {"activation": "gelu"},
        ValueError,
        "expected activation None, 'relu', 'relu6' or 'silu', got 'gelu'",
    ),
    (lambda: {"activation": 1}, ValueError, "expected activation None, 'relu', 'relu6' or 'silu', got 1"),
]


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS, ids=[case[2] for case in BAD_CONVOLUTIONS])
def test_gated_conv2d(path: str, case: tuple[Callable[[], dict[str, Any]], type[Exception], str]) -> None:
    make, error, sentence = case
    arguments = {
        "input": torch.ones(4, 4, 7, 7),
        "weight": torch.ones(6, 4, 3, 3),
        "bias": torch.ones(6),
        "policy": ints(4, 6),
        "in_policy": ints(4, 4),
        "frames": 2,
    }
    ak.gated_conv2d(**arguments)
    with pytest.raises(error, match=re.escape(f"gated_conv2d: {sentence}")):
        ak.gated_conv2d(**arguments | make())


BAD_FUSIONS: list[tuple[Callable[[], dict[str, Any]], type[Exception], str]] = [
    (lambda: {"input": 1}, TypeError, "expected input to be a Tensor, got int"),
    (lambda: {"policy": None}, TypeError, "expected policy to be a Tensor, got NoneType"),
    (
        lambda: {"input": torch.ones(4, 6, 3)},
        ValueError,
        "expected input of rank 4 [N, C, H, W], got shape [4, 6, 3]",
    ),
    (
        lambda: {"input": ints(4, 6, 3, 3)},
        TypeError,
        "expected input of dtype float32, float64, float16 or bfloat16, got int64",
    ),
    (lambda: {"policy": ints(4, 5)}, ValueError, "expected policy of shape [N, C] = [4, 6], got [4, 5]"),
    (
        lambda: {"policy": torch.ones(4, 6, 2)},
        ValueError,
        "expected float policy of shape [N, C, 3] = [4, 6, 3], got [4, 6, 2]",
    ),
    (lambda: {"policy": ints(4, 6) > 0}, TypeError, "expected policy of an integer dtype, got bool"),
    (lambda: {"frames": 3}, ValueError, "expected a batch of whole clips of frames = 3, got N = 4"),
    (lambda: {"frames": -1}, ValueError, "expected frames of at least 1, got -1"),
    (lambda: {"frames": "2"}, TypeError, "expected frames to be an int, got str"),
]


@pytest.mark.parametrize("case", BAD_FUSIONS, ids=[case[2] for case in BAD_FUSIONS])
def test_temporal_fuse(path: str, case: tuple[Callable[[], dict[str, Any]], type[Exception], str]) -> None:
    make, error, sentence = case
    arguments = {"input": torch.ones(4, 6, 3, 3), "policy": ints(4, 6), "frames": 2}
    with pytest.raises(error, match=re.escape(f"temporal_fuse: {sentence}")):
        ak.temporal_fuse(**arguments | make())


def flags(*values: bool) -> torch.Tensor:
    return torch.tensor(values)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_CLIPS: list[tuple[Callable[[], dict[str, Any]], type[Exception], str]] = [
    (lambda: {"input": None}, TypeError, "expected input to be a Tensor, got NoneType"),
    (lambda: {"weight": 1}, TypeError, "expected weight to be a Tensor, got int"),
    (lambda: {"temporal": [True]}, TypeError, "expected temporal to be a Tensor, got list"),
    (lambda: {"frame_offsets": (0, 2)}, TypeError, "expected frame_offsets to be a Tensor, got tuple"),
    (
        lambda: {"input": torch.ones(6, 4, 7, 7)},
        ValueError,
        "expected input of rank 5 [B, C_in, T, H, W], got shape [6, 4, 7, 7]",
    ),
    (
        lambda: {"frame_offsets": offsets(0, 1, 2)},
        ValueError,
        "expected packed input of rank 4 [sum T, C_in, H, W], got shape [2, 4, 3, 7, 7]",
    ),
    (
        lambda: {"weight": torch.ones(6, 4, 3, 3)},
        ValueError,
        "expected weight of rank 5 [C_out, C_in/groups, kt, kh, kw], got shape [6, 4, 3, 3]",
    ),
    (lambda: {"temporal": flags(True)}, ValueError, "expected temporal of shape [B] = [2], got [1]"),
    (lambda: {"temporal": ints(2)}, TypeError, "expected temporal of dtype bool, got int64"),
    (lambda: {"bias": torch.ones(5)}, ValueError, "expected bias of shape [C_out] = [6], got [5]"),
    (lambda: {"stride": (1, 1)}, ValueError, "expected stride to be an int or 3 of them, got 2"),
    (
        lambda: {"padding": "full"},
        ValueError,
        "expected padding to be numbers, 'same' or 'valid', got 'full'",
    ),
    (lambda: {"dilation": 0}, ValueError, "expected dilation of at least 1, got 0"),
    (lambda: {"groups": 3}, ValueError, "expected groups to divide C_in = 4 and C_out = 6, got 3"),
    (lambda: {"padding": 0, "dilation": 2}, ValueError, "expected a kernel no larger than the padded input"),
    (
        lambda: {"activation": "gelu"},
        ValueError,
        "expected activation None, 'relu', 'relu6' or 'silu', got 'gelu'",
    ),
]


@pytest.mark.parametrize("case", BAD_CLIPS, ids=[case[2] for case in BAD_CLIPS])
def test_sliced_conv3d(path: str, case: tuple[Callable[[], dict[str, Any]], type[Exception], str]) -> None:
    make, error, sentence = case
    arguments = {
        "input": torch.ones(2, 4, 3, 7, 7),
        "weight": torch.ones(6, 4, 3, 3, 3),
        "bias": torch.ones(6),
        "temporal": ints(2) > 0,
        "padding": 1,
    }
    ak.sliced_conv3d(**arguments)
    with pytest.raises(error, match=re.escape(f"sliced_conv3d: {sentence}")):
        ak.sliced_conv3d(**arguments | make())


BAD_PACKINGS: list[tuple[Callable[[], dict[str, Any]], type[Exception], str]] = [
    (lambda: {"frame_offsets": ints(3)}, TypeError, "expected frame_offsets of dtype int32, got int64"),
    (
        lambda: {"frame_offsets": torch.ones(1, 3, dtype=torch.int32)},
        ValueError,
        "expected frame_offsets of rank 1 [B + 1], got shape [1, 3]",
    ),
    (
        lambda: {"frame_offsets": torch.ones(0, dtype=torch.int32), "temporal": None},
        ValueError,
        "expected frame_offsets of shape [B + 1], got [0]",
    ),
    (
        lambda: {"frame_offsets": torch.ones(2, dtype=torch.int32)},
        ValueError,
        "expected temporal of shape [B] = [1], got [2]",
    ),
    (
        lambda: {"stride": (2, 1, 1)},
        ValueError,
        "expected a convolution that keeps the number of frames with frame_offsets, got stride 2, padding 1 "
        "and dilation 1 in time for 3 taps",
    ),
    (lambda: {"padding": 0}, ValueError, "expected a convolution that keeps the number of frames"),
    (lambda: {"weight": torch.ones(6, 4, 2, 3, 3)}, ValueError, "expected a convolution that keeps"),
    (
        lambda: {"weight": torch.ones(6, 4, 2, 3, 3), "padding": "same"},
        ValueError,
        "expected a convolution that keeps the number of frames",
    ),
]


@pytest.mark.parametrize("case", BAD_PACKINGS, ids=[case[2] for case in BAD_PACKINGS])
def test_packed_clips(path: str, case: tuple[Callable[[], dict[str, Any]], type[Exception], str]) -> None:
    make, error, sentence = case
    arguments = {
        "input": torch.ones(5, 4, 7, 7),
        "weight": torch.ones(6, 4, 3, 3, 3),
        "temporal": ints(2) > 0,
        "padding": 1,
        "frame_offsets": (torch.arange(3) * 5 // 2).int(),
    }
    ak.sliced_conv3d(**arguments)
    with pytest.raises(error, match=re.escape(f"sliced_conv3d: {sentence}")):
        ak.sliced_conv3d(**arguments | make())


BAD_PATCHES: list[tuple[Callable[[], dict[str, Any]], type[Exception], str]] = [
    (lambda: {"input": 1}, TypeError, "expected input to be a Tensor, got int"),
    (lambda: {"origin": [[0, 0]]}, TypeError, "expected origin to be a Tensor, got list"),
    (lambda: {"frame_index": [0] * 4}, TypeError, "expected frame_index to be a Tensor, got list"),
    (lambda: {"mean": 0.5}, TypeError, "expected mean to be a Tensor or a sequence of numbers, got 0.5"),
    (lambda: {"std": "abc"}, TypeError, "expected std to be a Tensor or a sequence of numbers, got 'abc'"),
    (
        lambda: {"input": torch.ones(6, 9, 8)},
        ValueError,
        "expected input of rank 4 [N, C, H, W], got shape [6, 9, 8]",
    ),
    (
        lambda: {"input": torch.ones(4, 3, 9, 8, dtype=torch.int64)},
        TypeError,
        "expected input that is not uint8 of dtype float32, float64, float16 or bfloat16, got int64",
    ),
    (lambda: {"origin": torch.ones(4)}, ValueError, "expected origin of rank 2 [M, 2], got shape [4]"),
    (
        lambda: {"origin": torch.ones(4, 3)},
        ValueError,
        "expected origin of shape [M, 2] = [4, 2], got [4, 3]",
    ),
    (
        lambda: {"origin": ints(4, 2)},
        TypeError,
        "expected origin of dtype float32, float64, float16 or bfloat16, got int64",
    ),
    (
        lambda: {"origin": torch.ones(5, 2), "frame_index": None},
        ValueError,
        "expected an origin for each of N = 4 frames, or a frame_index, got M = 5",
    ),
    (lambda: {"size": 0}, ValueError, "expected size of at least 1, got 0"),
    (lambda: {"size": (4, -1)}, ValueError, "expected size of at least 1, got -1"),
    (lambda: {"size": 4.0}, TypeError, "expected size to be an int, got float"),
    (lambda: {"size": (4, 4, 4)}, ValueError, "expected size to be an int or 2 of them, got 3"),
    (lambda: {"size": (10, 8)}, ValueError, "expected a size within [H, W] = [9, 8], got [10, 8]"),
    (lambda: {"size": 9}, ValueError, "expected a size within [H, W] = [9, 8], got [9, 9]"),
    (lambda: {"frame_index": ints(3)}, ValueError, "expected frame_index of shape [M] = [4], got [3]"),
    (lambda: {"frame_index": ints(4, 1)}, ValueError, "expected frame_index of shape [M] = [4], got [4, 1]"),
    (
        lambda: {"frame_index": torch.ones(4)},
        TypeError,
        "expected frame_index of an integer dtype, got float32",
    ),
    (
        lambda: {"input": torch.ones(0, 3, 9, 8)},
        ValueError,
        "expected a frame to cut M = 4 patches from, got N = 0",
    ),
    (lambda: {"mean": None}, ValueError, "expected both mean and std or neither, got std alone"),
    (lambda: {"std": None}, ValueError, "expected both mean and std or neither, got mean alone"),
    (lambda: {"mean": [0.5]}, ValueError, "expected mean of shape [C] = [3], got [1]"),
    (lambda: {"std": torch.ones(4)}, ValueError, "expected std of shape [C] = [3], got [4]"),
    (
        lambda: {"std": ints(3)},
        TypeError,
        "expected std of dtype float32, float64, float16 or bfloat16, got int64",
    ),
]


@pytest.mark.parametrize("case", BAD_PATCHES, ids=[case[2] for case in BAD_PATCHES])
def test_patch_gather(path: str, case: tuple[Callable[[], dict[str, Any]], type[Exception], str]) -> None:
    make, error, sentence = case
    arguments = {
        "input": torch.ones(4, 3, 9, 8),
        "origin": torch.ones(4, 2),
        "size": 4,
        "frame_index": ints(4),
        "mean": torch.ones(3),
        "std": torch.ones(3),
    }
    ak.patch_gather(**arguments)
    with pytest.raises(error, match=re.escape(f"patch_gather: {sentence}")):
        ak.patch_gather(**arguments | make())


@pytest.mark.parametrize("name", ["origin", "frame_index", "mean", "std"])
def test_patches_on_different_devices(name: str) -> None:
    arguments = {
        "input": torch.ones(4, 3, 9, 8),
        "origin": torch.ones(4, 2),
        "frame_index": ints(4),
        "mean": torch.ones(3),
        "std": torch.ones(3),
    }
    arguments[name] = arguments[name].to("meta")
    sentence = f"patch_gather: expected {name} on the device of input, 'cpu', got 'meta'"
    with pytest.raises(ValueError, match=sentence):
        ak.patch_gather(**arguments, size=4)


@pytest.mark.parametrize("name", ["weight", "bias", "policy", "in_policy"])
def test_tensors_on_different_devices(name: str) -> None:
    arguments = {
        "input": torch.ones(4, 4, 7, 7),
        "weight": torch.ones(6, 4, 3, 3),
        "bias": torch.ones(6),
        "policy": ints(4, 6),
        "in_policy": ints(4, 4),
    }
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(
        ValueError, match=f"gated_conv2d: expected {name} on the device of input, 'cpu', got 'meta'"
    ):
        ak.gated_conv2d(**arguments)
    with pytest.raises(ValueError, match="temporal_fuse: expected policy on the device of input, 'cpu', got"):
        ak.temporal_fuse(torch.ones(4, 6, 3, 3), ints(4, 6).to("meta"), frames=2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [-1, 3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_policy_values(value: int, dtype: torch.dtype) -> None:
    policy, in_policy = ints(4, 6), ints(4, 4)
    bad_policy, bad_in_policy = policy.clone(), in_policy.clone()
    bad_policy[3, 5] = bad_in_policy[3, 3] = value
    tensors = torch.ones(4, 4, 7, 7), torch.ones(6, 4, 3, 3), None
    sentence = rf"values 0 \(KEEP\), 1 \(REUSE\) or 2 \(SKIP\), got {value}"
    with pytest.raises(ValueError, match=f"gated_conv2d: expected policy {sentence}"):
        ak.gated_conv2d(*tensors, bad_policy.to(dtype), in_policy=in_policy)
    with pytest.raises(ValueError, match=f"gated_conv2d: expected in_policy {sentence}"):
        ak.gated_conv2d(*tensors, policy, in_policy=bad_in_policy.to(dtype))
    with pytest.raises(ValueError, match=f"temporal_fuse: expected policy {sentence}"):
        ak.temporal_fuse(torch.ones(4, 6, 2, 2), bad_policy.to(dtype), frames=1)


def test_the_same_call_with_numbers_of_another_type() -> None:
    arguments = (torch.ones(4, 4, 7, 7), torch.ones(6, 4, 3, 3), None, ints(4, 6))
    ak.gated_conv2d(*arguments, stride=2, frames=1)
    with pytest.raises(TypeError, match="expected stride to be an int, got float"):
        ak.gated_conv2d(*arguments, stride=2.0, frames=1)
    with pytest.raises(TypeError, match="expected frames to be an int, got bool"):
        ak.gated_conv2d(*arguments, stride=2, frames=True)
    ak.gated_conv2d(*arguments, stride=(1, 1))
    with pytest.raises(TypeError, match="expected stride to be an int, got float"):
        ak.gated_conv2d(*arguments, stride=(1.0, 1.0))
    with pytest.raises(TypeError, match="expected stride to be an int, got bool"):
        ak.gated_conv2d(*arguments, stride=(1, True))
    ak.slim_conv2d(*arguments[:2], segments=((0, 2), (2, 4)))
    with pytest.raises(TypeError, match="expected a segment's start to be an int, got float"):
        ak.slim_conv2d(*arguments[:2], segments=((0, 2), (2.0, 4)))


def test_calls_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    @_checks.planned("input", "bias?")
    def plan(
        requested: str, op: str, input: _checks.Facts, bias: _checks.Facts | None, *arguments: Any
    ) -> int:
        calls.append((requested, op, input, bias, *arguments))
        return len(calls)

    arguments = (1, 1), 1, None, ((0, 2), (2, 4))
    for _ in range(2):  # also of a parameter, which has the same facts
        for input in (torch.ones(4, 4), torch.nn.Parameter(torch.zeros(4, 4))):
            assert plan("plan", input, None, *arguments) == 1
    assert calls == [
        (ak.backends.requested_backend(), "plan", _checks.facts("", "", input), None, *arguments)
    ]
    others = [
        ("other", input, None, *arguments),
        ("plan", input.detach().double(), None, *arguments),
        ("plan", input[:2].detach(), None, *arguments),
        ("plan", input, input, *arguments),
        ("plan", input, None, (1, True), *arguments[1:]),
        ("plan", input, None, (1, 1), True, *arguments[2:]),
        ("plan", input, None, (1, 1), 1.0, *arguments[2:]),
        ("plan", input, None, (1, 1), 1, None, ((0, 2.0), (2, 4))),
        ("plan", input, None, [1, 1], 1, None, ((0, 2), (2, 4))),
    ]
    for number, other in enumerate(others, 2):
        assert plan(*other) == number
    with ak.use_backend("reference"):
        assert plan("plan", input, None, *arguments) == len(others) + 2
    # A list may be another one in the next call, and a tensor of another kind may lie about its shape.
    assert plan(*others[-1]) == len(others) + 3
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(4, 4))
    assert plan("plan", fake, None, *arguments) == len(others) + 4
    assert plan("plan", fake, None, *arguments) == len(others) + 5
    # What was remembered makes room for others, and other threads may ask for other backends meanwhile.
    monkeypatch.setattr(_checks, "_REMEMBERED", 1)
    count = len(calls)
    assert [plan("plan", torch.ones(n), None) for n in (1, 2, 2, 1)] == [
        count + 1,
        count + 2,
        count + 2,
        count + 3,
    ]
    asked = iter(["reference", "auto", "auto"])
    monkeypatch.setattr(_checks.backends, "requested_backend", lambda: next(asked))
    plan("plan", torch.ones(5), None)
    assert calls[-1][0] == "reference"
    plan("plan", torch.ones(5), None)
    assert calls[-1][0] == "auto"
    with pytest.raises(TypeError, match="plan: expected input to be a Tensor, got NoneType"):
        plan("plan", None, None)
    monkeypatch.undo()
    with pytest.raises(TypeError, match="plan: expected bias to be a Tensor, got int"):
        plan("plan", input, 1)

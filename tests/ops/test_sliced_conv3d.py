"""sliced_conv3d against its reference, over everything that its arguments may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import assert_within_rounding, bound_of, in_float64
from torch import Tensor

import adakernels as ak
from adakernels import backends
from adakernels.ops import sliced_conv3d_flops, sliced_conv3d_reference

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A call of the operator, but for the tensors' contents, which follow from `seed`.

    `lengths` are those of packed clips; without them `clips` of them have the size's number of frames.
    """

    clips: int = 2
    lengths: tuple[int, ...] | None = None
    channels: int = 4
    out_channels: int = 8
    depthwise: bool = False
    size: Triple = (4, 6, 5)
    kernel: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    padding: Triple | str = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    bias: bool = True
    temporal: str = "mixed"
    activation: str | None = None
    channels_last: bool = False
    weight_channels_last: bool = False
    grad_layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    wanted: tuple[bool, bool, bool] = (True, True, True)
    seed: int = 0

    @property
    def batch(self) -> int:
        return self.clips if self.lengths is None else len(self.lengths)

    @property
    def offsets(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)

    @property
    def keywords(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.channels if self.depthwise else 1,
            "frame_offsets": self.offsets,
            "activation": self.activation,
        }


def triples(least: int, most: int) -> st.SearchStrategy[Triple]:
    return st.tuples(*[st.integers(least, most)] * 3)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = draw(triples(1, 4) | st.sampled_from([(3, 1, 1), (5, 1, 1), (3, 3, 3), (1, 3, 3), (5, 7, 7)]))
    stride, padding, dilation = draw(triples(1, 3)), draw(triples(0, 3)), draw(triples(1, 2))
    lengths = None
    if draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
        dilation = (2 if kernel[0] % 2 == 0 else dilation[0], *dilation[1:])
        stride = (1, *stride[1:])
        padding = (dilation[0] * (kernel[0] - 1) // 2, *padding[1:])
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    channels = draw(st.integers(1, 8) | st.integers(1, 40))
    depthwise = draw(st.integers(0, 3)) == 0
    return Case(
        clips=draw(st.integers(0, 3)),
        lengths=lengths,
        channels=channels,
        out_channels=channels * draw(st.integers(1, 2)) if depthwise else draw(st.integers(1, 40)),
        depthwise=depthwise,
        size=tuple(draw(st.integers(low, low + 9)) for low in least),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        temporal=draw(st.sampled_from(["mixed", "all", "none", "absent"] if lengths else ["mixed", "none"])),
        activation=draw(st.sampled_from([None, "relu", "relu6", "silu"])),
        channels_last=draw(st.booleans()),
        weight_channels_last=draw(st.booleans()),
        grad_layout=draw(st.sampled_from(["contiguous", "channels_last", "expanded"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        wanted=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        seed=draw(st.integers(0, 2**31)),
    )


POINT = {"kernel": (1, 1, 1), "padding": (0, 0, 0)}
POINTWISE = {"kernel": (3, 1, 1), "padding": (1, 0, 0)}
STEM = {"kernel": (5, 7, 7), "stride": (1, 2, 2), "padding": (2, 3, 3), "channels": 3, "out_channels": 24}
FIXED = [
    Case(),
    Case(**POINTWISE, channels=40, out_channels=33, activation="relu"),
    Case(**POINTWISE, channels=40, out_channels=33, size=(5, 7, 7), channels_last=True, activation="relu"),
    Case(**POINTWISE, channels=24, lengths=(3, 1, 0, 5, 4), activation="relu6"),
    Case(**POINTWISE, channels=24, lengths=(3, 3, 2, 5, 4), channels_last=True, activation="silu"),
    Case(**STEM, size=(6, 20, 18)),
    Case(**STEM, size=(1, 20, 18), lengths=(2, 6), channels_last=True),
    Case(size=(1, 6, 5)),
    Case(size=(5, 14, 13), channels=20, out_channels=24, channels_last=True),
    Case(temporal="all"),
    # One tap of stride 1: the frames of a planar clip are one row.
    Case(**POINT, channels=40, out_channels=33, size=(5, 7, 9), activation="relu"),
    Case(**POINT, channels=9, out_channels=18, depthwise=True),
    Case(**POINT, channels=1, out_channels=20, clips=2),
    Case(**POINT, stride=(2, 1, 1)),
    # Points that fill no vector are dot products, where weights lie in the order of what is read.
    *(
        Case(
            channels=16, size=(5, side, side), kernel=(3, 1, 1), padding=(1, 0, 0), weight_channels_last=True
        )
        for side in (1, 6, 7, 9)
    ),
    Case(temporal="none"),
    Case(temporal="none", lengths=(2, 3), channels=16, channels_last=True),
    Case(temporal="absent", lengths=(2, 3)),
    Case(clips=1, temporal="none"),
    Case(clips=0),
    Case(lengths=()),
    Case(lengths=(0, 0)),
    Case(kernel=(4, 3, 3), padding=(2, 1, 1)),
    Case(kernel=(2, 1, 3), padding=(0, 0, 1)),
    Case(kernel=(4, 2, 2), padding="same"),
    Case(stride=(2, 1, 2), dilation=(3, 1, 1), padding=(3, 1, 1), size=(9, 5, 7)),
    Case(stride=(2, 2, 2), dilation=(2, 1, 1), padding=(2, 1, 1), size=(8, 6, 6)),
    Case(padding="valid", kernel=(3, 1, 2)),
    Case(depthwise=True, channels=9, out_channels=9, size=(4, 9, 8)),
    Case(depthwise=True, channels=9, out_channels=18, kernel=(1, 3, 3), padding=(0, 1, 1), stride=(2, 1, 1)),
    Case(depthwise=True, channels=5, out_channels=5, lengths=(2, 1, 4), activation="relu"),
    Case(size=(1, 1, 1), channels=16, out_channels=1, channels_last=True, kernel=(3, 3, 3)),
]


def make(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Input, weight, bias and `temporal`."""
    torch.manual_seed(case.seed)
    shape = (case.batch, case.channels, *case.size)
    if case.lengths is not None:
        shape = (sum(case.lengths), case.channels, *case.size[1:])
    group = 1 if case.depthwise else case.channels
    fan_in = group * case.kernel[0] * case.kernel[1] * case.kernel[2]
    input = torch.randn(shape).to(case.dtype)
    weight = (torch.randn(case.out_channels, group, *case.kernel) * 2 / fan_in**0.5).to(case.dtype)
    bias = torch.randn(case.out_channels).to(case.dtype) if case.bias else None
    temporal = {
        "mixed": torch.rand(case.batch) < 0.5,
        "all": torch.ones(case.batch, dtype=torch.bool),
        "none": torch.zeros(case.batch, dtype=torch.bool),
        "absent": None,
    }[case.temporal]
    if case.channels_last:
        input = last(input)
    return input, last(weight) if case.weight_channels_last else weight, bias, temporal


def last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()])


def numbers(case: Case) -> dict[str, Any]:
    """The keywords, without activation and names of paddings: what the reference takes for packed clips."""
    return case.keywords | {"activation": None}


def check_forward(case: Case) -> None:
    input, weight, bias, temporal = make(case)
    with torch.no_grad():
        got = ak.sliced_conv3d(input, weight, bias, temporal, **case.keywords)
    tensors = in_float64(input), in_float64(weight), in_float64(bias)
    want = sliced_conv3d_reference(*tensors, temporal, **case.keywords)
    bounds = (bound_of(x) for x in (input, weight, bias))
    magnitude = sliced_conv3d_reference(*bounds, temporal, **numbers(case))
    rounded = want.abs()
    # oneDNN and the reference round the argument of an activation too.
    rounded += sliced_conv3d_reference(*tensors, temporal, **numbers(case)).abs() * 1.1
    if backends.requested_backend() == "reference":
        # It rounds, of packed clips, what every temporal tap gives.
        rounded += magnitude
    assert got.dtype == case.dtype
    assert_within_rounding(got, want, magnitude, rounded, "output")
    if case.channels_last and not input.is_contiguous():
        assert torch.equal(got, last(got)) and got.stride() == last(got).stride()
    else:
        assert got.is_contiguous()


def check_backward(case: Case) -> None:
    input, weight, bias, temporal = make(case)
    leaves = [x for x in (input, weight, bias) if x is not None]
    for leaf, wanted in zip(leaves, case.wanted, strict=False):
        leaf.requires_grad_(wanted)
    output = ak.sliced_conv3d(input, weight, bias, temporal, **case.keywords)
    assert output.requires_grad == any(leaf.requires_grad for leaf in leaves)
    if not output.requires_grad:
        return
    exact = [in_float64(x).requires_grad_() for x in leaves]
    tensors = (*exact, None)[:3]
    linear = sliced_conv3d_reference(*tensors, temporal, **numbers(case))
    grad = torch.randn_like(output)
    if case.grad_layout == "channels_last":
        grad = last(grad)
    elif case.grad_layout == "expanded":
        grad = torch.randn((), dtype=case.dtype).expand_as(output)
    # At a kink, rounding alone decides which of two derivatives is taken.
    near = (linear.abs() < 0.05) | ((linear - 6).abs() < 0.05)
    if case.activation in ("relu", "relu6"):
        grad = torch.where(near, 0, grad).to(case.dtype)
    output.backward(grad)
    activated = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}[case.activation](linear)
    want = torch.autograd.grad(activated, exact, grad.double(), retain_graph=True)
    bounds = [bound_of(x).requires_grad_() for x in leaves]
    bound = sliced_conv3d_reference(*(*bounds, None)[:3], temporal, **numbers(case))
    scale = (2 + linear.detach().abs()) if case.activation == "silu" else 1
    magnitude = torch.autograd.grad(bound, bounds, bound_of(grad * scale))
    sizes = [x.detach().double().abs().requires_grad_() for x in leaves]
    total = sliced_conv3d_reference(*(*sizes, None)[:3], temporal, **numbers(case))
    # The derivative of silu and its argument are rounded before the sums; so is what the reference adds up.
    before = torch.autograd.grad(total, sizes, grad.double().abs() * 3)
    named = zip(leaves, want, magnitude, before, ("input", "weight", "bias"), strict=False)
    for leaf, exact_grad, size, seen, name in named:
        if leaf.requires_grad:
            assert leaf.grad is not None
            assert_within_rounding(
                leaf.grad, exact_grad, size, exact_grad.abs() + seen, f"gradient of {name}"
            )
            # What takes no part gets exactly nothing, not something small.
            assert (leaf.grad[size == 0] == 0).all()
        else:
            assert leaf.grad is None


@pytest.mark.usefixtures("cpu_backend")
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(cases())
def test_fuzz_forward(case: Case) -> None:
    check_forward(case)


@pytest.mark.usefixtures("cpu_backend")
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(cases())
def test_fuzz_backward(case: Case) -> None:
    check_backward(case)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", FIXED, ids=range(len(FIXED)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fixed_cases(case: Case, dtype: torch.dtype) -> None:
    check_forward(replace(case, dtype=dtype))
    check_backward(replace(case, dtype=dtype))


def test_every_instruction_set(on_instruction_set: Callable[..., None]) -> None:
    on_instruction_set(f"{Path(__file__)}::test_fixed_cases", "-k", "cpu and float32")


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
def test_reference_is_the_definition(taps: int) -> None:
    case = Case(clips=3, kernel=(taps, 3, 3), activation="relu")
    input, weight, bias, _ = make(case)
    temporal = torch.tensor([True, False, True])
    got = sliced_conv3d_reference(input, weight, bias, temporal, padding=1, activation="relu")
    for b in range(3):
        kernel = weight.clone()
        if not temporal[b]:
            for j in range(taps):
                kernel[:, :, j] *= j == taps // 2
        want = F.relu(F.conv3d(input[b : b + 1], kernel, bias, padding=1))
        torch.testing.assert_close(got[b : b + 1], want)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("channels_last", [False, True])
def test_packed_clips_are_clips_of_their_own(channels_last: bool) -> None:
    lengths = (3, 1, 0, 4, 4)
    case = Case(lengths=lengths, channels=16, channels_last=channels_last)
    frames, weight, bias, temporal = make(case)
    got = ak.sliced_conv3d(frames, weight, bias, temporal, padding=1, frame_offsets=case.offsets)
    for b, part in enumerate(frames.split(lengths)):
        if len(part) == 0:
            continue
        clip = part.transpose(0, 1)[None]
        want = sliced_conv3d_reference(clip, weight, bias, temporal[b : b + 1], padding=1)
        begin, end = case.offsets[b : b + 2].tolist()
        torch.testing.assert_close(got[begin:end], want[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_outer_taps_of_2d_clips_cost_nothing(channels_last: bool, packed: bool) -> None:
    case = Case(channels=16, lengths=(3, 2) if packed else None, channels_last=channels_last, temporal="none")
    input, weight, bias, temporal = make(case)
    with torch.no_grad():
        weight[:, :, 0], weight[:, :, 2] = 1e30, -1e30
    weight.requires_grad_()
    output = ak.sliced_conv3d(input, weight, bias, temporal, **case.keywords)
    output.sum().backward()
    assert output.abs().max() < 1e3
    assert (weight.grad[:, :, 0] == 0).all() and (weight.grad[:, :, 2] == 0).all()
    assert weight.grad[:, :, 1].abs().min() > 0


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_no_flags_are_conv3d(padding: int | str) -> None:
    input, weight, bias, _ = make(Case())
    got = ak.sliced_conv3d(input, weight, bias, padding=padding, activation="relu")
    assert torch.equal(got, F.relu(F.conv3d(input, weight, bias, padding=padding)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(packed: bool, activation: str | None) -> None:
    case = Case(lengths=(2, 1) if packed else None, channels=2, out_channels=3, size=(3, 3, 2))
    input, weight, bias, temporal = make(replace(case, dtype=torch.float64, activation=activation))
    leaves = [x.requires_grad_() for x in (input, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *a: ak.sliced_conv3d(*a, temporal, padding=1, frame_offsets=case.offsets), leaves
    )


@pytest.mark.usefixtures("cpu_backend")
def test_second_derivative_is_refused() -> None:
    input, weight, _, temporal = make(Case())
    input.requires_grad_()
    output = ak.sliced_conv3d(input, weight, None, temporal, padding=1)
    (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match=r"sliced_conv3d: no second derivative; .*use_backend"):
        grad.sum().backward()


@pytest.mark.usefixtures("backend")
def test_runs_under_autocast() -> None:
    input, weight, bias, temporal = make(Case())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ak.sliced_conv3d(input, weight, bias, temporal, padding=1)
    low = (x.bfloat16() for x in (input, weight, bias))
    want = ak.sliced_conv3d(*low, temporal, padding=1)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
@pytest.mark.parametrize("temporal", ["mixed", "none", "all"])
def test_clips_of_the_vendors_convolution(temporal: str, activation: str | None, onednn: bool) -> None:
    # The output of the second has one pixel: clips of one frame, which are contiguous as well.
    with torch.backends.mkldnn.flags(enabled=onednn):
        for size, padding in (((4, 6, 5), (1, 1, 1)), ((1, 3, 3), (1, 0, 0))):
            case = Case(clips=4, channels=16, size=size, padding=padding, temporal=temporal)
            check_forward(replace(case, activation=activation, channels_last=True))


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("case", [FIXED[2], FIXED[3]], ids=["clips", "packed"])
@pytest.mark.parametrize("activation", [0, 1, 3])
def test_opcheck(case: Case, activation: int) -> None:
    input, weight, bias, temporal = make(case)
    leaves = [x.requires_grad_() for x in (input, weight, bias)]
    conv = [1, 1, 1], list(case.padding), [1, 1, 1], 1
    forward = torch.ops.adakernels.sliced_conv3d.default
    torch.library.opcheck(forward, (*leaves, temporal, case.offsets, *conv, activation))
    grad = torch.randn_like(forward(*leaves, temporal, case.offsets, *conv, 0))
    tensors = grad, input.detach(), weight.detach(), temporal, case.offsets
    backward = torch.ops.adakernels.sliced_conv3d_backward.default
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward, (*tensors, *conv, *wanted))


@pytest.mark.usefixtures("backend")
def test_compiles_once_for_all_flags_and_offsets() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(input: Tensor, weight: Tensor, temporal: Tensor, offsets: Tensor) -> Tensor:
        return ak.sliced_conv3d(
            input, weight, None, temporal, padding=1, frame_offsets=offsets, activation="relu"
        )

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for seed, lengths in enumerate([(2, 3), (4, 1), (0, 5)]):
        case = Case(lengths=lengths, seed=seed)
        input, weight, _, temporal = make(case)
        arguments = input.requires_grad_(), weight, temporal, case.offsets
        got, want = compiled(*arguments), call(*arguments)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(output.sum(), input)[0] for output in (got, want)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_by_inductor(channels_last: bool) -> None:
    torch._dynamo.reset()
    input, weight, bias, temporal = make(Case(channels=16, channels_last=channels_last))
    compiled = torch.compile(ak.sliced_conv3d, fullgraph=True)
    got = compiled(input, weight, bias, temporal, padding=1)
    want = ak.sliced_conv3d(input, weight, bias, temporal, padding=1)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 5], "to start at 0, got 1"),
        ([0, 4, 3, 5], "that do not decrease, got 3 after 4"),
        ([0, 2, 4], "to end at the number of frames, 5, got 4"),
        ([0, 2, 6], "to end at the number of frames, 5, got 6"),
    ],
)
def test_offsets_are_checked(offsets: list[int], message: str) -> None:
    input, weight = torch.randn(5, 4, 3, 3), torch.randn(2, 4, 3, 1, 1)
    bad = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"sliced_conv3d: expected frame_offsets {message}"):
        ak.sliced_conv3d(input, weight, padding=(1, 0, 0), frame_offsets=bad)


def test_what_remains_of_the_work() -> None:
    dense, actual = sliced_conv3d_flops(
        (8, 4, 3, 1, 1), torch.tensor([True, False]), batch=2, output_size=(5, 6, 7)
    )
    assert dense == 8 * 4 * 3 * 5 * 6 * 7 and actual.tolist() == [dense, dense / 3]
    offsets = torch.tensor([0, 4, 6], dtype=torch.int32)
    dense, actual = sliced_conv3d_flops(
        (8, 4, 3, 1, 1), torch.tensor([False, True]), batch=2, output_size=(6, 6, 7), frame_offsets=offsets
    )
    frame = 8 * 4 * 3 * 6 * 7
    assert dense == 3 * frame and actual.tolist() == [4 * frame / 3, 2 * frame]


def test_explains_its_choice() -> None:
    input, weight, _, temporal = make(Case(channels=4))
    grouped = torch.randn(8, 2, 3, 3, 3)
    with ak.use_backend("auto"):
        said = ak.explain(ak.sliced_conv3d, input, grouped, None, temporal, groups=2)
    assert said.backend == "reference"
    assert "groups = 1 or C_in = 4, not 2" in said.reasons["cpu"]
    assert ak.explain(ak.sliced_conv3d, input, weight).reasons["cpu"].startswith("this call needs no kernel")


@pytest.mark.parametrize("lengths", [None, (5, 5)])
def test_frames_between_the_centre_taps_are_not_read(backend: str, lengths: tuple[int, ...] | None) -> None:
    case = Case(size=(5, 4, 4), lengths=lengths, stride=(1 if lengths else 2, 1, 1), temporal="none")
    input, weight, bias, temporal = make(case)
    want = ak.sliced_conv3d(input, weight, bias, temporal, **case.keywords)
    bad = 1
    if lengths is None:
        input[:, :, bad] = float("nan")
    else:
        input[bad] = float("nan")
        want = torch.cat((want[:bad], want[bad + 1 :]))
    leaves = [x.requires_grad_() for x in (input, weight, bias)]
    got = ak.sliced_conv3d(*leaves, temporal, **case.keywords)
    if lengths is not None:
        got = torch.cat((got[:bad], got[bad + 1 :]))
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert lengths or all(leaf.grad.isfinite().all() for leaf in leaves)

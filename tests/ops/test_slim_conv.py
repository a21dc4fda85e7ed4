"""slim_conv2d and slim_conv3d against their definition: a convolution with a slice of the weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import adakernels as ak
from adakernels import _extension, backends
from adakernels.ops import _cpu_conv, slim_conv, slim_conv_reference

OPERATORS = {2: ak.slim_conv2d, 3: ak.slim_conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
FORMS = ("kernels of this package", "oneDNN", "torch")


@dataclass(frozen=True)
class Case:
    """A call, but for the tensors' contents, which follow from `seed`. The rank is that of `size`."""

    batch: int = 2
    all_in: int = 24
    all_out: int = 16
    segments: tuple[tuple[int, int], ...] | None = ((0, 8), (16, 24))
    channels: int = 16
    out_channels: int | None = 8
    depthwise: bool = False
    size: tuple[int, ...] = (6, 5)
    kernel: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    bias: bool = True
    activation: str | None = None
    channels_last: bool = False
    weight_last: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def keywords(self) -> dict[str, Any]:
        return {
            "out_channels": self.out_channels,
            "segments": self.segments,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.all_in if self.depthwise else 1,
            "activation": self.activation,
        }

    @property
    def operator(self) -> Callable[..., Tensor]:
        return OPERATORS[len(self.size)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.sampled_from([2, 3]))
    sizes = st.integers(1, 3)
    kernel = draw(
        st.tuples(*[sizes] * rank)
        | st.sampled_from([(3, 3), (1, 1)] if rank == 2 else [(1, 3, 3), (3, 1, 1), (1, 1, 1), (5, 1, 1)])
    )
    padding: Any = draw(
        st.just(tuple(k // 2 for k in kernel))
        | st.tuples(*[st.integers(0, 2)] * rank)
        | st.sampled_from(["same", "valid"])
    )
    plain = draw(st.booleans())
    ones = (1,) * rank
    stride = ones if plain or padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * rank))
    dilation = ones if plain else draw(st.tuples(*[st.integers(1, 2)] * rank))
    around = (0,) * rank if isinstance(padding, str) else padding
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, around, strict=True)]
    size = tuple(draw(st.integers(low, low + (12 if i else 4))) for i, low in enumerate(least))
    all_in = draw(st.integers(1, 48))
    depthwise = draw(st.booleans())
    all_out = all_in * draw(st.integers(1, 2)) if depthwise else draw(st.integers(1, 48))
    segments, channels, out_channels = None, draw(st.integers(1, all_in)), draw(st.integers(1, all_out))
    if depthwise:
        out_channels = channels * (all_out // all_in)
    elif draw(st.booleans()):
        bounds = sorted(draw(st.sets(st.integers(0, all_in), min_size=2, max_size=5)))
        # Neighbours that share a bound are adjacent; leaving one out makes a gap.
        pairs = list(pairwise(bounds))
        gap = draw(st.integers(0, len(pairs)))
        segments = tuple(pair for i, pair in enumerate(pairs) if i != gap or len(pairs) == 1)
        channels = sum(stop - start for start, stop in segments)
    return Case(
        batch=draw(st.integers(0, 3)),
        all_in=all_in,
        all_out=all_out,
        segments=segments,
        channels=channels,
        out_channels=out_channels,
        depthwise=depthwise,
        size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu6", "silu"])),
        channels_last=draw(st.booleans()),
        weight_last=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**31)),
    )


VIDEO = Case(size=(4, 9, 7), kernel=(1, 3, 3), stride=(1, 1, 1), padding=(0, 1, 1), dilation=(1, 1, 1))
FIXED = [
    Case(),
    Case(channels_last=True, activation="relu"),
    Case(kernel=(1, 1), padding=(0, 0), segments=None, channels=8, activation="relu6", channels_last=True),
    Case(all_in=64, all_out=72, channels=40, out_channels=40, segments=None, size=(17, 11)),
    Case(
        all_in=64, all_out=72, channels=40, out_channels=40, segments=None, size=(17, 11), channels_last=True
    ),
    Case(stride=(2, 2), size=(11, 9), activation="silu", channels_last=True),
    Case(depthwise=True, all_out=24, segments=None, channels=8, size=(9, 9), activation="silu"),
    Case(depthwise=True, all_out=48, segments=None, channels=16, out_channels=32, channels_last=True),
    VIDEO,
    replace(VIDEO, channels_last=True, activation="relu"),
    replace(VIDEO, channels_last=True, kernel=(3, 1, 1), padding=(1, 0, 0), activation="relu"),
    replace(VIDEO, channels_last=True, kernel=(5, 1, 1), padding=(2, 0, 0), stride=(2, 1, 1), size=(9, 5, 7)),
    replace(VIDEO, kernel=(1, 1, 1), padding=(0, 0, 0), stride=(1, 2, 2), channels_last=True),
    replace(VIDEO, kernel=(5, 7, 7), padding=(2, 3, 3), stride=(1, 2, 2), channels_last=True),
    replace(VIDEO, channels_last=True, batch=1, size=(1, 12, 12)),
    # Full width, minimal width, one segment of all, adjacent segments.
    Case(segments=None, channels=24, out_channels=None, channels_last=True),
    Case(segments=((5, 6),), channels=1, out_channels=1, channels_last=True),
    Case(segments=((0, 24),), channels=24, out_channels=16),
    Case(segments=((0, 8), (8, 12), (12, 16)), channels=16, channels_last=True),
    # Sizes of 1 and 0.
    Case(batch=0, channels_last=True),
    replace(VIDEO, batch=0, channels_last=True),
    Case(size=(1, 1), channels_last=True),
    Case(all_in=1, all_out=1, segments=None, channels=1, out_channels=None),
    replace(VIDEO, size=(1, 1, 1), channels_last=True),
]


def make(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(case.seed)
    rank = len(case.size)
    group_in = 1 if case.depthwise else case.all_in
    scale = (1 if case.depthwise else case.channels) * math.prod(case.kernel)
    input = torch.randn(case.batch, case.channels, *case.size)
    weight = torch.randn(case.all_out, group_in, *case.kernel) * (2 / scale) ** 0.5
    input = input.to(case.dtype).contiguous(
        memory_format=CHANNELS_LAST[rank] if case.channels_last else torch.contiguous_format
    )
    weight = weight.to(case.dtype).contiguous(
        memory_format=CHANNELS_LAST[rank] if case.weight_last else torch.contiguous_format
    )
    return input, weight, torch.randn(case.all_out).to(case.dtype) if case.bias else None


def definition(
    input: Tensor,  # [N, C, ...]
    weight: Tensor,  # [C_out, C_in/groups, ...]
    bias: Tensor | None,  # [C_out]
    case: Case,
) -> Tensor:
    """By an index instead of slices, without the activation."""
    count = weight.shape[0] if case.out_channels is None else case.out_channels
    weight = weight[torch.arange(count)]
    if not case.depthwise:
        ranges = case.segments or ((0, case.channels),)
        weight = weight[:, torch.cat([torch.arange(start, stop) for start, stop in ranges])]
    bias = None if bias is None else bias[torch.arange(count)]
    convolve = F.conv2d if len(case.size) == 2 else F.conv3d
    groups = case.channels if case.depthwise else 1
    return convolve(input, weight, bias, case.stride, case.padding, case.dilation, groups)


def assert_near(got: Tensor, want: Tensor, what: str, dtype: torch.dtype) -> None:
    # Sums of terms with unit variance, in which Winograd's method loses a few digits more than float32 does.
    # bfloat16 is rounded before and after the activation, and gradients after it once more.
    assert got.shape == want.shape, what
    assert got.isfinite().all(), what
    bound = (2e-5 if dtype == torch.float32 else 2e-2) * max(
        1.0, float(want.abs().max()) if want.numel() else 0
    )
    error = float((got.double() - want).abs().max()) if want.numel() else 0.0
    assert error <= bound, f"{what} is off by {error:.3g}, more than {bound:.3g}"


def check(case: Case) -> None:
    leaves = [tensor for tensor in make(case) if tensor is not None]
    tensors = [*(leaf.requires_grad_() for leaf in leaves), *[None] * (3 - len(leaves))]
    output = case.operator(*tensors, **case.keywords)
    with torch.no_grad():
        assert_near(case.operator(*tensors, **case.keywords), output.double(), "inference", case.dtype)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    linear = definition(*exact, *[None] * (3 - len(leaves)), case=case)
    activate = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}[case.activation]
    assert output.dtype == case.dtype
    assert_near(output.detach(), activate(linear).detach(), "output", case.dtype)
    wanted_format = CHANNELS_LAST[len(case.size)]
    if tensors[0].is_contiguous():
        assert output.is_contiguous()
    else:
        assert output.is_contiguous(memory_format=wanted_format)

    # At a kink, rounding alone decides which of two derivatives is taken.
    near = (linear.abs() < 0.05) | ((linear - 6).abs() < 0.05)
    grad = torch.randn_like(output) * (~near if case.activation in ("relu", "relu6") else 1)
    want = torch.autograd.grad(activate(linear), exact, grad.double())
    got = torch.autograd.grad(output, leaves, grad)
    for mine, theirs, name in zip(got, want, ("input", "weight", "bias"), strict=False):
        assert_near(mine, theirs, f"gradient of {name}", case.dtype)
    ones = torch.ones_like
    touched = torch.autograd.grad(
        definition(
            *[ones(leaf) for leaf in exact[:1]], *exact[1:], *[None] * (3 - len(leaves)), case=case
        ).sum(),
        exact[1:],
    )
    for mine, seen in zip(got[1:], touched, strict=True):
        assert (mine[seen == 0] == 0).all()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cpu_backend: None) -> Iterator[str]:
    """Runs the test in each of the forms that the CPU has, wherever that can do a call."""
    _cpu_conv.cpu_form_of.cache_clear()
    native = request.param == FORMS[0]
    monkeypatch.setattr(_cpu_conv, "NATIVE_WORK", 0 if native else math.inf)
    monkeypatch.setattr(_cpu_conv, "NATIVE_POINTS", 1)
    if request.param == "torch":
        monkeypatch.setattr(_cpu_conv, "has_onednn", lambda dtype: False)
    yield request.param
    _cpu_conv.cpu_form_of.cache_clear()


@pytest.mark.usefixtures("form")
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(cases())
def test_fuzz(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FIXED, ids=range(len(FIXED)))
def test_fixed_cases(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "reference" and dtype == torch.bfloat16 and case.kernel == (5, 7, 7):
        # torch's own weight gradient is wrong for a kernel longer than the clip.
        case = replace(case, size=(8, *case.size[1:]))
    check(replace(case, dtype=dtype))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", FIXED, ids=range(len(FIXED)))
def test_fixed_cases_in_every_form(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("width", [8, 24, 40, 56, 72])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("size", [(2, 9, 9), (3, 11, 11), (5, 7, 7)])
def test_widths_that_fill_no_vectors(width: int, kernel: tuple[int, ...], size: tuple[int, ...]) -> None:
    for channels_last in (False, True):
        case = replace(
            VIDEO,
            all_in=88,
            all_out=80,
            segments=((0, width), (80, 88)),
            channels=width + 8,
            out_channels=width,
            kernel=kernel,
            padding=tuple(k // 2 for k in kernel),
            size=size,
            channels_last=channels_last,
            activation="relu",
        )
        check(case)


def test_wrong_results_are_beyond_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    select = slim_conv.slim_weight
    with monkeypatch.context() as patched:
        patched.setattr(slim_conv, "slim_weight", lambda *args: select(*args).roll(1, 1))
        with pytest.raises(AssertionError, match="output is off by"):
            check(FIXED[1])
    input, weight, bias = make(FIXED[1])
    for wrong in (torch.zeros_like, lambda y: y.roll(1, 1)):
        right = ak.slim_conv2d(input, weight, bias, **FIXED[1].keywords)
        with pytest.raises(AssertionError, match="off by"):
            assert_near(wrong(right), right.double(), "output", torch.float32)


def test_large_enough_maps_take_the_kernels_of_this_package() -> None:
    weight = torch.randn(128, 64, 1, 3, 3)
    forms = {(8, 32, 32): "native", (8, 8, 8): "onednn", (1, 10, 10): "onednn"}
    for size, kernel in forms.items():
        input = torch.randn(1, 64, *size).contiguous(memory_format=torch.channels_last_3d)
        arguments = (56, None, 1, (0, 1, 1), 1, 1, "relu")
        conv = slim_conv.plan("slim_conv3d", input, weight, None, *arguments).arguments.conv
        assert _cpu_conv.cpu_form(input, (1, 3, 3), conv, 56) == ("frames", kernel)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(rank: int, groups: int, activation: str | None) -> None:
    torch.manual_seed(0)
    input = torch.randn(1, 4, *(3, 2, 2)[:rank], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 6 // groups, *(3, 2, 1)[:rank], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    segments = ((0, 1), (3, 6)) if groups == 1 else None

    def run(*tensors: Tensor) -> Tensor:
        return OPERATORS[rank](
            *tensors,
            out_channels=4,
            segments=segments,
            padding=(1, 0, 0)[:rank],
            groups=groups,
            activation=activation,
        )

    assert torch.autograd.gradcheck(run, (input, weight, bias))
    assert torch.autograd.gradgradcheck(run, (input, weight, bias))


OPCHECKED = [FIXED[i] for i in (1, 4, 6, 10, 19)]


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("case", OPCHECKED, ids=range(len(OPCHECKED)))
def test_opcheck(case: Case) -> None:
    input, weight, bias = make(case)
    segments = [n for pair in case.segments or ((0, case.channels),) for n in pair]
    conv = (
        case.all_out if case.out_channels is None else case.out_channels,
        segments if not case.depthwise else [0, 1],
        case.stride,
        case.padding,
        case.dilation,
        case.all_in if case.depthwise else 1,
    )
    leaves = [x if x is None else x.requires_grad_() for x in (input, weight, bias)]
    torch.library.opcheck(torch.ops.adakernels.slim_conv.default, (*leaves, *conv, 1))
    output = torch.ops.adakernels.slim_conv.default(input.detach(), weight.detach(), None, *conv, 0)
    arguments = (torch.randn_like(output), input.detach(), weight.detach(), *conv)
    torch.library.opcheck(torch.ops.adakernels.slim_conv_backward.default, (*arguments, True, True, False))


@pytest.mark.usefixtures("cpu_backend")
def test_compiled_whole_and_again_for_a_second_width_only() -> None:
    case = FIXED[1]
    input, weight, bias = make(case)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(input: Tensor, out_channels: int) -> Tensor:
        return ak.slim_conv2d(
            input,
            weight,
            bias,
            out_channels=out_channels,
            segments=case.segments,
            padding=1,
            activation="relu",
        )

    for count in (4, 8, 12, 16, 4):
        want = ak.slim_conv2d(
            input, weight, bias, out_channels=count, segments=case.segments, padding=1, activation="relu"
        )
        torch.testing.assert_close(run(input, count), want)
    # The first graph is made for the number it was called with, the second one for any; all of the channels
    # are a case of their own, in which the operator need not slice.
    assert counter.frame_count <= 3


def test_no_second_derivative() -> None:
    input, weight, _ = make(Case())
    (grad,) = torch.autograd.grad(
        ak.slim_conv2d(input.requires_grad_(), weight, **Case().keywords).sum(), input, create_graph=True
    )
    with pytest.raises(RuntimeError, match="slim_conv: no second derivative"):
        grad.sum().backward()


def test_flops() -> None:
    input, weight, bias = (x.requires_grad_() for x in make(Case()))
    with FlopCounterMode(display=False) as counter:
        ak.slim_conv2d(input, weight, bias, **Case().keywords).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 8 * 6 * 5) * 16 * 9
    input, weight, bias = make(FIXED[7])
    with FlopCounterMode(display=False) as counter:
        ak.slim_conv2d(input, weight, bias, **FIXED[7].keywords)
    assert counter.get_total_flops() == 2 * (2 * 32 * 6 * 5) * 9


def test_autocast() -> None:
    input, weight, bias = make(FIXED[1])
    with torch.autocast("cpu", torch.bfloat16):
        got = ak.slim_conv2d(input, weight, bias, **FIXED[1].keywords)
    want = ak.slim_conv2d(input.bfloat16(), weight.bfloat16(), bias.bfloat16(), **FIXED[1].keywords)
    assert torch.equal(got, want)


def test_other_groups_fall_to_the_reference() -> None:
    input, weight = torch.randn(1, 4, 5, 5), torch.randn(12, 2, 3, 3)
    got = ak.slim_conv2d(input, weight, out_channels=6, groups=4)
    torch.testing.assert_close(got, F.conv2d(input, weight[:6], groups=2))
    explanation = ak.explain(ak.slim_conv2d, input, weight, out_channels=6, groups=4)
    assert explanation.backend == "reference"
    assert explanation.reasons["cpu"] == "it takes groups = 1 or as many as input channels, 4, not 2"


@pytest.mark.parametrize("rank", [2, 3])
def test_explain(rank: int) -> None:
    op = OPERATORS[rank]
    tensors = torch.randn(1, 8, *[5] * rank), torch.randn(16, 16, *[3] * rank)
    explanation = ak.explain(op, *tensors, out_channels=8)
    assert explanation.backend == "cpu"
    assert explanation.reasons["triton"] == "the tensors are on 'cpu'"
    assert explanation.reasons["cuda"] == "the tensors are on 'cpu'"
    assert ak.explain(op, *(x.double() for x in tensors)).backend == "reference"
    assert ak.explain(op, *(x.to("meta") for x in tensors)).backend == "reference"
    with pytest.raises(ValueError, match="expected out_channels of at most C_out = 16, got 17"):
        ak.explain(op, *tensors, out_channels=17)


def test_explain_knows_measurements_and_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"slim_conv": {"32 bits, 3x3, small map": "triton"}}
    monkeypatch.setattr(backends, "_fastest", lambda device: (classes, "Test"))
    monkeypatch.setattr(backends, "_why_not_this_gpu", lambda index: "")
    monkeypatch.setattr(_extension, "has_cuda", True)
    with ak.use_backend("auto"), FakeTensorMode():
        input, whole = (torch.empty(8, 8, 5, 5, device="cuda"), torch.empty(16, 16, 3, 3, device="cuda"))
        found = ak.explain(ak.slim_conv2d, input, whole, out_channels=8)
        assert found.backend == "triton"
        assert found.reasons["cuda"] == "'triton' was measured to be faster on Test"
        depthwise, grouped = (torch.empty(16, width, 3, 3, device="cuda") for width in (1, 2))
        found = ak.explain(ak.slim_conv2d, input, depthwise, out_channels=8, groups=16)
        assert found.backend == "cuda"
        assert found.reasons["triton"] == found.reasons["reference"] == "'cuda' comes first"
        found = ak.explain(ak.slim_conv2d, input, grouped, out_channels=8, groups=8)
        assert found.backend == "reference"
        assert found.reasons["cuda"] == "it takes groups = 1 or C_in = 8, not 4"


def test_one_of_several_groups_is_a_convolution_without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = [], slim_conv.call
    monkeypatch.setattr(slim_conv, "call", lambda *args: calls.append(args) or run(*args))
    input, weight, bias = (
        torch.randn(size).requires_grad_() for size in ((2, 8, 5, 5), (12, 8, 3, 3), (12,))
    )
    got = ak.slim_conv2d(input, weight, bias, out_channels=6, groups=2)
    want = F.conv2d(input, weight[:6], bias[:6])
    torch.testing.assert_close(got, want)
    tensors = (input, weight, bias)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    # So that kernels which take no groups, or depthwise convolutions only, do it as it is.
    op = torch.ops.adakernels.slim_conv.default
    names = [argument.name for argument in op._schema.arguments]
    assert [(args[0], args[1 + names.index("groups")]) for args in calls] == [(op, 1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_without_a_kernel() -> None:
    input, weight, bias = (x.cuda() for x in make(Case()))
    assert ak.explain(ak.slim_conv2d, input, weight, bias, **Case().keywords).backend == "reference"
    got = ak.slim_conv2d(input, weight, bias, **Case().keywords)
    torch.testing.assert_close(got.cpu(), definition(*make(Case()), case=Case()), rtol=1e-3, atol=1e-3)


def test_reference_takes_what_the_operator_takes() -> None:
    for case in FIXED:
        tensors = make(case)
        linear = replace(case, activation=None)
        want = definition(*tensors, case=linear)
        torch.testing.assert_close(slim_conv_reference(*tensors, **linear.keywords), want)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, "expected input to be a Tensor, got list"),
    ({"weight": 1.0}, TypeError, "expected weight to be a Tensor, got float"),
    ({"bias": 1.0}, TypeError, "expected bias to be a Tensor, got float"),
    ({"input": (2, 8, 5)}, ValueError, "expected input of rank"),
    ({"weight": (8, 16, 3)}, ValueError, "expected weight of rank"),
    ({"weight": (0, 16, 3, 3)}, ValueError, "expected weight without empty dimensions"),
    ({"input": torch.int64}, TypeError, "expected input of dtype float32, float64, float16 or bfloat16"),
    ({"weight": torch.float64}, TypeError, "expected weight of the dtype of input, float32, got float64"),
    ({"bias": (4,)}, ValueError, "expected bias of shape [C_out] = [8], got [4]"),
    ({"bias": torch.float64}, TypeError, "expected bias of the dtype of input, float32, got float64"),
    ({"out_channels": 9}, ValueError, "expected out_channels of at most C_out = 8, got 9"),
    ({"out_channels": 0}, ValueError, "expected out_channels of at least 1, got 0"),
    ({"out_channels": 4.0}, TypeError, "expected out_channels to be an int, got float"),
    ({"out_channels": True}, TypeError, "expected out_channels to be an int, got bool"),
    ({"input": (2, 17, 5, 5)}, ValueError, "expected input of 1 to C_in = 16 channels, got 17"),
    ({"input": (2, 0, 5, 5)}, ValueError, "expected input of 1 to C_in = 16 channels, got 0"),
    ({"segments": 8}, TypeError, "expected segments to be (start, stop) pairs, got 8"),
    ({"segments": (0, 8)}, TypeError, "expected segments to be (start, stop) pairs, got (0, 8)"),
    ({"segments": ((0, 4, 8),)}, TypeError, "expected segments to be (start, stop) pairs, got ((0, 4, 8),)"),
    ({"segments": ((0, 8.0),)}, TypeError, "expected a segment's stop to be an int, got float"),
    ({"segments": ((-4, 4),)}, ValueError, "expected a segment's start of at least 0, got -4"),
    ({"segments": ((12, 20),)}, ValueError, "expected segments within C_in = 16 channels, got ((12, 20),)"),
    ({"segments": ((4, 4), (0, 8))}, ValueError, "expected segments within C_in = 16 channels"),
    ({"segments": ((8, 12), (0, 4))}, ValueError, "expected segments in order and without overlap"),
    ({"segments": ((0, 5), (4, 7))}, ValueError, "expected segments in order and without overlap"),
    ({"segments": ((0, 4), (8, 11))}, ValueError, "expected segments as wide as the input's C = 8"),
    ({"segments": ()}, ValueError, "expected segments as wide as the input's C = 8, got () of 0"),
    ({"groups": 3}, ValueError, "expected groups to divide C_out = 8, got 3"),
    ({"groups": 0}, ValueError, "expected groups of at least 1, got 0"),
    ({"groups": 4, "segments": ((0, 8),)}, ValueError, "expected no segments with groups = 4"),
    ({"groups": 4, "out_channels": 5}, ValueError, "expected out_channels to be whole groups of 2, got 5"),
    ({"groups": 8, "out_channels": 4}, ValueError, "expected input with the 64 channels of 4 groups, got 8"),
    ({"stride": 0}, ValueError, "expected stride of at least 1, got 0"),
    ({"padding": -1}, ValueError, "expected padding of at least 0, got -1"),
    ({"padding": 0, "dilation": 5}, ValueError, "expected a kernel no larger than the padded input"),
    ({"activation": "gelu"}, ValueError, "expected activation None, 'relu', 'relu6' or 'silu', got 'gelu'"),
]


@pytest.fixture(params=["eager", "reference", "fake", "cpu", "meta"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ways that a call can take; a fake tensor has no values and a meta tensor no kernels."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_backend")
    with ak.use_backend("reference") if request.param == "reference" else nullcontext():
        with FakeTensorMode() if request.param == "fake" else nullcontext():
            with torch.device("meta") if request.param == "meta" else nullcontext():
                yield request.param


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("change, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(rank: int, change: dict[str, Any], error: type[Exception], message: str) -> None:
    shapes = {"input": (2, 8, 5, 5), "weight": (8, 16, 3, 3), "bias": (8,)}
    arguments: dict[str, Any] = {"padding": 1}
    for name, shape in shapes.items():
        changed = change.get(name, shape)
        dtype = changed if isinstance(changed, torch.dtype) else torch.float32
        if not isinstance(changed, tuple | torch.dtype):
            arguments[name] = changed
            continue
        shape = changed if isinstance(changed, tuple) else shape
        extra = (shape[-1],) if rank == 3 and name != "bias" else ()
        arguments[name] = torch.ones((*shape, *extra), dtype=dtype)
    arguments |= {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(error, match=re.escape(f"slim_conv{rank}d: {message}")):
        OPERATORS[rank](**arguments)


@pytest.mark.usefixtures("path")
def test_good_input() -> None:
    arguments = {"input": torch.ones(2, 8, 5, 5), "weight": torch.ones(8, 16, 3, 3), "bias": torch.ones(8)}
    assert ak.slim_conv2d(**arguments, padding=1, segments=[[0, 4], [12, 16]]).shape == (2, 8, 5, 5)

"""gated_conv2d against its reference, over everything that its arguments may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import assert_within_rounding, bound_of, in_float64, tolerance
from torch import Tensor

import adakernels as ak
from adakernels import backends
from adakernels.ops import gated_conv2d_reference, needed_channels

KEEP, REUSE, SKIP = (int(value) for value in ak.Policy)


@dataclass(frozen=True)
class Case:
    """A call of the operator, but for the tensors' contents, which follow from `seed`."""

    clips: int = 2
    frames: int = 2
    channels: int = 4
    out_channels: int = 8
    groups: int = 1
    size: tuple[int, int] = (6, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    policy: str = "mixed"
    in_policy: str = "none"
    activation: str | None = None
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    policy_dtype: torch.dtype = torch.int64
    wanted: tuple[bool, bool, bool] = (True, True, True)
    seed: int = 0

    @property
    def keywords(self) -> dict:
        return {
            "frames": self.frames,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
        }


POLICIES = ("none", "mixed", "keep", "reuse", "skip", "mostly_skip", "some_frames_skip", "few_channels")
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.sampled_from([(1, 1), (3, 3), (5, 5)]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.sampled_from(["same", "valid"]))
    if padding == "same":
        stride = (1, 1)
    around = (0, 0) if isinstance(padding, str) else padding
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, around, strict=True)]
    if padding == "same":
        least = [1, 1]
    size = tuple(draw(st.integers(low, max(low, 11)) | st.integers(low, max(low, 30))) for low in least)
    channels = draw(st.integers(1, 20) | st.integers(1, 70))
    depthwise = draw(st.booleans())
    # Without any policy the call is torch's own.
    policy, in_policy = draw(
        st.tuples(st.sampled_from(POLICIES), st.sampled_from(POLICIES)).filter(
            lambda kinds: kinds != ("none", "none")
        )
    )
    return Case(
        clips=draw(st.integers(0, 3)),
        frames=draw(st.integers(1, 4)),
        channels=channels,
        out_channels=channels * draw(st.integers(1, 2)) if depthwise else draw(st.integers(1, 40)),
        groups=channels if depthwise else 1,
        size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        policy=policy,
        in_policy=in_policy,
        activation=draw(st.sampled_from([None, "relu", "relu6", "silu"])),
        layout=draw(st.sampled_from(LAYOUTS)),
        weight_layout=draw(st.sampled_from(["contiguous", "channels_last"])),
        grad_layout=draw(st.sampled_from(["contiguous", "channels_last", "expanded", "sliced"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        policy_dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.uint8])),
        wanted=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        seed=draw(st.integers(0, 2**31)),
    )


FIXED = [
    Case(),
    Case(kernel=(1, 1), padding=(0, 0), channels=17, out_channels=33, in_policy="mixed", activation="relu"),
    Case(channels=16, out_channels=48, size=(14, 14), clips=1, frames=8, layout="channels_last"),
    Case(channels=24, out_channels=24, groups=24, kernel=(5, 5), padding=(2, 2), activation="silu"),
    Case(channels=6, out_channels=12, groups=6, stride=(2, 2), size=(9, 9), in_policy="mixed"),
    Case(stride=(2, 2), size=(7, 7), in_policy="mostly_skip", activation="relu6", dtype=torch.bfloat16),
    Case(kernel=(7, 7), padding=(3, 3), stride=(2, 2), channels=3, out_channels=64, size=(20, 20)),
    Case(padding="same", kernel=(4, 2), dilation=(1, 3), layout="transposed"),
    Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2), channels=40, out_channels=24, grad_layout="expanded"),
    Case(channels=64, out_channels=64, size=(13, 13), policy="few_channels", in_policy="few_channels"),
    Case(stride=(2, 2), size=(28, 28), channels=24, out_channels=40, activation="relu"),
    Case(
        stride=(2, 2), size=(27, 36), channels=33, out_channels=9, in_policy="mixed", layout="channels_last"
    ),
    Case(stride=(2, 2), padding=(0, 2), size=(53, 20), channels=16, out_channels=17, activation="silu"),
    Case(stride=(2, 1), size=(28, 14), channels=8, out_channels=24),
    Case(size=(12, 68), channels=48, out_channels=19, policy="reuse"),
    Case(size=(29, 33), channels=40, out_channels=21, activation="relu"),
    Case(size=(28, 28), channels=33, out_channels=18, in_policy="mixed", layout="channels_last"),
    Case(size=(18, 83), padding=(0, 2), channels=17, out_channels=40, in_policy="few_channels"),
    Case(size=(7, 7), channels=200, out_channels=48, frames=2, activation="relu"),
    Case(size=(7, 7), channels=40, out_channels=37, frames=8, policy="keep", in_policy="mixed"),
    Case(
        size=(9, 9),
        kernel=(5, 5),
        padding=(2, 2),
        channels=30,
        out_channels=32,
        weight_layout="channels_last",
    ),
    Case(size=(14, 9), stride=(2, 2), channels=70, out_channels=33, in_policy="mixed", frames=8, clips=1),
    Case(clips=0),
    Case(frames=1, policy="reuse"),
    Case(size=(1, 1), channels=1, out_channels=1),
    Case(policy="skip", in_policy="skip", activation="silu"),
    Case(policy="none", in_policy="mixed"),
]


def make_policy(kind: str, frames: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    policy = torch.randint(0, 3, shape)
    if kind == "mostly_skip":
        policy[torch.rand(shape) < 0.8] = SKIP
    elif kind == "some_frames_skip":
        policy[torch.rand(shape[0]) < 0.5] = SKIP
    elif kind == "few_channels":
        policy[:, torch.rand(shape[1]) < 0.7] = SKIP
    elif kind != "mixed":
        policy.fill_({"keep": KEEP, "reuse": REUSE, "skip": SKIP}[kind])
    return policy.to(dtype)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return F.pad(tensor, (1, 2, 1, 1), value=float("nan"))[..., 1:-1, 1:-2]
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return tensor.mean().to(tensor.dtype).expand_as(tensor)
    return tensor


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    policy: Tensor | None
    in_policy: Tensor | None


def make(case: Case) -> Tensors:
    torch.manual_seed(case.seed)
    batch = case.clips * case.frames
    fan_in = case.channels // case.groups * case.kernel[0] * case.kernel[1]
    weight = torch.randn(case.out_channels, case.channels // case.groups, *case.kernel) * 2 / fan_in**0.5
    return Tensors(
        lay_out(torch.randn(batch, case.channels, *case.size).to(case.dtype), case.layout),
        lay_out(weight.to(case.dtype), case.weight_layout),
        torch.randn(case.out_channels).to(case.dtype) if case.bias else None,
        make_policy(case.policy, case.frames, (batch, case.out_channels), case.policy_dtype),
        make_policy(case.in_policy, case.frames, (batch, case.channels), case.policy_dtype),
    )


def check_forward(case: Case) -> None:
    t = make(case)
    with torch.no_grad():
        got = ak.gated_conv2d(t.input, t.weight, t.bias, t.policy, in_policy=t.in_policy, **case.keywords)
    tensors = in_float64(t.input), in_float64(t.weight), in_float64(t.bias)
    want = gated_conv2d_reference(*tensors, t.policy, in_policy=t.in_policy, **case.keywords)
    bounds = (bound_of(x) for x in (t.input, t.weight, t.bias))
    keywords = case.keywords | {"activation": None}
    magnitude = gated_conv2d_reference(*bounds, t.policy, in_policy=t.in_policy, **keywords)
    rounded = want.abs()
    if case.activation == "silu" and backends.requested_backend() == "reference":
        # The reference rounds the argument of an activation too; only for silu does that show.
        rounded += gated_conv2d_reference(*tensors, t.policy, in_policy=t.in_policy, **keywords).abs() * 1.1
    assert got.dtype == case.dtype
    assert_within_rounding(got, want, magnitude, rounded, "output")
    if t.input.is_contiguous():
        assert got.is_contiguous()
    elif case.layout == "channels_last":
        assert got.is_contiguous(memory_format=torch.channels_last)


def check_backward(case: Case) -> None:
    t = make(case)
    leaves = [x for x in (t.input, t.weight, t.bias) if x is not None]
    for leaf, wanted in zip(leaves, case.wanted, strict=False):
        leaf.requires_grad_(wanted)
    output = ak.gated_conv2d(t.input, t.weight, t.bias, t.policy, in_policy=t.in_policy, **case.keywords)
    exact = [in_float64(x).requires_grad_() for x in leaves]
    linear = gated_conv2d_reference(
        *exact, policy=t.policy, in_policy=t.in_policy, **case.keywords | {"activation": None}
    )
    grad = lay_out(torch.randn_like(output), case.grad_layout)
    if case.activation in ("relu", "relu6"):
        # At a kink, rounding alone decides which of two derivatives is taken.
        near = (linear.abs() < 0.05) | ((linear - 6).abs() < 0.05)
        grad = torch.where(near, 0, grad).to(case.dtype)
    assert output.requires_grad == any(leaf.requires_grad for leaf in leaves)
    if not output.requires_grad:
        return
    output.backward(grad)
    activated = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}[case.activation](linear)
    want = torch.autograd.grad(activated, exact, grad.double(), retain_graph=True)
    bounds = [bound_of(x).requires_grad_() for x in leaves]
    bound = gated_conv2d_reference(
        *bounds, policy=t.policy, in_policy=t.in_policy, **case.keywords | {"activation": None}
    )
    # The derivative of silu is at most 1.1, and off by the rounding of its argument.
    scale = (2 + linear.detach().abs()) if case.activation == "silu" else 1
    magnitude = torch.autograd.grad(bound, bounds, bound_of(grad * scale))
    rounded = [x.abs() for x in want]
    if case.activation == "silu" or backends.requested_backend() == "reference":
        # The derivative of silu and its argument are rounded before the sums, and the reference rounds what
        # a KEEP and a REUSE add up to.
        sizes = [x.detach().double().abs().requires_grad_() for x in leaves]
        total = gated_conv2d_reference(
            *sizes, policy=t.policy, in_policy=t.in_policy, **case.keywords | {"activation": None}
        )
        before = torch.autograd.grad(total, sizes, grad.double().abs() * 3)
        rounded = [x + y for x, y in zip(rounded, before, strict=True)]
    for leaf, exact_grad, size, seen, name in zip(
        leaves, want, magnitude, rounded, ("input", "weight", "bias"), strict=False
    ):
        if leaf.requires_grad:
            assert leaf.grad is not None
            assert_within_rounding(leaf.grad, exact_grad, size, seen, f"gradient of {name}")
            # What takes no part gets exactly nothing, not something small.
            assert (leaf.grad[size == 0] == 0).all()
        else:
            assert leaf.grad is None


@pytest.mark.usefixtures("cpu_backend")
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(cases())
def test_fuzz_forward(case: Case) -> None:
    check_forward(case)


@pytest.mark.usefixtures("cpu_backend")
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(cases())
def test_fuzz_backward(case: Case) -> None:
    check_backward(case)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", FIXED, ids=range(len(FIXED)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fixed_cases(case: Case, dtype: torch.dtype) -> None:
    check_forward(replace(case, dtype=dtype))
    check_backward(replace(case, dtype=dtype))


# Outputs of more than 3 MiB are written past the caches, in whole lines wherever planes and rows begin.
LARGE = [
    Case(size=(56, 56), channels=9, out_channels=40, frames=4, activation="relu"),
    Case(size=(57, 55), channels=5, out_channels=43, frames=4, in_policy="mixed"),
    Case(size=(91, 93), stride=(2, 2), channels=6, out_channels=60, frames=4, bias=False),
    Case(size=(59, 61), kernel=(1, 1), padding=(0, 0), channels=150, out_channels=38, frames=4),
    Case(size=(29, 31), kernel=(1, 1), padding=(0, 0), channels=260, out_channels=270, frames=2),
    Case(
        size=(14, 14),
        kernel=(1, 1),
        padding=(0, 0),
        channels=600,
        out_channels=520,
        frames=4,
        activation="silu",
    ),
    Case(size=(7, 7), channels=40, out_channels=2100, frames=4),
    Case(
        size=(50, 51),
        kernel=(5, 5),
        padding=(2, 2),
        channels=3,
        out_channels=45,
        frames=4,
        layout="transposed",
    ),
]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", LARGE, ids=range(len(LARGE)))
def test_large_outputs(case: Case) -> None:
    check_forward(case)
    check_forward(replace(case, policy="reuse", layout="channels_last", seed=1))
    check_forward(replace(case, dtype=torch.bfloat16, clips=2 * case.clips, seed=2))


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("policy", ["mixed", "few_channels", "keep"])
def test_rows_in_parts(policy: str) -> None:
    """More kernels than are transformed at once, each used often enough for that."""
    case = Case(size=(7, 7), channels=512, out_channels=400, frames=8, policy=policy, activation="relu")
    check_forward(case)
    if policy == "keep":
        check_backward(replace(case, clips=1, wanted=(True, False, False)))


@pytest.mark.parametrize("in_policy", ["none", "mixed"])
@pytest.mark.parametrize("channels", [1, 15, 16, 53, 700])
def test_kernel_of_one_pixel_on_planes_of_all_lengths(channels: int, in_policy: str) -> None:
    base = Case(channels=channels, kernel=(1, 1), padding=(0, 0), in_policy=in_policy, activation="relu")
    for length in [*range(1, 20), 48, 49, 100, 196, 289]:
        check_forward(replace(base, size=(2, length), out_channels=3 + length % 40, seed=length))
        case = replace(base, size=(length, 7), out_channels=1 + length % 9, activation=None, seed=length)
        check_forward(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [lambda y: y * 0, lambda y: y.roll(1, dims=1)], ids=["zeros", "shifted"])
def test_wrong_results_are_beyond_rounding(
    dtype: torch.dtype, wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(channels=64, out_channels=48, size=(14, 14), policy="keep", dtype=dtype)
    t = make(case)
    tensors = [in_float64(x) for x in (t.input, t.weight, t.bias)]
    want = gated_conv2d_reference(*tensors, t.policy, **case.keywords)
    magnitude = gated_conv2d_reference(
        *(bound_of(x) for x in (t.input, t.weight, t.bias)), t.policy, **case.keywords
    )
    right = want.to(dtype)
    assert_within_rounding(right, want, magnitude, want.abs(), "output")
    off = (wrong(right).double() - want).abs() > tolerance(dtype, magnitude, want.abs())
    assert off.double().mean() > 0.95
    with pytest.raises(AssertionError, match="output is off by"):
        assert_within_rounding(wrong(right), want, magnitude, want.abs(), "output")
    # All the way through the checks too, which choose the magnitudes.
    original = ak.gated_conv2d
    with monkeypatch.context() as patched:
        patched.setattr(ak, "gated_conv2d", lambda *args, **keywords: wrong(original(*args, **keywords)))
        with pytest.raises(AssertionError, match="output is off by"):
            check_forward(case)
        with pytest.raises(AssertionError, match="gradient of input is off by"):
            check_backward(case)


def test_every_instruction_set(on_instruction_set: Callable[..., None]) -> None:
    tests = ("test_fixed_cases", "test_large_outputs", "test_rows_in_parts", "test_error_of_large_blocks")
    on_instruction_set(*(f"{Path(__file__)}::{test}" for test in tests), "-k", "cpu or error or parts")


@pytest.mark.usefixtures("cpu_backend")
def test_error_of_large_blocks() -> None:
    torch.manual_seed(0)
    input, weight = torch.randn(2, 256, 28, 28), torch.randn(20, 256, 3, 3)
    policy = torch.full((2, 20), KEEP)
    got = ak.gated_conv2d(input, weight, policy=policy, padding=1)
    want = F.conv2d(input.double(), weight.double(), padding=1)
    assert (got - want).abs().max() < 4e-6 * want.abs().max()


def test_reference_is_the_definition() -> None:
    t = make(Case(clips=2, frames=3, in_policy="mixed", activation="relu"))
    got = gated_conv2d_reference(
        t.input, t.weight, t.bias, t.policy, frames=3, padding=1, in_policy=t.in_policy, activation="relu"
    )
    for n in range(6):
        frame = t.input.clone()
        frame[t.in_policy == SKIP] = 0
        y = F.relu(F.conv2d(frame, t.weight, t.bias, padding=1))
        for c in range(8):
            kind = t.policy[n, c]
            before = y[n - 1, c] if n % 3 > 0 else torch.zeros_like(y[n, c])
            want = y[n, c] if kind == KEEP else before if kind == REUSE else torch.zeros_like(before)
            torch.testing.assert_close(got[n, c], want)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
def test_all_keep_is_conv2d(groups: int, activation: str | None) -> None:
    t = make(Case(policy="keep", groups=groups))
    got = ak.gated_conv2d(
        t.input, t.weight, t.bias, t.policy, frames=2, padding=1, groups=groups, activation=activation
    )
    want = F.conv2d(t.input, t.weight, t.bias, padding=1, groups=groups)
    want = want if activation is None else getattr(F, activation)(want)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_no_policy_is_conv2d(padding: int | str) -> None:
    t = make(Case())
    got = ak.gated_conv2d(t.input, t.weight, t.bias, padding=padding, activation="relu")
    assert torch.equal(got, F.relu(F.conv2d(t.input, t.weight, t.bias, padding=padding)))


@pytest.mark.usefixtures("backend")
def test_history_is_raw_and_stays_in_its_clip() -> None:
    input = torch.arange(1.0, 7.0).reshape(6, 1, 1, 1)
    policy = torch.tensor([REUSE, REUSE, REUSE, REUSE, KEEP, REUSE]).reshape(6, 1)
    got = ak.gated_conv2d(input, torch.ones(1, 1, 1, 1), None, policy, frames=3)
    assert got.flatten().tolist() == [0, 1, 2, 0, 5, 5]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("depthwise", [False, True])
def test_skipped_input_is_not_read(layout: str, kernel: int, depthwise: bool) -> None:
    case = Case(
        channels=8,
        groups=8 if depthwise else 1,
        kernel=(kernel, kernel),
        padding=(kernel // 2,) * 2,
        in_policy="mixed",
        layout=layout,
    )
    t = make(case)
    poisoned = t.input.clone(memory_format=torch.preserve_format)
    poisoned[t.in_policy == SKIP] = float("nan")
    grads = []
    for input in (t.input, poisoned):
        leaves = [x.detach().requires_grad_() for x in (input, t.weight, t.bias)]
        output = ak.gated_conv2d(*leaves, t.policy, in_policy=t.in_policy, **case.keywords)
        grads.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for clean, other in zip(*grads, strict=True):
        assert torch.equal(clean, other)
    assert (grads[1][1][t.in_policy == SKIP] == 0).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("depthwise", [False, True])
def test_channels_that_nobody_needs_cost_no_gradient(depthwise: bool) -> None:
    case = Case(channels=8, out_channels=16, groups=8 if depthwise else 1, policy="few_channels")
    t = make(case)
    needed = needed_channels(t.policy, case.frames)
    idle = ~needed.any(0)
    assert idle.any() and not idle.all()
    with torch.no_grad():
        t.weight[idle], t.bias[idle] = float("nan"), float("nan")
    leaves = [x.requires_grad_() for x in (t.input, t.weight, t.bias)]
    output = ak.gated_conv2d(*leaves, t.policy, **case.keywords)
    output.backward(torch.ones_like(output))
    assert output.isfinite().all() and (output[t.policy == SKIP] == 0).all()
    assert (t.weight.grad[idle] == 0).all() and (t.bias.grad[idle] == 0).all()
    assert t.weight.grad.isfinite().all() and t.bias.grad.isfinite().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("in_policy", ["none", "mixed"])
def test_float_policy(in_policy: str) -> None:
    t = make(Case(in_policy=in_policy))
    weights = torch.rand(*t.policy.shape, 3).softmax(-1)
    leaves = [x.requires_grad_() for x in (t.input, t.weight, t.bias, weights)]
    arguments = {"frames": 2, "padding": 1, "in_policy": t.in_policy, "activation": "relu"}
    got = ak.gated_conv2d(*leaves, **arguments)
    want = gated_conv2d_reference(*leaves, **arguments)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    one_hot = F.one_hot(t.policy, 3).float()
    hard = ak.gated_conv2d(t.input, t.weight, t.bias, one_hot, **arguments)
    torch.testing.assert_close(
        hard, ak.gated_conv2d(t.input, t.weight, t.bias, t.policy, **arguments), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(groups: int, activation: str | None) -> None:
    torch.manual_seed(0)
    input = torch.randn(4, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4 // groups, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    policy, in_policy = torch.randint(0, 3, (4, 8)), torch.randint(0, 3, (4, 4))
    weights = torch.rand(4, 8, 3, dtype=torch.float64, requires_grad=True)
    keywords = {"frames": 2, "padding": 1, "groups": groups, "in_policy": in_policy, "activation": activation}
    for arguments in ((input, weight, bias, policy), (input, weight, bias, weights)):
        assert torch.autograd.gradcheck(lambda *a: ak.gated_conv2d(*a, **keywords), arguments)


def test_second_derivative_of_the_reference() -> None:
    torch.manual_seed(0)
    input = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    policy = torch.tensor([[KEEP, SKIP], [REUSE, KEEP]])
    assert torch.autograd.gradgradcheck(
        lambda x, w: ak.gated_conv2d(x, w, None, policy, frames=2, padding=1, activation="silu"),
        (input, weight),
    )


@pytest.mark.usefixtures("cpu_backend")
def test_second_derivative_is_refused() -> None:
    t = make(Case())
    input = t.input.requires_grad_()
    output = ak.gated_conv2d(input, t.weight, None, t.policy, frames=2, padding=1)
    (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"gated_conv2d: no second derivative; .*use_backend\('reference'\)"
    ):
        grad.sum().backward()


@pytest.mark.usefixtures("backend")
def test_runs_under_autocast() -> None:
    t = make(Case())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ak.gated_conv2d(t.input, t.weight, t.bias, t.policy, frames=2, padding=1)
    want = ak.gated_conv2d(
        t.input.bfloat16(), t.weight.bfloat16(), t.bias.bfloat16(), t.policy, frames=2, padding=1
    )
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_channels(groups: int) -> None:
    t = make(Case(channels=8, groups=groups, in_policy="mixed"))
    arguments = {"frames": 2, "padding": 1, "groups": groups, "in_policy": t.in_policy}
    got = ak.gated_conv2d(t.input, t.weight, t.bias, t.policy, **arguments)
    want = gated_conv2d_reference(t.input, t.weight, t.bias, t.policy, **arguments)
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [0, 1, 2, 3])
@pytest.mark.parametrize("depthwise", [False, True])
def test_opcheck(layout: str, activation: int, depthwise: bool) -> None:
    case = Case(groups=4 if depthwise else 1, in_policy="mixed", layout=layout)
    t = make(case)
    leaves = [x.requires_grad_() for x in (t.input, t.weight, t.bias)]
    conv = [1, 1], [1, 1], [1, 1], case.groups
    forward = torch.ops.adakernels.gated_conv2d.default
    torch.library.opcheck(forward, (*leaves, t.policy, t.in_policy, 2, *conv, activation))
    grad = torch.randn_like(forward(*leaves, t.policy, t.in_policy, 2, *conv, 0))
    tensors = grad, t.input.detach(), t.weight.detach(), t.policy, t.in_policy
    backward = torch.ops.adakernels.gated_conv2d_backward.default
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward, (*tensors, 2, *conv, *wanted))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_compiles_once_for_all_policies(activation: str | None) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(input: Tensor, weight: Tensor, bias: Tensor, policy: Tensor, in_policy: Tensor) -> Tensor:
        return ak.gated_conv2d(
            input, weight, bias, policy, frames=2, padding=1, in_policy=in_policy, activation=activation
        )

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for seed in range(3):
        t = make(Case(in_policy="mixed", seed=seed))
        tensors = t.input.requires_grad_(), t.weight, t.bias, t.policy, t.in_policy
        got, want = compiled(*tensors), call(*tensors)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), t.input), torch.autograd.grad(want.sum(), t.input)
        )
    assert counter.frame_count == 1


@pytest.mark.usefixtures("backend")
def test_compiles_once_for_all_sizes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(input: Tensor, weight: Tensor, policy: Tensor) -> Tensor:
        return ak.gated_conv2d(input, weight, None, policy, frames=2, padding=1)

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    # No two sizes of the first call are equal, or torch would take them for one.
    for clips, size in ((2, (9, 7)), (3, (6, 11)), (5, (12, 10))):
        t = make(Case(clips=clips, channels=5, size=size))
        torch.testing.assert_close(compiled(t.input, t.weight, t.policy), call(t.input, t.weight, t.policy))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_by_inductor(layout: str) -> None:
    torch._dynamo.reset()
    t = make(Case(layout=layout, in_policy="mixed"))
    weight = t.weight.requires_grad_()

    def call(input: Tensor, policy: Tensor) -> Tensor:
        mixed = ak.gated_conv2d(
            input * 2, weight, None, policy, frames=2, padding=1, in_policy=t.in_policy, activation="relu"
        )
        return mixed + 1

    compiled = torch.compile(call, fullgraph=True)
    got, want = compiled(t.input, t.policy), call(t.input, t.policy)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sum(), weight), torch.autograd.grad(want.sum(), weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cpu_backend")
def test_compiled_code_finds_bad_values() -> None:
    torch._dynamo.reset()
    t = make(Case())
    compiled = torch.compile(
        lambda policy: ak.gated_conv2d(t.input, t.weight, None, policy, frames=2, padding=1),
        backend="aot_eager",
        fullgraph=True,
    )
    compiled(t.policy)
    with pytest.raises(ValueError, match=r"gated_conv2d: expected policy values 0 \(KEEP\), .* got 7"):
        compiled(t.policy + 5 * (t.policy == SKIP))

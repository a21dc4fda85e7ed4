"""dynamic_conv3d against its reference, over everything that its arguments may be."""

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
from torch import Tensor

import adakernels as ak
from adakernels import backends
from adakernels.ops import dynamic_conv3d_flops, dynamic_conv3d_reference

NAMES = ("input", "weight", "bias", "temporal_gate", "channel_gate", "temporal_weight", "channel_weight")


@dataclass(frozen=True)
class Case:
    """A call of the operator, but for the tensors' contents, which follow from `seed`."""

    clips: int = 2
    channels: int = 4
    out_channels: int = 8
    groups: int = 1
    size: tuple[int, int, int] = (4, 6, 5)
    kernel: tuple[int, int, int] = (1, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] | str = (0, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    bias: bool = True
    temporal: str = "3 mixed"
    channel: str = "3 mixed"
    filter: int = 3
    activation: str | None = None
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    wanted: tuple[bool, ...] = (True,) * 7
    seed: int = 0

    @property
    def keywords(self) -> dict:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
        }


# The number of levels, and which of them are live: some drawn for each clip, one drawn, all, none
# or one by its number.
GATES = ("none", "1 all", "2 mixed", "2 one", "2 1", "3 mixed", "3 one", "3 all", "3 zero", "3 1", "3 2")
LAYOUTS = ("contiguous", "channels_last", "sliced")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = draw(
        st.sampled_from([(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3), (5, 1, 1)])
        | st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
    )
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)))
    stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)))
    padding = draw(
        st.just(tuple(k // 2 for k in kernel))
        | st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
        | st.just("same")
    )
    if padding == "same":
        stride = (1, 1, 1)
    around = (3, 3, 3) if isinstance(padding, str) else padding
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, around, strict=True)]
    most = (9, 13, 20)
    size = tuple(draw(st.integers(low, max(low, high))) for low, high in zip(least, most, strict=True))
    channels = draw(st.integers(1, 9) | st.integers(1, 40))
    depthwise = draw(st.booleans())
    temporal, channel = draw(
        st.tuples(st.sampled_from(GATES), st.sampled_from(GATES)).filter(
            lambda gates: gates != ("none", "none")
        )
    )
    return Case(
        clips=draw(st.integers(0, 3)),
        channels=channels,
        out_channels=channels * draw(st.integers(1, 2)) if depthwise else draw(st.integers(1, 40)),
        groups=channels if depthwise else 1,
        size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        temporal=temporal,
        channel=channel,
        filter=draw(st.sampled_from([1, 3])),
        activation=draw(st.sampled_from([None, "relu", "relu6", "silu"])),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        wanted=draw(st.tuples(*[st.booleans()] * 7)),
        seed=draw(st.integers(0, 2**31)),
    )


FIXED = [
    Case(),
    Case(kernel=(1, 1, 1), padding=(0, 0, 0), filter=1, activation="relu"),
    Case(kernel=(3, 1, 1), padding=(1, 0, 0), stride=(2, 1, 1), size=(9, 4, 4), activation="relu"),
    Case(kernel=(3, 3, 3), padding=(1, 1, 1), size=(5, 7, 7), layout="channels_last"),
    Case(kernel=(3, 3, 3), padding=(1, 1, 1), channels=6, out_channels=12, groups=6, activation="silu"),
    Case(kernel=(3, 3, 3), padding="same", dilation=(2, 1, 2), size=(6, 6, 6), layout="sliced"),
    # Levels beyond T, T no multiple of R, channels no multiple of 2^p.
    Case(size=(1, 6, 6), temporal="3 2", channel="3 2", out_channels=7),
    Case(size=(3, 6, 6), temporal="3 2", channel="none", clips=3),
    Case(size=(7, 14, 14), temporal="3 2", channel="3 1", channels=20, out_channels=37, activation="relu"),
    Case(size=(6, 5, 4), out_channels=5, clips=5, activation="relu6"),
    Case(out_channels=1, channel="3 all", temporal="3 all"),
    Case(out_channels=921 // 4, channels=33, size=(3, 8, 8), channel="3 2", temporal="2 1"),
    # Gates.
    Case(temporal="3 zero", channel="3 mixed", activation="silu"),
    Case(temporal="3 mixed", channel="3 zero"),
    Case(temporal="none", channel="2 1", activation="relu", layout="channels_last"),
    Case(temporal="2 1", channel="none", stride=(2, 2, 2), size=(8, 9, 9)),
    Case(temporal="1 all", channel="1 all", activation="relu"),
    Case(temporal="2 one", channel="3 one", clips=6, size=(8, 12, 12), channels=16, out_channels=24),
    Case(clips=0),
    Case(dtype=torch.bfloat16, activation="relu"),
    # Rows of half a vector, one and several, of all instruction sets.
    Case(size=(9, 6, 2), channels=5, temporal="3 mixed", channel="2 1", activation="relu"),
    Case(size=(5, 6, 4), channels=5, temporal="2 1", channel="3 all", activation="relu"),
    Case(size=(5, 3, 8), channels=5, temporal="3 all", channel="2 mixed", activation="silu"),
    Case(size=(6, 10, 8), channels=5, temporal="3 one", channel="none", clips=4),
    Case(size=(3, 9, 16), channels=5, temporal="none", channel="3 mixed", activation="relu"),
    Case(size=(4, 5, 32), channels=5, temporal="2 mixed", channel="3 one", activation="relu6"),
    # Rows of an odd number of vectors, and as many rows as leave some for every size of a block of them.
    Case(size=(3, 5, 48), channels=3, temporal="2 one", channel="3 mixed", activation="relu"),
    Case(size=(3, 13, 16), channels=3, temporal="3 mixed", channel="2 one"),
    # Small planes of so many frames that some groups of them are made together, the last group being shorter.
    Case(size=(23, 8, 8), kernel=(1, 1, 1), padding=(0, 0, 0), temporal="3 one", channel="2 1", clips=4),
    Case(size=(39, 4, 4), kernel=(1, 1, 1), padding=(0, 0, 0), temporal="2 1", channel="2 mixed", clips=2),
    # The same of depthwise convolutions, which sum planes as they lie.
    *(
        Case(
            channels=channels,
            out_channels=channels * per_channel,
            groups=channels,
            size=(6, height, width),
            kernel=(frames, 3, 3),
            padding=(frames // 2, 1, 1),
            temporal=temporal,
            channel="3 mixed",
        )
        for channels, per_channel, frames, height, width, temporal in (
            (6, 1, 3, 4, 4, "3 mixed"),
            (5, 2, 3, 6, 8, "2 1"),
            (3, 1, 1, 5, 8, "3 one"),
            (9, 1, 5, 7, 16, "3 all"),
            (4, 1, 3, 1, 48, "2 mixed"),
        )
    ),
    # Planes that meet in the same sets of a cache.
    Case(
        size=(16, 8, 8),
        channels=20,
        out_channels=50,
        kernel=(1, 1, 1),
        padding=(0, 0, 0),
        temporal="2 1",
        activation="relu",
    ),
    # Rows longer than what is summed at once, and planes of one pixel.
    Case(size=(2, 2, 600), channels=2, out_channels=4, temporal="2 mixed"),
    Case(size=(5, 1, 1), kernel=(1, 1, 1), padding=(0, 0, 0)),
    Case(wanted=(True, False, False, False, False, False, False)),
    Case(wanted=(False, False, False, True, False, False, True)),
]


def make_gate(kind: str, clips: int) -> Tensor | None:
    if kind == "none":
        return None
    levels, which = kind.split()
    gate = torch.rand(clips, int(levels)) + 0.1
    if which == "mixed":
        gate[torch.rand(gate.shape) < 0.5] = 0
    elif which == "one":
        gate = F.one_hot(torch.randint(int(levels), (clips,)), int(levels)).float()
    elif which == "zero":
        gate.zero_()
    elif which != "all":
        gate = F.one_hot(torch.full((clips,), int(which)), int(levels)) * gate
    return gate


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    if layout == "sliced":
        return F.pad(tensor, (1, 2, 1, 1), value=float("nan"))[..., 1:-1, 1:-2]
    return tensor


def make(case: Case) -> dict[str, Tensor | None]:
    torch.manual_seed(case.seed)
    fan_in = case.channels // case.groups * case.kernel[0] * case.kernel[1] * case.kernel[2]
    weight = torch.randn(case.out_channels, case.channels // case.groups, *case.kernel) / fan_in**0.5
    gates = make_gate(case.temporal, case.clips), make_gate(case.channel, case.clips)
    frames = 0 if gates[0] is None else 2 ** (gates[0].shape[1] - 1) - 1
    filters = torch.randn(frames + 1, case.out_channels, case.filter, case.filter) / case.filter
    return {
        "input": lay_out(torch.randn(case.clips, case.channels, *case.size).to(case.dtype), case.layout),
        "weight": weight.to(case.dtype),
        "bias": torch.randn(case.out_channels).to(case.dtype) if case.bias else None,
        "temporal_gate": gates[0],
        "channel_gate": gates[1],
        "temporal_weight": filters[1:].to(case.dtype) if frames > 0 else None,
        "channel_weight": None if gates[1] is None else filters[0].to(case.dtype),
    }


def in_float64(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.detach().double() for name, x in tensors.items()}


def bounds_of(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Every plane filled with its largest absolute value: Winograd's method rounds values of that size."""

    def bound(name: str, x: Tensor) -> Tensor:
        x = x.abs()
        return x.amax((-2, -1), keepdim=True).expand_as(x).clone() if name in ("input", "weight") else x

    return {name: None if x is None else bound(name, x) for name, x in in_float64(tensors).items()}


def assert_within_rounding(got: Tensor, want: Tensor, magnitude: Tensor, rounded: Tensor, what: str) -> None:
    """`magnitude` is the sum of the bounds of all that is added, `rounded` that of all that is rounded.

    Sums are kept in float32 for both dtypes: of at most a few thousand products, they err by a few eps of
    their magnitude, and 16 leaves room. A rounding errs by half an eps of the value.
    """
    assert got.shape == want.shape, what
    assert got.isfinite().all(), f"{what} is not finite"
    room = 16 * torch.finfo(torch.float32).eps * magnitude + torch.finfo(got.dtype).eps / 2 * rounded
    excess = (got.double() - want).abs() - room
    assert excess.numel() == 0 or excess.max() <= 1e-30, f"{what} is off by {excess.max():.3g} too much"


def check_forward(case: Case) -> None:
    tensors = make(case)
    with torch.no_grad():
        got = ak.dynamic_conv3d(**tensors, **case.keywords)
    linear = case.keywords | {"activation": None}
    want = dynamic_conv3d_reference(**in_float64(tensors), **case.keywords)
    magnitude = dynamic_conv3d_reference(**bounds_of(tensors), **linear)
    rounded = want.abs()
    if backends.requested_backend() == "reference":
        # The reference rounds what every step gives.
        rounded = 8 * magnitude
    assert got.dtype == case.dtype
    assert_within_rounding(got, want, magnitude, rounded, "output")
    if tensors["input"].is_contiguous():
        assert got.is_contiguous()
    elif case.layout == "channels_last":
        assert got.is_contiguous(memory_format=torch.channels_last_3d)


def check_backward(case: Case) -> None:
    tensors = make(case)
    leaves = {name: x for name, x in tensors.items() if x is not None}
    for name, leaf in leaves.items():
        leaf.requires_grad_(case.wanted[NAMES.index(name)])
    output = ak.dynamic_conv3d(**tensors, **case.keywords)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    assert output.requires_grad == bool(wanted)
    if not wanted:
        return
    linear_keywords = case.keywords | {"activation": None}
    exact = in_float64(tensors)
    for name in wanted:
        exact[name].requires_grad_()
    linear = dynamic_conv3d_reference(**exact, **linear_keywords)
    grad = torch.randn_like(output)
    if not linear.requires_grad:
        # What is wanted has no part in the result.
        output.backward(grad)
        assert all((leaves[name].grad == 0).all() for name in wanted)
        return
    if case.activation in ("relu", "relu6"):
        # At a kink, rounding alone decides which of two derivatives is taken.
        near = (linear.abs() < 0.1) | ((linear - 6).abs() < 0.1)
        grad = torch.where(near, 0, grad).to(case.dtype)
    output.backward(grad)
    activated = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}[case.activation](linear)
    want = torch.autograd.grad(activated, [exact[name] for name in wanted], grad.double(), allow_unused=True)
    bounds = bounds_of(tensors)
    for name in wanted:
        bounds[name].requires_grad_()
    bound = dynamic_conv3d_reference(**bounds, **linear_keywords)
    # The derivative of silu is at most 1.1, and off by the rounding of its argument.
    scale = (2 + linear.detach().abs()) if case.activation == "silu" else 1
    size = (grad.double().abs() * scale).amax((3, 4), keepdim=True).expand_as(grad)
    magnitudes = torch.autograd.grad(bound, [bounds[name] for name in wanted], size, allow_unused=True)
    for name, exact_grad, magnitude in zip(wanted, want, magnitudes, strict=True):
        leaf = leaves[name]
        if exact_grad is None:
            assert leaf.grad is None or (leaf.grad == 0).all()
            continue
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        rounded = exact_grad.abs()
        if case.dtype == torch.bfloat16 and (
            case.activation == "silu" or backends.requested_backend() == "reference"
        ):
            rounded = 8 * magnitude
        if leaf.dtype == torch.float32 and case.dtype == torch.bfloat16:
            # A gate has more digits than what its gradient is summed from.
            rounded = rounded + magnitude * (torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps)
        assert_within_rounding(leaf.grad, exact_grad, magnitude, rounded, f"gradient of {name}")
        # What takes no part gets exactly nothing, not something small.
        assert (leaf.grad[magnitude == 0] == 0).all()


@pytest.mark.usefixtures("cpu_backend")
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
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


# Outputs so large that they are written past the caches: rows of several vectors, of one, of half a
# vector, of any width, and planes that do not begin with a line of the cache.
LARGE = [
    Case(clips=4, channels=2, out_channels=20, size=(frames, height, width), kernel=kernel, padding=padding)
    for frames, height, width in ((12, 32, 32), (48, 16, 16), (176, 8, 8), (24, 20, 24), (25, 20, 25))
    for kernel, padding in (((1, 1, 1), (0, 0, 0)), ((1, 3, 3), (0, 1, 1)))
]


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("case", LARGE, ids=range(len(LARGE)))
@pytest.mark.parametrize("temporal, channel", [("3 mixed", "3 mixed"), ("3 1", "3 2"), ("none", "2 1")])
def test_large_outputs(case: Case, temporal: str, channel: str) -> None:
    check_forward(replace(case, temporal=temporal, channel=channel, activation="relu"))


def test_every_instruction_set(on_instruction_set: Callable[..., None]) -> None:
    on_instruction_set(
        f"{Path(__file__)}::test_fixed_cases", f"{Path(__file__)}::test_large_outputs", "-k", "cpu or large"
    )


def test_wrong_results_are_beyond_rounding(monkeypatch: pytest.MonkeyPatch, cpu_backend: None) -> None:
    original = ak.dynamic_conv3d
    for wrong in (lambda y: y * 0, lambda y: y.roll(1, dims=1), lambda y: y.roll(1, dims=2)):
        with monkeypatch.context() as patched:
            patched.setattr(ak, "dynamic_conv3d", lambda wrong=wrong, **kw: wrong(original(**kw)))
            with pytest.raises(AssertionError, match="output is off by"):
                check_forward(FIXED[8])
            with pytest.raises(AssertionError, match="gradient of input is off by"):
                check_backward(FIXED[8])


def test_reference_is_the_definition() -> None:
    """Frame by frame and channel by channel, from convolutions of longer strides and fewer channels."""
    case = Case(size=(7, 5, 5), out_channels=10, kernel=(3, 3, 3), padding=(1, 1, 1), stride=(1, 2, 1))
    t = make(case)
    got = dynamic_conv3d_reference(**t, **case.keywords)

    def filtered(plane: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(plane[None, None], kernel[None, None], padding=1)[0, 0]

    for b in range(2):
        want = torch.zeros_like(got[b])
        for j, v_t in enumerate(t["temporal_gate"][b]):
            for i, v_c in enumerate(t["channel_gate"][b]):
                R, computed = 2**j, (10 + 2**i - 1) // 2**i
                features = F.conv3d(
                    t["input"][b : b + 1],
                    t["weight"][:computed],
                    t["bias"][:computed],
                    (R, 2, 1),
                    1,
                )[0]
                for frame in range(7):
                    for c in range(10):
                        plane = features[c % computed, frame // R]
                        if c >= computed:
                            plane = filtered(plane, t["channel_weight"][c])
                        if frame % R > 0:
                            plane = filtered(plane, t["temporal_weight"][frame % R - 1, c])
                        want[c, frame] += v_t * v_c * plane
        torch.testing.assert_close(got[b], want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_level_0_is_conv3d(activation: str | None) -> None:
    t = make(Case(temporal="2 0", channel="3 0"))
    for name in ("temporal_gate", "channel_gate"):
        t[name] = (t[name] > 0).float()
    got = ak.dynamic_conv3d(**t, padding=(0, 1, 1), activation=activation)
    want = F.conv3d(t["input"], t["weight"], t["bias"], padding=(0, 1, 1))
    want = want if activation is None else getattr(F, activation)(want)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_no_gates_is_conv3d(padding: int | str) -> None:
    t = make(Case())
    got = ak.dynamic_conv3d(t["input"], t["weight"], t["bias"], padding=padding, activation="relu")
    assert torch.equal(got, F.relu(F.conv3d(t["input"], t["weight"], t["bias"], padding=padding)))


@pytest.mark.usefixtures("cpu_backend")
def test_dead_branches_are_not_computed() -> None:
    case = Case(temporal="3 2", channel="3 1", size=(6, 5, 5), clips=3)
    t = make(case)
    t["temporal_gate"][1] = 0
    want = ak.dynamic_conv3d(**t, **case.keywords)
    assert (want[1] == 0).all()
    # Not read: frames between computed ones, the clip that has none, weights of channels that are made.
    t["input"][1] = t["input"][:, :, [1, 2, 3, 5]] = float("nan")
    t["weight"][4:] = t["bias"][4:] = t["channel_weight"][:4] = float("nan")
    assert torch.equal(ak.dynamic_conv3d(**t, **case.keywords), want)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(seed: int, activation: str | None) -> None:
    case = Case(size=(3, 3, 2), channels=2, out_channels=3, clips=2, temporal="2 mixed", seed=seed)
    t = {name: x.requires_grad_() for name, x in in_float64(make(case)).items()}
    # A step away from 0 would bring a dead branch to life.
    gates = {name: t.pop(name) for name in ("temporal_gate", "channel_gate")}
    live = {name: gate.detach() > 0 for name, gate in gates.items()}

    def call(*tensors: Tensor) -> Tensor:
        arguments = dict(zip((*t, *gates), tensors, strict=True))
        for name, alive in live.items():
            arguments[name] = torch.where(alive, arguments[name], 0)
        return ak.dynamic_conv3d(**arguments, padding=(0, 1, 1), activation=activation)

    assert torch.autograd.gradcheck(call, (*t.values(), *gates.values()))


@pytest.mark.usefixtures("backend")
def test_dead_levels_get_no_gradient() -> None:
    t = make(Case(temporal="3 mixed", channel="3 mixed", clips=6))
    for name in ("temporal_gate", "channel_gate"):
        t[name].requires_grad_()
    ak.dynamic_conv3d(**t, padding=(0, 1, 1)).square().sum().backward()
    dead = (t["temporal_gate"] == 0).all(1) | (t["channel_gate"] == 0).all(1)
    for name in ("temporal_gate", "channel_gate"):
        live = (t[name] > 0) & ~dead[:, None]
        assert (t[name].grad[~live] == 0).all()
        assert (t[name].grad[live] != 0).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gate", ["temporal", "channel"])
def test_filters_without_their_gate_are_not_used(gate: str) -> None:
    tensors = {name: x for name, x in make(Case()).items() if x is not None and name != f"{gate}_gate"}
    for leaf in tensors.values():
        leaf.requires_grad_()
    ak.dynamic_conv3d(**tensors, padding=(0, 1, 1)).sum().backward()
    assert {name for name, leaf in tensors.items() if leaf.grad is None} == {f"{gate}_weight"}


@pytest.mark.usefixtures("cpu_backend")
def test_second_derivatives_are_refused() -> None:
    t = make(Case())
    t["input"].requires_grad_()
    output = ak.dynamic_conv3d(**t, padding=(0, 1, 1))
    (grad,) = torch.autograd.grad(output.square().sum(), t["input"], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"dynamic_conv3d: no second derivative; .*use_backend\('reference'\)"
    ):
        grad.sum().backward()


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gates", ["3 mixed", "none"])
def test_opcheck(layout: str, gates: str) -> None:
    case = Case(layout=layout, channel=gates, size=(3, 4, 3), activation="relu")
    t = make(case)
    conv = case.stride, case.padding, case.dilation, case.groups
    output = ak.dynamic_conv3d(**t, **case.keywords)
    wanted = tuple(x is not None for x in t.values())
    torch.library.opcheck(
        torch.ops.adakernels.dynamic_conv3d_backward.default,
        (torch.randn_like(output), *t.values(), *conv, *wanted),
    )
    leaves = (None if x is None else x.requires_grad_() for x in t.values())
    torch.library.opcheck(torch.ops.adakernels.dynamic_conv3d.default, (*leaves, *conv, 1))


def test_opcheck_of_the_value_check() -> None:
    for values in (torch.rand(4, 3), torch.rand(3, 4).t().requires_grad_()):
        torch.library.opcheck(torch.ops.adakernels.checked_weights.default, (values, "expected"))


@pytest.mark.usefixtures("backend")
def test_compiles_once_for_all_gates() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda t: ak.dynamic_conv3d(**t, padding=(0, 1, 1), activation="relu"),
        backend=counter,
        fullgraph=True,
    )
    for seed in range(3):
        t = make(Case(seed=seed))
        want = dynamic_conv3d_reference(**t, padding=(0, 1, 1), activation="relu")
        torch.testing.assert_close(compiled(t), want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("cpu_backend")
def test_autocast() -> None:
    t = make(Case())
    with torch.autocast("cpu", torch.bfloat16):
        got = ak.dynamic_conv3d(**t, padding=(0, 1, 1))
    assert got.dtype == torch.bfloat16
    want = ak.dynamic_conv3d(
        **{name: x if "gate" in name else x.bfloat16() for name, x in t.items()}, padding=(0, 1, 1)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("wrong", [-0.5, float("nan"), -float("nan")])
def test_negative_gates(backend: str, wrong: float) -> None:
    for name in ("temporal_gate", "channel_gate"):
        t = make(Case())
        t[name][1, 1] = wrong
        sentence = f"dynamic_conv3d: expected {name} of non-negative weights, got {wrong:g}"
        with pytest.raises(ValueError, match=f"{sentence}$"):
            ak.dynamic_conv3d(**t, padding=(0, 1, 1))


BAD = [
    (
        {"temporal_gate": torch.ones(3, 2)},
        ValueError,
        r"expected temporal_gate of shape \[B, S_t\] = \[2, 1 to 3\], got \[3, 2\]",
    ),
    (
        {"channel_gate": torch.ones(2, 4)},
        ValueError,
        r"expected channel_gate of shape \[B, S_c\] = \[2, 1 to 3\], got \[2, 4\]",
    ),
    (
        {"channel_gate": torch.ones(2)},
        ValueError,
        r"expected channel_gate of rank 2 \[B, S_c\], got shape \[2\]",
    ),
    (
        {"temporal_gate": torch.ones(2, 3).long()},
        TypeError,
        "expected temporal_gate of dtype float32, .*, got int64",
    ),
    (
        {"temporal_gate": torch.ones(2, 3, device="meta")},
        ValueError,
        "expected temporal_gate on the device of input",
    ),
    ({"temporal_weight": None}, ValueError, "expected temporal_weight with 3 levels, got None"),
    ({"channel_weight": None}, ValueError, "expected channel_weight with 3 levels, got None"),
    (
        {"temporal_weight": torch.ones(1, 8, 3, 3)},
        ValueError,
        r"temporal_weight of shape .* = \[3, 8, 3, 3\], got \[1, 8, 3, 3\]",
    ),
    (
        {"channel_weight": torch.ones(4, 3, 3)},
        ValueError,
        r"channel_weight of shape .* = \[8, 3, 3\], got \[4, 3, 3\]",
    ),
    ({"channel_weight": torch.ones(8, 5, 5)}, ValueError, "expected channel_weight of k = 1 or 3, got 5"),
    (
        {"channel_weight": torch.ones(8, 1, 1)},
        ValueError,
        "one k of temporal_weight and channel_weight, got 3 and 1",
    ),
    (
        {"channel_weight": torch.ones(8, 3, 3).double()},
        TypeError,
        "channel_weight of the dtype of input, float32, got float64",
    ),
    (
        {"input": torch.ones(4, 4, 6, 5)},
        ValueError,
        r"expected input of rank 5 \[B, C_in, T, H, W\], got shape",
    ),
    ({"padding": 5, "stride": 0}, ValueError, "expected stride of at least 1, got 0"),
    ({"weight": [1]}, TypeError, "expected weight to be a Tensor, got list"),
]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("change", "error", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_input(change: dict, error: type[Exception], sentence: str) -> None:
    t = make(Case())
    ak.dynamic_conv3d(**t, padding=(0, 1, 1))
    with pytest.raises(error, match=f"dynamic_conv3d: .*{sentence}"):
        ak.dynamic_conv3d(**(t | {"padding": (0, 1, 1)} | change))


def test_backends() -> None:
    t = make(Case())
    assert ak.explain(ak.dynamic_conv3d, **t).backend == "cpu"
    assert ak.explain(ak.dynamic_conv3d, t["input"], t["weight"]).backend == "reference"
    grouped = make(Case(channels=4, groups=2))
    reasons = ak.explain(ak.dynamic_conv3d, **grouped, groups=2)
    assert reasons.backend == "reference"
    assert reasons.reasons["cpu"] == "it takes groups = 1 or C_in = 4, not 2"
    got = ak.dynamic_conv3d(**grouped, groups=2, padding=(0, 1, 1))
    assert torch.equal(got, dynamic_conv3d_reference(**grouped, groups=2, padding=(0, 1, 1)))


def test_flops() -> None:
    gate = torch.tensor([[0, 0, 0.0], [1, 0, 0], [0, 0.5, 0], [0, 0, 1], [0, 1, 1]])
    one = torch.tensor([[1.0]] * 5)
    sizes = {"batch": 5, "output_size": (7, 3, 5)}
    shape = (10, 4, 3, 3, 3)
    dense, actual = dynamic_conv3d_flops(shape, gate, one, **sizes)
    row = 15 * 4 * 27
    assert dense == 7 * 10 * row
    assert actual.tolist() == [0, 70 * row, 40 * row, 20 * row, 40 * row]
    actual = dynamic_conv3d_flops(shape, None, gate, **sizes)[1]
    assert actual.tolist() == [0, 70 * row, 35 * row, 21 * row, 35 * row]
    # One pixel and frame of the clip at both last levels: 3 channels make 7, 2 frames make 5.
    actual = dynamic_conv3d_flops(shape, gate, gate, **sizes, taps=9)[1]
    assert actual[3] == 15 * (2 * 3 * 4 * 27 + 9 * (2 * 7 + 5 * 10))


def test_count_flops() -> None:
    t = make(Case(temporal="2 1", channel="none"))

    class Model(torch.nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return ak.dynamic_conv3d(**t | {"input": input}, padding=(0, 1, 1))

    count = ak.count_flops(Model(), t["input"])
    per_frame = 30 * 8 * 4 * 9
    assert count.dense == pytest.approx(4 * per_frame / 1e9)
    assert count.actual.tolist() == pytest.approx([(2 * per_frame + 2 * 8 * 30 * 9) / 1e9] * 2)

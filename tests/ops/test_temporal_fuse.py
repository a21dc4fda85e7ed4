"""temporal_fuse against its reference, with integer and float policies."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import adakernels as ak
from adakernels.ops import temporal_fuse_reference

KEEP, REUSE, SKIP = (int(value) for value in ak.Policy)


def make(
    clips: int = 2,
    frames: int = 3,
    channels: int = 5,
    size: tuple[int, int] = (4, 3),
    soft: bool = False,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    batch = clips * frames
    input = torch.randn(batch, channels, *size).to(dtype)
    if layout == "channels_last":
        input = input.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        input = F.pad(input, (1, 1), value=float("nan"))[..., 1:-1]
    policy = torch.rand(batch, channels, 3).softmax(-1) if soft else torch.randint(0, 3, (batch, channels))
    return input, policy


@pytest.mark.usefixtures("cpu_backend")
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    clips=st.integers(0, 3),
    frames=st.integers(1, 4),
    channels=st.integers(1, 40),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    soft=st.booleans(),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    grad_layout=st.sampled_from(["contiguous", "channels_last", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(
    clips: int,
    frames: int,
    channels: int,
    size: tuple[int, int],
    soft: bool,
    layout: str,
    dtype: torch.dtype,
    grad_layout: str,
    seed: int,
) -> None:
    input, policy = make(clips, frames, channels, size, soft, layout, dtype, seed)
    leaves = [input.requires_grad_(), policy.requires_grad_()] if soft else [input.requires_grad_()]
    got = ak.temporal_fuse(input, policy, frames=frames)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    # The policy takes the input's dtype.
    rounded = policy.to(dtype).double() if soft else policy
    exact_policy = exact[1] + (rounded - exact[1]).detach() if soft else policy
    want = temporal_fuse_reference(exact[0], exact_policy, frames=frames)
    assert got.dtype == dtype
    if layout == "contiguous" or (layout == "channels_last" and not input.is_contiguous()):
        format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert got.is_contiguous(memory_format=format)
    grad = torch.randn_like(got)
    if grad_layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    elif grad_layout == "expanded":
        grad = torch.ones((), dtype=dtype).expand_as(grad)
    grads = torch.autograd.grad(got, leaves, grad)
    exact_grads = torch.autograd.grad(want, exact, grad.double())
    # Two products and a sum; the policy's gradient sums over at most 81 pixels.
    eps = torch.finfo(dtype).eps
    if soft:
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=8 * eps)
    else:
        assert torch.equal(got.double(), want)
    for mine, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(mine.double(), exact_grad, rtol=4 * eps, atol=64 * eps)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("soft", [False, True])
def test_history_is_raw_and_stays_in_its_clip(soft: bool) -> None:
    input = torch.arange(1.0, 7.0).reshape(6, 1, 1, 1)
    policy = torch.tensor([REUSE, REUSE, REUSE, REUSE, KEEP, SKIP]).reshape(6, 1)
    got = ak.temporal_fuse(input, F.one_hot(policy, 3).float() if soft else policy, frames=3)
    assert got.flatten().tolist() == [0, 1, 2, 0, 5, 0]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_policy_of_another_float_dtype(dtype: torch.dtype) -> None:
    input, policy = make(soft=True)
    got = ak.temporal_fuse(input, policy.to(dtype).requires_grad_(), frames=3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, temporal_fuse_reference(input, policy.to(dtype).float(), frames=3))


@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(soft: bool) -> None:
    input, policy = make(soft=soft)
    leaves = [input.double().requires_grad_(), policy.double().requires_grad_() if soft else policy]
    function = lambda *a: ak.temporal_fuse(*a, frames=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.usefixtures("cpu_backend")
def test_second_derivative_is_refused() -> None:
    input, policy = make(soft=True)
    output = ak.temporal_fuse(input.requires_grad_(), policy, frames=3)
    (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"temporal_fuse: no second derivative; .*use_backend\('reference'\)"
    ):
        grad.sum().backward()


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(soft: bool, layout: str) -> None:
    input, policy = make(soft=soft, layout=layout)
    grad = torch.randn_like(input)
    torch.library.opcheck(
        torch.ops.adakernels.temporal_fuse_backward.default, (grad, input, policy, 3, True, soft)
    )
    leaves = input.requires_grad_(), policy.requires_grad_() if soft else policy
    torch.library.opcheck(torch.ops.adakernels.temporal_fuse.default, (*leaves, 3))


def test_opcheck_of_the_value_check() -> None:
    for policy in (torch.randint(0, 3, (4, 6)), torch.randint(0, 3, (6, 4), dtype=torch.uint8).t()):
        torch.library.opcheck(torch.ops.adakernels.checked_range.default, (policy, 3, "expected"))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("soft", [False, True])
def test_compiles_once_for_all_policies(soft: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda input, policy: ak.temporal_fuse(input, policy, frames=3), backend=counter, fullgraph=True
    )
    for seed in range(3):
        input, policy = make(soft=soft, seed=seed)
        want = temporal_fuse_reference(input, policy, frames=3)
        torch.testing.assert_close(compiled(input, policy), want)
    assert counter.frame_count == 1

"""The C++ kernels under threads, huge dilations, mixed memory formats and calls past the Python checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adakernels as ak

pytestmark = pytest.mark.usefixtures("cpu_backend")

# C_in, C_out, groups, kernel, stride, frames, size: one for every way to compute a convolution.
CONVOLUTIONS = [
    (8, 64, 1, 1, 1, 2, 28),
    (64, 64, 1, 3, 1, 4, 28),
    (32, 32, 1, 3, 1, 8, 7),
    (16, 32, 1, 3, 2, 4, 15),
    (24, 24, 24, 5, 1, 4, 30),
    (3, 48, 1, 7, 2, 2, 40),
]


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def convolve(case: tuple[int, ...]) -> list[Tensor]:
    """The output and the gradients of a convolution of fixed contents."""
    channels, out_channels, groups, kernel, stride, frames, size = case
    random = torch.Generator().manual_seed(0)
    shapes = (
        (frames, channels, size, size),
        (out_channels, channels // groups, kernel, kernel),
        (out_channels,),
    )
    leaves = [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]
    policy = torch.randint(0, 3, (frames, out_channels), generator=random)
    in_policy = torch.randint(0, 3, (frames, channels), generator=random)
    conv = {"stride": stride, "padding": kernel // 2, "groups": groups}
    output = ak.gated_conv2d(*leaves, policy, frames=frames, in_policy=in_policy, **conv)
    grad = torch.randn(output.shape, generator=random)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_calls_of_several_threads_at_once() -> None:
    want = [convolve(case) for case in CONVOLUTIONS]
    # Every thread starts at another case, so that all kinds meet.
    order = [(start + i) % len(want) for start in range(len(want)) for i in range(2 * len(want))]
    with ThreadPoolExecutor(len(want)) as pool:
        got = list(pool.map(lambda i: convolve(CONVOLUTIONS[i]), order))
    assert all(same(result, want[i]) for i, result in zip(order, got, strict=True))


@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_number_of_threads_changes_no_bit(case: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    want = convolve(case)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(convolve(case), want), f"{threads} threads"


@pytest.mark.parametrize(
    ("channels", "size", "dilation"), [(1, 2, 2**32), (64, 12, 1000)], ids=["past 32 bits", "past the input"]
)
def test_huge_dilation(channels: int, size: int, dilation: int) -> None:
    input, weight = torch.ones(1, channels, size, size), torch.ones(1, channels, 3, 3)
    if channels > 1:
        torch.manual_seed(0)
        input, weight = torch.randn_like(input), torch.randn_like(weight)
    keep = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        got = ak.gated_conv2d(input, weight, None, keep, padding=dilation, dilation=dilation)
    # All but the middle of the kernel lies in the padding.
    torch.testing.assert_close(got, F.conv2d(input, weight[:, :, 1:2, 1:2]), rtol=1e-5, atol=1e-4)


def test_gradient_of_a_huge_dilation() -> None:
    torch.manual_seed(0)
    input = torch.randn(1, 64, 12, 12, requires_grad=True)
    weight = torch.randn(1, 64, 3, 3, requires_grad=True)
    keep = torch.zeros(1, 1, dtype=torch.int64)
    got = ak.gated_conv2d(input, weight, None, keep, padding=1000, dilation=1000)
    want = F.conv2d(input, weight, padding=1000, dilation=1000)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (input, weight)),
        torch.autograd.grad(want.sum(), (input, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [3, 4, 5, 7])
def test_kernel_larger_than_the_map(kernel: int, memory_format: torch.memory_format) -> None:
    # What is left of these kernels on a 2x2 map are nine taps too, but not those of a 3x3 kernel.
    torch.manual_seed(0)
    input = torch.randn(4, 6, 2, 2, requires_grad=True)
    weight = torch.randn(5, 6, kernel, kernel).contiguous(memory_format=memory_format).requires_grad_()
    keep = torch.zeros(4, 5, dtype=torch.int64)
    got = ak.gated_conv2d(input, weight, None, keep, frames=4, padding=kernel // 2)
    want = F.conv2d(input, weight, padding=kernel // 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (input, weight)),
        torch.autograd.grad(want.sum(), (input, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_input_decides_the_memory_format(kind: str) -> None:
    input = torch.randn(2, 8, 16, 16)
    weight = torch.randn(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    policies = {"none": None, "integer": torch.zeros(2, 8, dtype=torch.int64), "float": torch.rand(2, 8, 3)}
    # Without an integer policy there is no kernel to ask for.
    with ak.use_backend("auto"):
        output = ak.gated_conv2d(input, weight, None, policies[kind], frames=2, padding=1)
    assert output.is_contiguous()


def raw_convolution(
    policy: Tensor | None = None,
    frames: int = 1,
    activation: int = 0,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    in_policy: Tensor | None = None,
) -> Tensor:
    policy = torch.zeros(2, 4, dtype=torch.int64) if policy is None else policy
    input, weight = torch.ones(2, 3, 5, 5, dtype=dtype), torch.ones(4, 3, 3, 3)
    conv = [1, 1], [1, 1], [1, 1], 1
    return torch.ops.adakernels.gated_conv2d(
        input, weight, bias, policy, in_policy, frames, *conv, activation
    )


BAD_RAW_CALLS: dict[str, Callable[[], Tensor]] = {
    "float64 features": lambda: torch.ops.adakernels.temporal_fuse(
        torch.ones(2, 3, 5, 5, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64), 1
    ),
    "float64 input": lambda: raw_convolution(dtype=torch.float64),
    "input unlike weight": lambda: raw_convolution(dtype=torch.bfloat16),
    "int32 policy": lambda: raw_convolution(torch.zeros(2, 4, dtype=torch.int32)),
    "small policy": lambda: raw_convolution(torch.zeros(1, 1, dtype=torch.int64)),
    "small in_policy": lambda: raw_convolution(in_policy=torch.zeros(1, 1, dtype=torch.int64)),
    "small bias": lambda: raw_convolution(bias=torch.ones(1)),
    "no frames": lambda: raw_convolution(frames=0),
    "frames that do not divide the batch": lambda: raw_convolution(frames=3),
    "unknown activation": lambda: raw_convolution(activation=9),
}


@pytest.mark.parametrize("call", BAD_RAW_CALLS.values(), ids=BAD_RAW_CALLS)
def test_operators_check_what_they_are_given(call: Callable[[], Tensor]) -> None:
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        call()


def test_operators_take_what_is_right() -> None:
    with torch.no_grad():
        assert raw_convolution().shape == (2, 4, 5, 5)

"""gated_conv2d on the CUDA and on the Triton kernels, against the reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adakernels.ops import gated_conv2d_reference
from adakernels.ops._conv_arguments import ACTIVATIONS
from adakernels.ops.policy import needed_channels


@dataclass(frozen=True)
class Case:
    clips: int
    frames: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str | None = None
    bias: bool = True

    @property
    def convolution(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


MATRIX = {
    "odd sizes": Case(2, 3, 5, 7, (7, 6), activation="relu"),
    "stride 2, two blocks of outputs": Case(1, 3, 20, 72, (5, 9), stride=(2, 2), activation="relu6"),
    "1x1, two blocks of inputs and pixels": Case(1, 2, 70, 66, (9, 15), (1, 1), padding=(0, 0), bias=False),
    "uneven": Case(1, 2, 6, 9, (11, 8), (3, 2), (2, 1), (2, 0), (2, 3), activation="silu"),
    "one pixel, one channel": Case(3, 1, 1, 1, (1, 1)),
    "strided 1x1": Case(1, 3, 33, 17, (6, 7), (1, 1), (2, 2), (0, 0)),
    "no frames": Case(0, 2, 4, 4, (3, 3)),
}
DEPTHWISE = {
    "5x5": Case(1, 3, 6, 6, (7, 5), (5, 5), padding=(2, 2), groups=6, activation="silu"),
    "stride 2, two outputs each": Case(2, 2, 5, 10, (8, 9), stride=(2, 2), groups=5),
    "two blocks, dilated": Case(1, 2, 70, 70, (6, 9), padding=(2, 1), dilation=(2, 1), groups=70, bias=False),
    "3x3, stride 2": Case(1, 2, 8, 8, (10, 9), stride=(2, 2), groups=8, activation="relu6"),
    "5x5, stride 2": Case(1, 2, 6, 6, (9, 12), (5, 5), (2, 2), (2, 2), groups=6),
    "3x3, odd": Case(1, 3, 5, 5, (6, 11), groups=5, activation="relu"),
    "no frames": Case(0, 1, 4, 4, (3, 3), groups=4),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MATRIX_FORMS = [(torch.float32, torch.contiguous_format), (torch.float16, torch.channels_last)]
DEPTHWISE_FORMS = [*MATRIX_FORMS, (torch.bfloat16, torch.channels_last)]
MATRIX_GRADIENTS = [
    ("o", torch.float16, torch.channels_last),
    ("i", torch.float32, torch.contiguous_format),
    ("oi", torch.float32, torch.channels_last),
]
DEPTHWISE_GRADIENTS = [*MATRIX_GRADIENTS, ("oi", torch.bfloat16, torch.channels_last)]


def make(
    case: Case, gates: str, dtype: torch.dtype, format: torch.memory_format, device: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Input, weight, bias, and the policies of outputs and inputs that `gates` names by "o" and "i"."""
    generator = torch.Generator().manual_seed(0)
    rows, fan_in = case.clips * case.frames, case.channels // case.groups * case.kernel[0] * case.kernel[1]
    input = torch.randn(rows, case.channels, *case.size, generator=generator)
    weight = torch.randn(case.out_channels, case.channels // case.groups, *case.kernel, generator=generator)
    bias = torch.randn(case.out_channels, generator=generator)
    policy = torch.randint(0, 3, (rows, case.out_channels), generator=generator)
    in_policy = torch.randint(0, 3, (rows, case.channels), generator=generator)
    return (
        input.to(device, dtype).contiguous(memory_format=format),
        (weight / fan_in**0.5).to(device, dtype),
        bias.to(device, dtype) if case.bias else None,
        policy.to(device) if "o" in gates else None,
        in_policy.to(device) if "i" in gates else None,
    )


def expected(case: Case, input: Tensor, weight: Tensor, bias: Tensor | None, policies: Any) -> Tensor:
    """In float64, from the same rounded values."""
    return gated_conv2d_reference(
        input.double(),
        weight.double(),
        None if bias is None else bias.double(),
        policies[0],
        frames=case.frames,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
        in_policy=policies[1],
        activation=case.activation,
    )


def run(kernels: Any, case: Case, *tensors: Tensor | None) -> Tensor:
    return kernels.gated_conv2d(*tensors, case.frames, *case.convolution, ACTIVATIONS.index(case.activation))


def check(kernels: Any, case: Case, gates: str, dtype: torch.dtype, format: torch.memory_format) -> None:
    input, weight, bias, *policies = make(case, gates, dtype, format, kernels.device)
    output = run(kernels, case, input, weight, bias, *policies)
    want = expected(case, input, weight, bias, policies)
    assert output.dtype == dtype
    if want.numel() > 0:
        assert output.stride() == want.contiguous(memory_format=format).stride()
    # Sums of up to 180 products in float32 and one rounding to the dtype; values are below 8.
    torch.testing.assert_close(output.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(("dtype", "format"), MATRIX_FORMS, ids=str)
@pytest.mark.parametrize("gates", ["o", "i", "oi"])
@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX)
def test_matches_the_reference(
    kernels: Any, case: Case, gates: str, dtype: torch.dtype, format: torch.memory_format
) -> None:
    check(kernels, case, gates, dtype, format)


@pytest.mark.parametrize(("dtype", "format"), DEPTHWISE_FORMS, ids=str)
@pytest.mark.parametrize("gates", ["o", "i", "oi"])
@pytest.mark.parametrize("case", DEPTHWISE.values(), ids=DEPTHWISE)
def test_depthwise_matches_the_reference(
    kernels: Any, case: Case, gates: str, dtype: torch.dtype, format: torch.memory_format
) -> None:
    check(kernels, case, gates, dtype, format)


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("value", [0, 1, 2, 7], ids=["keep", "reuse", "skip", "no policy value"])
def test_one_value_everywhere(kernels: Any, value: int, groups: int) -> None:
    case = Case(2, 3, 6, 6, (4, 3), groups=groups, activation="relu")
    input, weight, bias, policy, in_policy = make(
        case, "oi", torch.float32, torch.channels_last, kernels.device
    )
    assert policy is not None and in_policy is not None

    def matches() -> None:
        # What is no value of a policy counts as SKIP.
        want = expected(case, input, weight, bias, (policy.clamp(max=2), in_policy))
        output = run(kernels, case, input, weight, bias, policy, in_policy)
        torch.testing.assert_close(output.double(), want, rtol=1e-6, atol=1e-5)

    policy.fill_(value)
    matches()
    policy[1, 2], policy[4, 3] = 0, 1
    matches()
    in_policy.fill_(2)
    matches()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("groups", [1, 6])
def test_skipped_inputs_are_not_read(kernels: Any, groups: int, format: torch.memory_format) -> None:
    case = Case(1, 3, 6, 6, (4, 3), groups=groups)
    input, weight, bias, policy, in_policy = make(case, "oi", torch.float32, format, kernels.device)
    assert policy is not None and in_policy is not None
    want = run(kernels, case, input, weight, bias, policy, in_policy)
    poisoned = torch.where((in_policy == 2)[..., None, None], float("nan"), input).contiguous(
        memory_format=format
    )
    assert torch.equal(run(kernels, case, poisoned, weight, bias, policy, in_policy), want)


def test_frames_that_nobody_reads_are_not_read(kernels: Any) -> None:
    for groups in (1, 6):
        case = Case(2, 2, 6, 6, (4, 3), groups=groups)
        input, weight, bias, policy, _ = make(case, "o", torch.float32, torch.channels_last, kernels.device)
        assert policy is not None
        policy[1] = policy[2] = policy[3] = 2
        input[1:] = float("nan")
        assert torch.isfinite(run(kernels, case, input, weight, bias, policy, None)).all()


def test_arguments_that_are_not_dense(kernels: Any) -> None:
    case = Case(1, 2, 6, 8, (4, 5))
    input, weight, bias, policy, _ = make(case, "o", torch.float32, torch.channels_last, kernels.device)
    assert bias is not None
    want = run(kernels, case, input, weight, bias, policy, None)
    strided = torch.stack([weight, weight], -1)[..., 0], torch.stack([bias, bias], -1)[..., 0]
    assert torch.equal(run(kernels, case, input, *strided, policy, None), want)
    shifted = torch.cat([input.new_zeros(1), input.permute(0, 2, 3, 1).flatten()])[1:]
    shifted = shifted.view(input.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    assert torch.equal(run(kernels, case, shifted, weight, bias, policy, None), want)


def domain_lists(kernels: Any, policy: Tensor | None, in_policy: Tensor | None) -> Sequence[Tensor | None]:
    if kernels.name == "triton":
        from adakernels.triton.domain import build_domain

        return build_domain(policy, in_policy, frames=3)[:4]
    lists = kernels.domain(policy, in_policy, 3)
    return [
        *((None,) * 2 if policy is None else lists[:2]),
        *((None,) * 2 if in_policy is None else lists[2:]),
    ]


@pytest.mark.parametrize("channels", [1, 7, 64, 1500])
def test_domain(kernels: Any, channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    policy = torch.randint(0, 3, (6, channels), generator=generator).to(kernels.device)
    in_policy = torch.randint(0, 3, (6, 2 * channels), generator=generator).to(kernels.device)
    policy[3], in_policy[3] = 2, 2
    for given in ((policy, in_policy), (policy, None), (None, in_policy)):
        lists = domain_lists(kernels, *given)
        for wanted, found, count in (
            (needed_channels(policy, 3), *lists[:2]),
            (in_policy != 2, *lists[2:]),
        ):
            if found is None or count is None:
                continue
            assert torch.equal(count.long(), wanted.sum(1))
            assert torch.equal(found.sort(1).values, torch.arange(wanted.shape[1]).to(found).expand_as(found))
            for row, chosen, number in zip(found.tolist(), wanted, count.tolist(), strict=True):
                assert row[:number] == chosen.nonzero().flatten().tolist()


def gradients(
    kernels: Any, case: Case, gates: str, dtype: torch.dtype, format: torch.memory_format
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of input, weight and bias before the activation: the kernels' and the reference's, in float64."""
    case = replace(case, activation=None, bias=True)
    input, weight, bias, *policies = make(case, gates, dtype, format, kernels.device)
    leaves = [leaf.double().requires_grad_() for leaf in (input, weight, bias) if leaf is not None]
    output = expected(case, *leaves, policies)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(kernels.device, dtype)
    grad = grad.contiguous(memory_format=format)
    found = kernels.gated_conv2d_backward(
        grad, input, weight, *policies, case.frames, *case.convolution, True, True, True
    )
    assert found[1].is_contiguous() and (input.numel() == 0 or found[0].stride() == input.stride())
    return found, torch.autograd.grad(output, leaves, grad.double())


def check_gradients(
    kernels: Any, case: Case, gates: str, dtype: torch.dtype, format: torch.memory_format
) -> None:
    for mine, exact in zip(*gradients(kernels, case, gates, dtype, format), strict=True):
        assert mine.dtype == dtype
        # The sum that a reused channel gets is rounded to the dtype, and so is the result.
        tolerance = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
        largest = exact.abs().max().item() if exact.numel() > 0 else 0
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance * largest)
        assert (mine[exact == 0] == 0).all()


@pytest.mark.parametrize(("gates", "dtype", "format"), MATRIX_GRADIENTS, ids=str)
@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX)
def test_gradients(
    kernels: Any, case: Case, gates: str, dtype: torch.dtype, format: torch.memory_format
) -> None:
    check_gradients(kernels, case, gates, dtype, format)


@pytest.mark.parametrize(("gates", "dtype", "format"), DEPTHWISE_GRADIENTS, ids=str)
@pytest.mark.parametrize("case", DEPTHWISE.values(), ids=DEPTHWISE)
def test_depthwise_gradients(
    kernels: Any, case: Case, gates: str, dtype: torch.dtype, format: torch.memory_format
) -> None:
    check_gradients(kernels, case, gates, dtype, format)


@pytest.mark.parametrize("groups", [1, 6])
def test_unwanted_gradients_are_empty(kernels: Any, groups: int) -> None:
    case = Case(1, 2, 6, 6, (3, 4), groups=groups)
    input, weight, _, *policies = make(case, "oi", torch.float32, torch.channels_last, kernels.device)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        grads = kernels.gated_conv2d_backward(
            input, input, weight, *policies, case.frames, *case.convolution, *wanted
        )
        assert [grad.numel() > 0 for grad in grads] == list(wanted)


@pytest.mark.parametrize("groups", [1, 6])
def test_gradients_agree_in_every_bit(kernels: Any, groups: int) -> None:
    case = Case(1, 2, 6, 6, (4, 3), groups=groups)
    first, second = (gradients(kernels, case, "oi", torch.float16, torch.channels_last)[0] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_frames_that_share_a_sum(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["adakernels.triton.convolve"], "PROGRAMS", 1)
    for case in (Case(1, 3, 5, 70, (3, 2)), Case(1, 3, 6, 6, (3, 2), groups=6)):
        for gates in ("o", "i"):
            check_gradients(kernels, case, gates, torch.float32, torch.channels_last)


ON_CUDA = pytest.mark.parametrize("kernels", ["cuda"], indirect=True)


@ON_CUDA
@pytest.mark.parametrize("gates", ["", "o", "i", "oi"])
def test_sums_of_several_blocks(kernels: Any, gates: str) -> None:
    """Pixels are split among blocks, also within a frame, and frames run on where nothing is listed."""
    for case in (Case(1, 3, 9, 70, (13, 12)), Case(2, 2, 6, 6, (9, 14), groups=6)):
        check_gradients(kernels, case, gates, torch.float32, torch.channels_last)


@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_bfloat16(kernels: Any, case: Case, format: torch.memory_format) -> None:
    for gates in ("", "oi"):
        check(kernels, case, gates, torch.bfloat16, format)
        check_gradients(kernels, case, gates, torch.bfloat16, format)


@pytest.fixture
def tf32(kernels: Any) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    kernels.multiply_exactly(False)
    yield
    kernels.multiply_exactly(True)
    torch.set_float32_matmul_precision(before)


@ON_CUDA
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX)
def test_tf32(kernels: Any, case: Case) -> None:
    case = replace(case, activation=None)
    for gates in ("", "oi"):
        input, weight, bias, *policies = make(case, gates, torch.float32, torch.channels_last, kernels.device)
        output = run(kernels, case, input, weight, bias, *policies)
        found, exact = gradients(kernels, case, gates, torch.float32, torch.channels_last)
        wanted = (expected(case, input, weight, bias, policies), *exact)
        for mine, want in zip((output, *found), wanted, strict=True):
            # Factors of 11 bits: an error of 2^-11 each, in sums that mostly even out.
            largest = want.abs().max().item() if want.numel() > 0 else 0
            torch.testing.assert_close(mine.double(), want, rtol=0, atol=2**-10 * largest)


# In Triton's interpreter a case is slow, so there is one of every kind.
@pytest.mark.parametrize("gates", ["o", "i", "oi"])
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_split_sums(kernels: Any, gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["adakernels.triton.convolve"]
    splits: list[int] = []
    rule = module.splits_of_sums

    def noted(*arguments: int) -> int:
        splits.append(rule(*arguments))
        return splits[-1]

    monkeypatch.setattr(module, "splits_of_sums", noted)
    monkeypatch.setattr(module, "multiprocessors", lambda device: 32)
    case = Case(1, 2, 40, 72, (3, 3), stride=(1, 2), activation="relu")
    check(kernels, case, gates, torch.float32, torch.channels_last)
    found, exact = gradients(kernels, case, gates, torch.float32, torch.channels_last)
    tolerance = 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found[0].double(), exact[0], rtol=tolerance, atol=tolerance * 8)
    assert splits[0] > 1 and splits[-1] > 1


def test_split_sums_across_frames(triton_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["adakernels.triton.convolve"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    input, weight = torch.randn(3, 150, 2, 3, device=device), torch.randn(5, 150, 1, 1, device=device)
    arguments = weight[:, 0, 0, 0], 5, [0, 150], [1, 1], [0, 0], [1, 1], 1, 0
    whole = triton_kernels.slim_conv(input, weight, *arguments)
    monkeypatch.setattr(module, "LEAST_STEPS", 2)
    monkeypatch.setattr(module, "multiprocessors", lambda device: 32)
    split = triton_kernels.slim_conv(input, weight, *arguments)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-4)
    assert not torch.equal(split, whole)


@pytest.mark.parametrize(
    ("tiles", "steps", "splits"),
    [
        # Frames of 7x7 with 512 channels of 16 bits: 3x3, 1x1.
        (64, 72, 4),
        (64, 8, 1),
        # Tiles for most multiprocessors, for all of them; few steps; few tiles.
        (100, 72, 2),
        (133, 72, 1),
        (8, 20, 2),
        (8, 1000, 8),
        (0, 0, 1),
    ],
)
def test_choice_of_splits(
    cuda_kernels: Any, triton_kernels: Any, tiles: int, steps: int, splits: int
) -> None:
    assert sys.modules["adakernels.triton.convolve"].splits_of_sums(tiles, steps, 132) == splits
    assert cuda_kernels.splits_of_sums(tiles, steps, 132) == splits

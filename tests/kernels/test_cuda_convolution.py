"""The convolution core in CUDA: its tiles, and the products of warps and of warpgroups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gated_conv2d_kernels import MATRIX, Case, check, expected, gradients, make, run

pytestmark = pytest.mark.parametrize("kernels", ["cuda"], indirect=True)

# What the host stands in for. 90a has products of warpgroups.
ARCHS = ["the GPU's"] if torch.cuda.is_available() else ["80", "90a"]
# 120 pixels and 120 channels fill most of a large tile.
TILES = {
    "128 pixels, 128 channels": Case(1, 2, 72, 120, (10, 12), activation="relu"),
    "128 pixels, 64 channels": Case(1, 2, 24, 56, (10, 12), dilation=(2, 1), padding=(2, 1)),
    "64 pixels, stride 2": Case(1, 3, 136, 72, (9, 8), stride=(2, 2)),
    "taps in fewer than all phases": Case(1, 2, 16, 8, (12, 11), (2, 1), (3, 2), (0, 0)),
}


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ADAKERNELS_EMULATED_ARCH", request.param)
    return request.param


def check_input_gradient(kernels: Any, case: Case, gates: str, dtype: torch.dtype, eps: float) -> None:
    found, exact = gradients(kernels, case, gates, dtype, torch.channels_last)
    largest = exact[0].abs().max().item()
    torch.testing.assert_close(found[0].double(), exact[0], rtol=eps, atol=eps * largest)
    assert (found[0][exact[0] == 0] == 0).all()


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("gates", ["", "o", "i", "oi"])
@pytest.mark.parametrize("case", TILES.values(), ids=TILES)
def test_tiles(kernels: Any, case: Case, gates: str) -> None:
    check(kernels, case, gates, torch.float16, torch.channels_last)
    check_input_gradient(kernels, case, gates, torch.float16, 2 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("arch", ["90a"] if len(ARCHS) > 1 else ARCHS, indirect=True)
@pytest.mark.parametrize("gates", ["o", "i", "oi"])
@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX)
def test_products_of_warpgroups(kernels: Any, arch: str, case: Case, gates: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for format in (torch.channels_last, torch.contiguous_format):
            check(kernels, case, gates, dtype, format)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("gates", ["o", "i"])
@pytest.mark.parametrize("case", [TILES["128 pixels, 64 channels"], MATRIX["uneven"]], ids=["tile", "uneven"])
def test_tf32(kernels: Any, case: Case, gates: str) -> None:
    case = replace(case, activation=None)
    input, weight, bias, *policies = make(case, gates, torch.float32, torch.channels_last, kernels.device)
    want = expected(case, input, weight, bias, policies)
    kernels.multiply_exactly(False)
    try:
        output = run(kernels, case, input, weight, bias, *policies).double()
        # Factors are cut to 11 bits.
        check_input_gradient(kernels, case, gates, torch.float32, 2**-9)
    finally:
        kernels.multiply_exactly(True)
    error = (output - want).abs().max()
    assert error <= 2**-9 * want.abs().max()
    # It is no exact multiplication by mistake.
    assert error >= 2**-15 * want.abs().max()


def test_infinite_weights_of_skipped_inputs_do_not_matter(kernels: Any) -> None:
    case = Case(1, 2, 13, 9, (5, 4))
    for dtype in (torch.float32, torch.float16):
        for gates in ("i", "oi"):
            input, weight, bias, *policies = make(case, gates, dtype, torch.channels_last, kernels.device)
            policies[1][:] = policies[1][0]
            want = run(kernels, case, input, weight, bias, *policies)
            weight[:, policies[1][0] == 2] = float("inf")
            assert torch.equal(run(kernels, case, input, weight, bias, *policies), want)


# Few tiles, whose sums are long enough to be split.
SPLIT = {
    "7x7": Case(1, 2, 136, 72, (7, 7), activation="relu"),
    "stride 2": Case(1, 2, 264, 24, (5, 6), stride=(2, 2)),
}


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("gates", ["", "o", "i", "oi"])
@pytest.mark.parametrize("case", SPLIT.values(), ids=SPLIT)
def test_split_sums(kernels: Any, case: Case, gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAKERNELS_EMULATED_MULTIPROCESSORS", "64")
    for dtype in (torch.float16, torch.float32):
        check(kernels, case, gates, dtype, torch.channels_last)
        check_input_gradient(kernels, case, gates, dtype, 8 * torch.finfo(dtype).eps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has as many multiprocessors as it has")
def test_split_sums_are_the_same_every_time(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(SPLIT["7x7"], "o", torch.float32, torch.channels_last, kernels.device)
    whole = run(kernels, SPLIT["7x7"], *arguments)
    monkeypatch.setenv("ADAKERNELS_EMULATED_MULTIPROCESSORS", "64")
    split = run(kernels, SPLIT["7x7"], *arguments)
    # Another order of the same sums.
    assert not torch.equal(split, whole)
    assert torch.equal(split, run(kernels, SPLIT["7x7"], *arguments))

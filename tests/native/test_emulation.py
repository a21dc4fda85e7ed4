"""The emulation of CUDA on the host: what it computes, and the faults that it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Probe = Callable[[str], Tensor]


@pytest.fixture(scope="module")
def probe(emulate: Callable[..., Path]) -> Probe:
    source = Path(__file__).with_name("probes.cu")
    torch.ops.load_library(str(emulate("probes", source)))
    return lambda name: torch.ops.adakernels_probes.probe(torch.zeros(1), name)


def test_barriers(probe: Probe) -> None:
    assert torch.equal(probe("neighbour"), torch.arange(64.0).roll(-1).expand(2, 64))
    assert (probe("phases") == 64).all()


def test_collectives(probe: Probe) -> None:
    torch.testing.assert_close(probe("collectives")[:, :16], torch.full((2, 16), 503.0))


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    got = torch.ops.adakernels_probes.matmul(a, b, True)
    torch.testing.assert_close(got, a.float() @ b.float().t(), rtol=1e-5, atol=1e-5)
    # The second half of the columns has not come yet.
    assert torch.ops.adakernels_probes.matmul(a, b, False).isnan().all()


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_a_warpgroup(dtype: torch.dtype) -> None:
    a, b = torch.randn(64, 16).to(dtype), torch.randn(32, 16).to(dtype)
    for by_columns, right in ((False, b), (True, b.t().contiguous())):
        got = torch.ops.adakernels_probes.warpgroup_matmul(a, right, by_columns, True, True)
        torch.testing.assert_close(got, a.float() @ b.float().t(), rtol=1e-5, atol=1e-5)
        # Nobody has waited for them.
        assert (torch.ops.adakernels_probes.warpgroup_matmul(a, right, by_columns, True, False) == 0).all()
        with pytest.raises(RuntimeError, match="a product may not see what was written to shared memory"):
            torch.ops.adakernels_probes.warpgroup_matmul(a, right, by_columns, False, True)


def test_a_missing_barrier_shows(probe: Probe) -> None:
    got, want = probe("race"), torch.arange(64.0).roll(-1)
    # One block runs its threads in ascending order, the other one in descending order.
    assert got[0].isnan().any() and torch.equal(got[1, :-1], want[:-1])


def test_memory_that_nobody_wrote_is_nan(probe: Probe) -> None:
    assert probe("unwritten")[0].isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lonely_barrier", "64 of 64 threads of block 0 wait for ever"),
        ("wrong_mask", "a lane calls a collective with a mask that leaves it out"),
        ("deep_stack", "more than 262144 bytes of stack, in thread 0 of block 0"),
        ("unaligned", "a vector access is not aligned, in thread 0 of block 0"),
        ("large_block", "a block of more than 1024 threads"),
        ("large_memory", "a block with more than 227 KiB of shared memory"),
    ],
)
def test_faults_are_errors(probe: Probe, name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        probe(name)
    assert (probe("phases") == 64).all()


@pytest.fixture
def guarded(emulate: Callable[..., Path], guarded_memory: Callable[..., Any]) -> Iterator[None]:
    with guarded_memory(emulate("probes", Path(__file__).with_name("probes.cu"))):
        yield


@pytest.mark.usefixtures("probe", "guarded")
@pytest.mark.parametrize("size", [1, 3, 4, 1024, 5001])
def test_accesses_outside_of_a_buffer(size: int) -> None:
    access = torch.ops.adakernels_probes.access
    buffer = torch.arange(float(size))
    assert access(buffer, size - 1, False) == size - 1
    access(buffer, 0, True)
    behind = (size + 3) // 4 * 4
    for index, where in ((behind, "behind"), (-1028, "before")):
        for write in (False, True):
            with pytest.raises(
                RuntimeError, match=rf"bad access \d+ bytes {where} a buffer of {4 * size} bytes"
            ):
                access(buffer, index, write)
    # Nearer than a guard page what is written is found, and what is read is NaN.
    for index, where in ((-1, "before"), *([(size, "behind")] if size < behind else [])):
        with pytest.raises(RuntimeError, match=f"wrote {where} a buffer of {4 * size} bytes"):
            access(buffer, index, True)
        assert access(buffer, index, False).isnan()
    assert access(buffer, 0, False) == 1

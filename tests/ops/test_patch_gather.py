"""patch_gather against affine_grid + grid_sample, against its reference, and at its borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import adakernels as ak
from adakernels.ops import patch_gather_reference

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NAN, INF = float("nan"), float("inf")


def make(
    frames: int = 3,
    channels: int = 3,
    size: tuple[int, int] = (11, 13),
    patch: tuple[int, int] = (5, 6),
    patches: int | None = None,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    outside: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Frames, origins that reach `outside` pixels beyond where a patch fits, and an index if so asked."""
    random = torch.Generator().manual_seed(seed)
    shape = (frames, channels, *size)
    if dtype == torch.uint8:
        input = torch.randint(0, 256, shape, generator=random, dtype=dtype)
    else:
        input = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        input = input.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        input = F.pad(input, (1, 1), value=7)[..., 1:-1]
    index = None
    if patches is not None:
        index = torch.randint(0, max(frames, 1), (patches,), generator=random)
    room = torch.tensor([s - p for s, p in zip(size, patch, strict=True)], dtype=torch.float64)
    place = torch.rand(frames if patches is None else patches, 2, generator=random, dtype=torch.float64)
    origin = place * (room + 2 * outside) - outside
    return input, origin if dtype == torch.float64 else origin.float(), index


def grid_sampled(
    input: Tensor,  # [M, C, H, W]
    origin: Tensor,  # [M, 2]
    patch: tuple[int, int],
) -> Tensor:  # [M, C, P_h, P_w]
    """What AdaFocusV2's authors do."""
    extent = torch.tensor(input.shape[2:], dtype=origin.dtype)
    scale = torch.tensor(patch, dtype=origin.dtype) / extent
    shift = 2 * origin / extent + scale - 1
    zero = torch.zeros_like(shift[:, 0])
    rows = (
        torch.stack([scale[1] + zero, zero, shift[:, 1]], 1),
        torch.stack([zero, scale[0] + zero, shift[:, 0]], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), [*input.shape[:2], *patch], align_corners=False)
    return F.grid_sample(input, grid, align_corners=False)


@pytest.mark.parametrize("patch", [(5, 6), (1, 1), (10, 12)])
def test_is_affine_grid_and_grid_sample(patch: tuple[int, int]) -> None:
    input, origin, _ = make(frames=16, patch=patch, dtype=torch.float64)
    leaves = [input.requires_grad_(), origin.requires_grad_()]
    got, want = ak.patch_gather(input, origin, patch), grid_sampled(input, origin, patch)
    # AdaFocusV2's own operators, in double precision: rounding of the grid's coordinates alone is left.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernels_are_affine_grid_and_grid_sample(layout: str) -> None:
    input, origin, _ = make(frames=16, size=(40, 50), patch=(20, 33), layout=layout)
    leaves = [input.requires_grad_(), origin.requires_grad_()]
    got = ak.patch_gather(input, origin, (20, 33))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = grid_sampled(*exact, (20, 33))
    # Rounding of a sum of four products; the origin's gradient sums 1980 of them, of size 2.
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), exact)
    for mine, theirs, bound in zip(*grads, (1e-5, 1e-3), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=bound)


@pytest.mark.usefixtures("cpu_backend")
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    frames=st.integers(0, 4),
    channels=st.integers(1, 20),
    size=st.tuples(st.integers(1, 24), st.integers(1, 40)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    patches=st.none() | st.integers(0, 9),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    normalised=st.booleans(),
    outside=st.sampled_from([0.0, 4.0]),
    rounded=st.booleans(),
    grad_layout=st.sampled_from(["contiguous", "channels_last", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(
    frames: int,
    channels: int,
    size: tuple[int, int],
    share: tuple[float, float],
    patches: int | None,
    layout: str,
    dtype: torch.dtype,
    normalised: bool,
    outside: float,
    rounded: bool,
    grad_layout: str,
    seed: int,
) -> None:
    patch = tuple(max(1, round(s * part)) for s, part in zip(size, share, strict=True))
    if frames == 0 and patches is not None:
        patches = 0
    input, origin, index = make(frames, channels, size, patch, patches, layout, dtype, outside, seed)
    origin = origin.round() if rounded else origin
    constants: dict[str, Any] = {}
    if normalised:
        constants = {"mean": torch.rand(channels), "std": torch.rand(channels) + 0.5}
    floating = dtype.is_floating_point
    leaves = [origin.requires_grad_(), *([input.requires_grad_()] if floating else [])]
    got = ak.patch_gather(input, origin, patch, frame_index=index, **constants)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    # The unit of the dtype is not that of the exact input.
    frame = exact[1] if floating else input.double() / (255 if normalised else 1)
    wide = {name: value.double() for name, value in constants.items()}
    want = patch_gather_reference(frame, exact[0], patch, frame_index=index, **wide)
    assert got.dtype == (dtype if floating else torch.float32)
    if channels > 1 and min(patch) > 1 and layout == "channels_last" and not input.is_contiguous():
        assert got.is_contiguous(memory_format=torch.channels_last)
    elif layout == "contiguous":
        assert got.is_contiguous()
    unit = 255 if dtype == torch.uint8 and not normalised else 4
    eps = torch.finfo(got.dtype).eps
    # Four products, scaled by at most 1/0.5, of numbers that reach `unit`, in float32; rounded once.
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=4 * unit * torch.finfo(torch.float32).eps)

    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed)).to(got.dtype)
    if grad_layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    elif grad_layout == "expanded":
        grad = torch.ones((), dtype=got.dtype).expand_as(grad)
    grads = torch.autograd.grad(got, leaves, grad)
    exact_grads = torch.autograd.grad(want, exact, grad.double())
    # Sums of up to 20 * 24 * 40 products of numbers that reach `unit`, in float32 lanes.
    torch.testing.assert_close(grads[0].double(), exact_grads[0], rtol=1e-5, atol=1.5e-4 * unit)
    if floating:
        torch.testing.assert_close(grads[1].double(), exact_grads[1], rtol=2 * eps, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_integer_and_border_origins_are_slices(dtype: torch.dtype, layout: str) -> None:
    input, _, _ = make(frames=5, dtype=dtype, layout=layout)
    input[:, :, 3:6, 2:5] = torch.tensor([0, 1, 0] if dtype == torch.uint8 else [INF, 0, -INF], dtype=dtype)
    corners = [(0, 0), (6, 7), (0, 7), (6, 0), (2, 3)]
    got = ak.patch_gather(input, torch.tensor(corners, dtype=torch.float32), (5, 6))
    for patch, frame, (y, x) in zip(got, input, corners, strict=True):
        want = frame[:, y : y + 5, x : x + 6].to(got.dtype)
        assert torch.equal(patch, want)


@pytest.mark.usefixtures("backend")
def test_nothing_outside_of_an_integer_patch_is_read() -> None:
    input = torch.full((1, 2, 9, 9), NAN)
    input[:, :, 3:7, 2:6] = 1
    assert torch.equal(ak.patch_gather(input, torch.tensor([[3.0, 2.0]]), 4), torch.ones(1, 2, 4, 4))
    # With a fraction along x alone there is one more column, and still no more row.
    input[:, :, 3:7, 6] = 1
    got = ak.patch_gather(input, torch.tensor([[3.0, 2.25]]), 4)
    assert torch.equal(got, torch.ones(1, 2, 4, 4))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_clamped_coordinates(layout: str) -> None:
    places = [(-3.0, 1.5), (1.5, 99.0), (NAN, 2.0), (INF, -INF), (3e38, NAN), (0.0, 7.0)]
    inside = [(0.0, 1.5), (1.5, 7.0), (0.0, 2.0), (6.0, 0.0), (6.0, 0.0), (0.0, 7.0)]
    input, _, _ = make(frames=6, layout=layout)
    origin = torch.tensor(places, requires_grad=True)
    got = ak.patch_gather(input, origin, (5, 6))
    clamped = torch.tensor(inside, requires_grad=True)
    want = ak.patch_gather(input, clamped, (5, 6))
    assert torch.equal(got, want)
    (grad,), (free,) = (torch.autograd.grad(y.square().sum(), x) for y, x in ((got, origin), (want, clamped)))
    moved = origin.detach() != clamped.detach()
    assert torch.all(grad[moved] == 0) and torch.equal(grad[~moved], free[~moved])
    # The gradient is zero where a coordinate is clamped and not just by chance.
    assert torch.all(free != 0)


@pytest.mark.usefixtures("backend")
def test_derivative_at_integers_and_at_the_last_origin() -> None:
    # One row, so that the derivative along x is the difference of neighbours.
    input = torch.tensor([1.0, 3.0, 7.0, 15.0]).reshape(1, 1, 1, 4).expand(4, 1, 1, 4)
    origin = torch.tensor([[0.0, x] for x in (0.0, 1.0, 2.0, 1.5)], requires_grad=True)
    ak.patch_gather(input, origin, (1, 2)).sum().backward()
    # From the right at 0 and 1: (3-1)+(7-3) and (7-3)+(15-7); from the left at 2, which is the last place.
    assert origin.grad is not None
    assert origin.grad.tolist() == [[0.0, 6.0], [0.0, 12.0], [0.0, 12.0], [0.0, 12.0]]


@pytest.mark.usefixtures("backend")
def test_a_patch_of_the_whole_frame() -> None:
    input, origin, _ = make(patch=(11, 13), outside=2.0)
    leaves = [input.requires_grad_(), origin.requires_grad_()]
    got = ak.patch_gather(input, origin, (11, 13))
    assert torch.equal(got, input)
    grad = torch.randn(got.shape)
    grads = torch.autograd.grad(got, leaves, grad)
    assert torch.equal(grads[0], grad) and not grads[1].any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_overlapping_patches_of_one_frame(layout: str) -> None:
    input, origin, _ = make(frames=2, patches=6, layout=layout)
    index = torch.tensor([1, 1, 1, 1, 1, 1])
    input.requires_grad_()
    got = ak.patch_gather(input, origin, (5, 6), frame_index=index)
    grad = torch.randn(got.shape)
    (mine,) = torch.autograd.grad(got, input, grad)
    exact = input.detach().double().requires_grad_()
    want = sum(
        torch.autograd.grad(
            patch_gather_reference(exact[1:], o[None].double(), (5, 6)), exact, g[None].double()
        )[0]
        for o, g in zip(origin, grad, strict=True)
    )
    assert not mine[0].any()
    torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_frame_index_is_a_copy_of_frames(dtype: torch.dtype) -> None:
    input, origin, index = make(patches=7)
    assert index is not None
    got = ak.patch_gather(input, origin, 5, frame_index=index.to(dtype))
    assert torch.equal(got, ak.patch_gather(input[index], origin, 5))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("given", ["tensor", "sequence"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalisation(dtype: torch.dtype, given: str) -> None:
    input, origin, _ = make(dtype=dtype)
    mean, std = (x if given == "sequence" else torch.tensor(x) for x in (MEAN, STD))
    got = ak.patch_gather(input, origin, 5, mean=mean, std=std)
    plain = ak.patch_gather(input, origin, 5)
    unit = 255 if dtype == torch.uint8 else 1
    want = (plain / unit - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert got.dtype == torch.float32
    # A few roundings of numbers below 4 / 0.2.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("frames", [0, 2])
def test_no_patches(frames: int) -> None:
    input, _, _ = make(frames=frames)
    index = torch.zeros(0, dtype=torch.int64)
    leaves = [input.requires_grad_(), torch.zeros(0, 2, requires_grad=True)]
    got = ak.patch_gather(*leaves, (5, 6), frame_index=index)
    assert got.shape == (0, 3, 5, 6)
    grads = torch.autograd.grad(got.sum(), leaves)
    assert not grads[0].any() and grads[1].shape == (0, 2)
    assert ak.patch_gather(torch.zeros(2, 0, 4, 4), torch.zeros(2, 2), 2).shape == (2, 0, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    input, origin, _ = make(dtype=dtype)
    assert ak.explain(ak.patch_gather, input, origin, 5).backend == "reference"
    got = ak.patch_gather(input, origin, 5)
    assert got.dtype == dtype
    want = patch_gather_reference(input.double(), origin.double(), (5, 5))
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_half_precision_origins_are_computed_with_in_float32() -> None:
    input, origin, _ = make()
    half = origin.bfloat16().requires_grad_()
    got = ak.patch_gather(input, half, 5)
    assert torch.equal(got, ak.patch_gather(input, half.detach().float(), 5))
    assert torch.autograd.grad(got.sum(), half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("indexed", [False, True])
def test_gradcheck(indexed: bool) -> None:
    input, origin, index = make(
        frames=2, channels=2, size=(5, 6), patch=(2, 3), patches=4 if indexed else None, dtype=torch.float64
    )
    leaves = [input.requires_grad_(), origin.requires_grad_()]
    function = lambda *a: ak.patch_gather(*a, (2, 3), frame_index=index, mean=(0.1, 0.2), std=(2.0, 3.0))  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("which", [0, 1])
def test_second_derivative_is_refused(which: int) -> None:
    input, origin, _ = make()
    leaves = [input.requires_grad_(), origin.requires_grad_()]
    output = ak.patch_gather(*leaves, 5)
    (grad,) = torch.autograd.grad(output.square().sum(), leaves[which], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"patch_gather: no second derivative; .*use_backend\('reference'\)"
    ):
        grad.sum().backward()


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_opcheck(dtype: torch.dtype, layout: str, indexed: bool) -> None:
    input, origin, index = make(patches=4 if indexed else None, dtype=dtype, layout=layout)
    mean, std = (torch.tensor(MEAN), torch.tensor(STD)) if indexed else (None, None)
    ops = torch.ops.adakernels
    grad = torch.randn_like(ops.patch_gather(input, origin, [5, 6], index, mean, std))
    torch.library.opcheck(ops.patch_gather_grad_origin.default, (grad, input, origin, index, std))
    torch.library.opcheck(ops.patch_gather_grad_input.default, (grad, origin, index, std, input.shape))
    if dtype != torch.uint8:
        input.requires_grad_()
    arguments = (input, origin.requires_grad_(), [5, 6], index, mean, std)
    torch.library.opcheck(ops.patch_gather.default, arguments)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("indexed", [False, True])
def test_compiles_once_for_all_origins(indexed: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def call(input: Tensor, origin: Tensor, index: Tensor | None) -> Tensor:
        return ak.patch_gather(input, origin, 5, frame_index=index, mean=MEAN, std=STD)

    for seed in range(3):
        input, origin, index = make(patches=4 if indexed else None, outside=2.0, seed=seed)
        origin.requires_grad_()
        got = call(input, origin, index)
        want = ak.patch_gather(input, origin, 5, frame_index=index, mean=MEAN, std=STD)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(y.sum(), origin)[0] for y in (got, want))
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("cpu_backend", "thread_count")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_number_of_threads_changes_no_bit(dtype: torch.dtype, layout: str) -> None:
    input, origin, index = make(4, 5, (120, 130), (96, 101), 13, layout, dtype, outside=2.0)

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaves = [origin.detach().requires_grad_()]
        frames = input.detach()
        if dtype.is_floating_point:
            leaves.append(frames.requires_grad_())
        output = ak.patch_gather(frames, leaves[0], (96, 101), frame_index=index)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    want = results(1)
    for threads in (2, 3, 2):
        assert all(torch.equal(a, b) for a, b in zip(results(threads), want, strict=True)), threads


def test_every_instruction_set(on_instruction_set: Callable[..., None]) -> None:
    tests = ("fuzz", "kernels_are_affine_grid_and_grid_sample", "integer_and_border_origins_are_slices")
    on_instruction_set(*(f"{Path(__file__)}::test_{test}" for test in tests))


BAD_RAW_CALLS: dict[str, dict[str, Any]] = {
    "float64 input": {"input": torch.ones(2, 3, 8, 8, dtype=torch.float64)},
    "input of rank 3": {"input": torch.ones(3, 8, 8)},
    "sliced input": {"input": torch.ones(2, 3, 8, 10)[..., :8]},
    "float64 origin": {"origin": torch.ones(2, 2, dtype=torch.float64)},
    "wide origin": {"origin": torch.ones(2, 3)},
    "more origins than frames": {"origin": torch.ones(3, 2)},
    "no size": {"size": [0, 4]},
    "an empty size": {"size": []},
    "one size": {"size": [4]},
    "a size beyond the frame": {"size": [4, 9]},
    "int32 frame_index": {"frame_index": torch.zeros(2, dtype=torch.int32)},
    "long frame_index": {"frame_index": torch.zeros(3, dtype=torch.int64)},
    "frame_index past the end": {"frame_index": torch.tensor([0, 2])},
    "negative frame_index": {"frame_index": torch.tensor([-1, 0])},
    "short mean": {"mean": torch.ones(2), "std": torch.ones(3)},
    "float64 std": {"mean": torch.ones(3), "std": torch.ones(3, dtype=torch.float64)},
}


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("bad", BAD_RAW_CALLS.values(), ids=BAD_RAW_CALLS)
def test_operators_check_what_they_are_given(bad: dict[str, Any]) -> None:
    good = {
        "input": torch.ones(2, 3, 8, 8),
        "origin": torch.ones(2, 2),
        "size": [4, 4],
        "frame_index": None,
        "mean": None,
        "std": None,
    }
    ops = torch.ops.adakernels
    with torch.no_grad():
        assert ops.patch_gather(**good).shape == (2, 3, 4, 4)
        with pytest.raises((RuntimeError, ValueError)):
            ops.patch_gather(**good | bad)
        grad = torch.ones(2, 3, 4, 4)
        for wrong in (
            grad[:1],
            grad[:, :2],
            grad.double(),
            torch.ones(2, 3, 4, 9),
            torch.ones(2, 3, 4, 5)[..., :4],
        ):
            with pytest.raises(RuntimeError):
                ops.patch_gather_grad_origin(wrong, good["input"], good["origin"], None, None)
            with pytest.raises(RuntimeError):
                ops.patch_gather_grad_input(wrong, good["origin"], None, None, [2, 3, 8, 8])


@pytest.mark.parametrize("requested", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("value", [-1, 3])
def test_frame_index_values(requested: str, value: int, request: pytest.FixtureRequest) -> None:
    if requested == "cpu":
        request.getfixturevalue("cpu_backend")
    input, origin, _ = make()
    index = torch.tensor([0, value, 2])
    sentence = f"patch_gather: expected frame_index values from 0 to N - 1 = 2, got {value}"
    with ak.use_backend(requested) if requested != "auto" else nullcontext():
        with pytest.raises(ValueError, match=sentence):
            ak.patch_gather(input, origin, 5, frame_index=index)

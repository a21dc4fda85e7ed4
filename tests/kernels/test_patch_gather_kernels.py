"""patch_gather on the CUDA and the Triton kernels, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adakernels.ops.patch_gather import patch_gather_reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# frames, channels, height, width, patch height, patch width: rows that are whole vectors, that are not, more
# channels than a vector, one direction without room, both, a single pixel.
SHAPES = [
    (3, 3, 12, 20, 5, 8),
    (2, 2, 9, 7, 4, 5),
    (2, 8, 11, 10, 6, 3),
    (2, 16, 6, 8, 6, 4),
    (2, 1, 5, 9, 2, 9),
    (1, 4, 4, 4, 4, 4),
    (2, 3, 24, 40, 19, 31),
    (1, 1, 1, 1, 1, 1),
]


def make_origin(patches: int, room: tuple[int, int]) -> Tensor:
    """Places between pixels, and with them one on a pixel, the borders, outside and NaN."""
    generator = torch.Generator().manual_seed(1)
    origin = torch.rand(patches, 2, generator=generator) * torch.tensor(room)
    special = torch.tensor(
        [
            [0.0, 0.0],
            list(room),
            [-2.5, room[1] + 1.0],
            [float("nan"), room[1] / 2],
            [room[0] // 2, room[1] // 2],
        ]
    )
    count = min(len(special), patches // 2)
    origin[:count] = special[:count]
    return origin


def make(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, patches: int | None, device: str
) -> dict[str, Any]:
    """Arguments of a call; with `patches` a frame index that repeats rows and leaves some out."""
    frames, channels, height, width, *size = shape
    generator = torch.Generator().manual_seed(0)
    format = torch.channels_last if channels_last else torch.contiguous_format
    if dtype == torch.uint8:
        input = torch.randint(0, 256, (frames, channels, height, width), generator=generator, dtype=dtype)
    else:
        input = torch.randn(frames, channels, height, width, generator=generator).to(dtype)
    count = frames if patches is None else patches
    index = None if patches is None else torch.randint(0, max(frames - 1, 1), (count,), generator=generator)
    grad = torch.randn(count, channels, *size, generator=generator)
    output_dtype = torch.float32 if dtype == torch.uint8 else dtype
    return {
        "input": input.to(device).contiguous(memory_format=format),
        "origin": make_origin(count, (height - size[0], width - size[1])).to(device),
        "size": size,
        "frame_index": None if index is None else index.to(device),
        "mean": torch.rand(channels, generator=generator).to(device),
        "std": (torch.rand(channels, generator=generator) + 0.5).to(device),
        "grad": grad.to(device, output_dtype).contiguous(memory_format=format),
    }


def exact(what: dict[str, Any], normalised: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output and the gradients to origin and input, in float64."""
    unit = 255 if what["input"].dtype == torch.uint8 else 1
    input = what["input"].double().requires_grad_()
    origin = what["origin"].double().requires_grad_()
    output = patch_gather_reference(input, origin, what["size"], frame_index=what["frame_index"])
    if normalised:
        mean, std = (what[name].double()[:, None, None] for name in ("mean", "std"))
        output = (output / unit - mean) / std
    grads = torch.autograd.grad(output, (input, origin), what["grad"].double(), allow_unused=True)
    return output.detach(), grads[1], grads[0]


def formats_agree(tensor: Tensor, like: Tensor) -> bool:
    last = not like.is_contiguous()
    return tensor.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("patches", [None, 5], ids=["one_each", "some"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8], ids=str)
def test_matches_the_reference(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, patches: int | None
) -> None:
    what = make(shape, dtype, channels_last, patches, kernels.device)
    input, origin, index, grad = (what[name] for name in ("input", "origin", "frame_index", "grad"))
    normalised = channels_last != (dtype == torch.uint8)
    mean, std = (what["mean"], what["std"]) if normalised else (None, None)
    output = kernels.patch_gather(input, origin, what["size"], index, mean, std)
    grad_origin = kernels.patch_gather_grad_origin(grad, input, origin, index, std)
    want, want_origin, want_input = exact(what, normalised)
    eps = torch.finfo(output.dtype).eps
    assert output.dtype == grad.dtype and formats_agree(output, input)
    # One rounding, and a few in float32 of numbers up to 4 / std, or 255.
    largest = 255 if dtype == torch.uint8 and not normalised else 10
    torch.testing.assert_close(output.double(), want, rtol=eps, atol=2e-6 * largest)
    # Sums of up to 1767 products below 32, or 255 times that; the tolerance is for the root of their number.
    scale = max(1.0, float(want_origin.abs().max()), (grad.numel() / len(grad)) ** 0.5 * largest)
    torch.testing.assert_close(grad_origin.double(), want_origin, rtol=1e-5, atol=2e-6 * scale)
    if dtype != torch.uint8:
        grad_input = kernels.patch_gather_grad_input(grad, origin, index, std, list(input.shape))
        assert want_input is not None and grad_input.dtype == dtype and formats_agree(grad_input, grad)
        atol = 1e-6 * max(1.0, float(want_input.abs().max()))
        torch.testing.assert_close(grad_input.double(), want_input, rtol=eps, atol=atol)


def test_many_patches_of_a_frame(kernels: Any) -> None:
    """More than a block has threads, some frames having none."""
    what = make((3, 1, 6, 8, 3, 4), torch.float32, False, 300, kernels.device)
    input, origin, index, grad = (what[name] for name in ("input", "origin", "frame_index", "grad"))
    got = kernels.patch_gather_grad_input(grad, origin, index, None, list(input.shape))
    _, _, want = exact(what, False)
    assert want is not None and (got[2] == 0).all()
    # About 75 gradients below 5 for each pixel.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_places_on_pixels_are_copies(kernels: Any, channels_last: bool) -> None:
    what = make(SHAPES[0], torch.float16, channels_last, None, kernels.device)
    input, size = what["input"], what["size"]
    origin = torch.tensor([[0.0, 0.0], [7.0, 12.0], [3.0, 5.0]], device=kernels.device)
    # What lies around the patches is not read.
    poisoned = torch.full_like(input, float("nan"))
    patches = []
    for n, (y, x) in enumerate(origin.int().tolist()):
        part = (n, slice(None), slice(y, y + size[0]), slice(x, x + size[1]))
        poisoned[part] = input[part]
        patches.append(input[part])
    got = kernels.patch_gather(poisoned, origin, size, None, None, None)
    assert torch.equal(got, torch.stack(patches))


def test_stuck_patches_have_no_gradient(kernels: Any) -> None:
    what = make(SHAPES[0], torch.float32, False, None, kernels.device)
    origin = torch.tensor([[-1.0, 20.0], [float("nan"), -0.5], [8.0, float("inf")]], device=kernels.device)
    grad = torch.full_like(what["grad"], float("nan"))
    got = kernels.patch_gather_grad_origin(grad, what["input"], origin, None, None)
    assert (got == 0).all()


def test_rows_that_do_not_exist_are_not_read(kernels: Any) -> None:
    what = make(SHAPES[0], torch.float32, False, 3, kernels.device)
    input, origin, grad = what["input"], what["origin"], what["grad"]
    wrong, clamped = (torch.tensor(index, device=kernels.device) for index in ([-5, 3, 1 << 40], [0, 2, 2]))
    got, want = (
        kernels.patch_gather(input, origin, what["size"], index, None, None) for index in (wrong, clamped)
    )
    assert torch.equal(got, want)
    got, want = (
        kernels.patch_gather_grad_origin(grad, input, origin, index, None) for index in (wrong, clamped)
    )
    assert torch.equal(got, want)
    assert kernels.patch_gather_grad_input(grad, origin, wrong, None, list(input.shape)).isfinite().all()


@pytest.mark.parametrize("empty", ["patches", "channels", "frames"])
def test_nothing_to_do(kernels: Any, empty: str) -> None:
    frames, channels, patches = (int(empty != name) * 2 for name in ("frames", "channels", "patches"))
    patches *= empty != "frames"
    device = kernels.device
    input = torch.randn(frames, channels, 5, 6, device=device)
    origin, index = (
        torch.zeros(patches, 2, device=device),
        torch.zeros(patches, dtype=torch.int64, device=device),
    )
    grad = torch.randn(patches, channels, 3, 4, device=device)
    assert kernels.patch_gather(input, origin, [3, 4], index, None, None).shape == grad.shape
    assert (kernels.patch_gather_grad_origin(grad, input, origin, index, None) == 0).all()
    got = kernels.patch_gather_grad_input(grad, origin, index, None, list(input.shape))
    assert got.shape == input.shape and (got[:, :, 4] == 0).all()


def test_two_runs_agree_in_every_bit(kernels: Any) -> None:
    what = make((2, 3, 24, 40, 19, 31), torch.bfloat16, False, 6, kernels.device)
    input, origin, index, grad = (what[name] for name in ("input", "origin", "frame_index", "grad"))
    for call in (
        lambda: kernels.patch_gather_grad_origin(grad, input, origin, index, None),
        lambda: kernels.patch_gather_grad_input(grad, origin, index, None, list(input.shape)),
    ):
        assert torch.equal(call(), call())

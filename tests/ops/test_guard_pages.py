"""Kernels read nothing past the end of a tensor, not even where what follows may not be touched.

Run as a script, this file makes the calls, in a process of their own since a stray read ends it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adakernels as ak

# C_in, C_out, groups, kernel, stride, frames, sizes
CONVOLUTIONS = {
    "1x1 to one channel": (4, 1, 1, 1, 1, 1, (1, 5, 10, 12, 16)),
    "1x1 to two channels": (5, 2, 1, 1, 1, 2, (3, 10, 12)),
    "1x1": (17, 33, 1, 1, 1, 2, (7, 10, 12, 32)),
    "1x1, depthwise": (6, 6, 6, 1, 1, 2, (3, 10, 12)),
    "3x3 to one channel": (4, 1, 1, 3, 1, 2, (5, 10, 12)),
    "3x3 to two channels": (16, 2, 1, 3, 1, 2, (5, 10, 12)),
    "1x1 of many channels": (400, 9, 1, 1, 1, 2, (10, 13)),
    "1x1 of many weights": (700, 400, 1, 1, 1, 1, (10, 14)),
    "3x3": (20, 40, 1, 3, 1, 2, (6, 10, 13, 14, 26, 28, 29)),
    "3x3 of small maps": (32, 48, 1, 3, 1, 8, (4, 7)),
    "3x3, stride 2": (20, 24, 1, 3, 2, 2, (7, 10, 12, 20, 21, 28)),
    "1x1, stride 2": (9, 10, 1, 1, 2, 2, (7, 10, 12)),
    "3x3, depthwise": (5, 5, 5, 3, 1, 2, (4, 7, 8, 10, 16, 17)),
    "3x3, depthwise, stride 2": (5, 5, 5, 3, 2, 2, (7, 10, 17)),
    "5x5, depthwise": (5, 10, 5, 5, 1, 2, (5, 7, 10, 17)),
}
# C_in, C_out, groups, kernel, packed, sizes
CLIPS = {
    "3x1x1": (17, 33, 1, (3, 1, 1), False, (1, 5, 7, 10, 12)),
    "3x1x1, packed": (20, 9, 1, (3, 1, 1), True, (1, 5, 7, 10)),
    "3x3x3": (16, 12, 1, (3, 3, 3), False, (4, 10)),
    "5x7x7, packed": (3, 8, 1, (5, 7, 7), True, (7, 12)),
    "3x3x3, depthwise": (5, 5, 5, (3, 3, 3), False, (4, 7, 8, 16)),
}
PROT_NONE = 0


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last element is the last before a page that may not be touched."""
    count = tensor.numel() * tensor.element_size()
    size = math.ceil(count / mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=tensor.dtype, offset=size - count, count=tensor.numel())
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def convolve(
    guard: bool, dtype: torch.dtype, layout: torch.memory_format, name: str, size: int
) -> list[Tensor]:
    """The output and the gradients of a convolution, with or without guards behind the operands."""
    place = guarded if guard else torch.clone
    channels, out_channels, groups, kernel, stride, frames, _ = CONVOLUTIONS[name]
    torch.manual_seed(0)
    input = torch.randn(frames, channels, size, size).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(out_channels, channels // groups, kernel, kernel).to(dtype)
    leaves = [place(x).requires_grad_() for x in (input, weight, torch.randn(out_channels).to(dtype))]
    # The last frame keeps all channels, so that the very ends are needed.
    policy, in_policy = torch.randint(0, 3, (frames, out_channels)), torch.randint(0, 3, (frames, channels))
    policy[-1], in_policy[-1] = ak.Policy.KEEP.value, ak.Policy.KEEP.value
    output = ak.gated_conv2d(
        *leaves,
        place(policy),
        frames=frames,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        in_policy=place(in_policy),
    )
    grad = torch.randn(output.shape).to(dtype).contiguous(memory_format=layout)
    return [output.detach(), *torch.autograd.grad(output, leaves, place(grad))]


def convolve_clips(
    guard: bool, dtype: torch.dtype, layout: torch.memory_format, name: str, size: int
) -> list[Tensor]:
    """The same for clips of which the last takes all temporal taps, one of them that of its last frame."""
    place = guarded if guard else torch.clone
    channels, out_channels, groups, kernel, packed, _ = CLIPS[name]
    torch.manual_seed(0)
    if packed:
        input = torch.randn(5, channels, size, size)
        offsets = place(torch.tensor([0, 2, 5], dtype=torch.int32))
    else:
        input, offsets = torch.randn(2, channels, 3, size, size), None
        layout = torch.channels_last_3d if layout == torch.channels_last else layout
    input = input.to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(out_channels, channels // groups, *kernel).to(dtype)
    leaves = [place(x).requires_grad_() for x in (input, weight, torch.randn(out_channels).to(dtype))]
    output = ak.sliced_conv3d(
        *leaves,
        place(torch.tensor([False, True])),
        padding=tuple(k // 2 for k in kernel),
        groups=groups,
        frame_offsets=offsets,
    )
    grad = torch.randn(output.shape).to(dtype).contiguous(memory_format=layout)
    return [output.detach(), *torch.autograd.grad(output, leaves, place(grad))]


def reconstruct(
    guard: bool, dtype: torch.dtype, layout: torch.memory_format, taps: int, size: int
) -> list[Tensor]:
    """The output of a dynamic convolution that makes frames and channels, the last ones among them."""
    place = guarded if guard else torch.clone
    layout = torch.channels_last_3d if layout == torch.channels_last else layout
    torch.manual_seed(0)
    tensors = (
        torch.randn(2, 3, 3, size, size).to(dtype).contiguous(memory_format=layout),
        torch.randn(5, 3, 1, 3, 3).to(dtype),
        torch.randn(5).to(dtype),
        torch.tensor([[0, 0.5, 0.5], [0, 0, 1]]),
        torch.tensor([[0, 0.5, 0.5], [0, 0, 1]]),
    )
    filters = torch.randn(4, 5, taps, taps).to(dtype)
    with torch.no_grad():
        output = ak.dynamic_conv3d(
            *map(place, tensors),
            temporal_weight=place(filters[1:]),
            channel_weight=place(filters[0]),
            padding=(0, 1, 1),
        )
    return [output]


def fuse(guard: bool, dtype: torch.dtype, layout: torch.memory_format, soft: bool, size: int) -> list[Tensor]:
    place = guarded if guard else torch.clone
    torch.manual_seed(0)
    input = place(torch.randn(4, 5, size, size).to(dtype).contiguous(memory_format=layout)).requires_grad_()
    policy = place(torch.rand(4, 5, 3).to(dtype) if soft else torch.randint(0, 3, (4, 5)))
    leaves = [input, policy.requires_grad_()] if soft else [input]
    output = ak.temporal_fuse(input, policy, frames=2)
    grad = torch.randn(output.shape).to(dtype).contiguous(memory_format=layout)
    return [output.detach(), *torch.autograd.grad(output, leaves, place(grad))]


def cut(
    guard: bool, dtype: torch.dtype, layout: torch.memory_format, patch: tuple[int, int], size: int
) -> list[Tensor]:
    """Patches at the very ends, among them one that lies within the last row and column but a fraction."""
    place = guarded if guard else torch.clone
    torch.manual_seed(0)
    input = torch.randint(0, 256, (2, 5, size, size), dtype=torch.uint8)
    input = place(input.to(dtype).contiguous(memory_format=layout))
    room = torch.tensor([size - p for p in patch])
    places = torch.stack([room.float(), (room - 0.25).clamp(min=0), room + 3.0, room * torch.rand(2)])
    origin, index = place(places).requires_grad_(), place(torch.ones(4, dtype=torch.int64))
    mean, std = (place(torch.rand(5) + 1) for _ in range(2))
    leaves = [origin, *([input.requires_grad_()] if dtype.is_floating_point else [])]
    output = ak.patch_gather(input, origin, patch, frame_index=index, mean=mean, std=std)
    grad = torch.randn(output.shape).to(output.dtype).contiguous(memory_format=layout)
    return [output.detach(), *torch.autograd.grad(output, leaves, place(grad))]


def assert_guard_changes_nothing() -> None:
    calls = [(convolve, name, size) for name, case in CONVOLUTIONS.items() for size in case[-1]]
    calls += [(convolve_clips, name, size) for name, case in CLIPS.items() for size in case[-1]]
    calls += [(reconstruct, taps, size) for taps in (1, 3) for size in (1, 4, 7, 8, 16)]
    calls += [(fuse, soft, size) for soft in (False, True) for size in (1, 7, 10)]
    patches = [((p, q), size) for size in (1, 7, 16, 33) for p in {1, size // 2 + 1, size} for q in {1, size}]
    formats = (torch.contiguous_format, torch.channels_last)
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16, torch.uint8), formats):
        for patch, size in patches:
            print(dtype, layout, cut.__name__, patch, size, flush=True)
            got, want = cut(True, dtype, layout, patch, size), cut(False, dtype, layout, patch, size)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), formats):
        for function, kind, size in calls:
            # Known before the call, as the process may end in it.
            print(dtype, layout, function.__name__, kind, size, flush=True)
            got, want = function(True, dtype, layout, kind, size), function(False, dtype, layout, kind, size)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_nothing_is_read_past_the_end(isa: str) -> None:
    # A script does not look for packages where it is run from.
    package = str(Path(ak.__file__).parents[1])
    environment = os.environ | {"ADAKERNELS_CPU_ISA": isa, "PYTHONPATH": package}
    done = subprocess.run([sys.executable, __file__, isa], env=environment, capture_output=True, text=True)
    if done.stdout.startswith("not supported"):
        pytest.skip(f"this processor has no {isa}")
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"exit status {done.returncode} in the call of {last}\n{done.stderr}"


if __name__ == "__main__":
    from adakernels import _C

    if _C.best_isa() != sys.argv[1]:
        print("not supported")
        sys.exit()
    torch.set_num_threads(2)
    with ak.use_backend("cpu"):
        assert_guard_changes_nothing()

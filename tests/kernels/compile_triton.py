"""Compiles the Triton kernels for one GPU that need not be there: `python compile_triton.py 90 FOLDER`.

Every call of CALLS runs its launcher on CPU tensors while a driver stands in that only says which GPU to
compile for, so each kernel is compiled with the arguments, specialisations and options that it is launched
with. The cubins go to FOLDER, named after call, dtype, kernel and number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from adakernels import triton as kernels
from adakernels.triton import convolve


def temporal_fuse(dtype: torch.dtype, soft: bool, format: torch.memory_format) -> None:
    input = torch.zeros(8, 64, 14, 14, dtype=dtype).contiguous(memory_format=format)
    policy = torch.zeros(8, 64, 3, dtype=dtype) if soft else torch.zeros(8, 64, dtype=torch.int64)
    kernels.temporal_fuse(input, policy, 4)
    kernels.temporal_fuse_backward(input, input, policy, 4, True, soft)


def patch_gather(
    dtype: torch.dtype, indexed: bool, shape: tuple[int, ...], format: torch.memory_format
) -> None:
    input = torch.zeros(shape, dtype=dtype).contiguous(memory_format=format)
    size = [extent - 1 for extent in shape[2:]]
    index = torch.zeros(shape[0], dtype=torch.int64) if indexed else None
    constants = torch.zeros(shape[1]) if indexed else None
    origin = torch.zeros(shape[0], 2)
    grad = kernels.patch_gather(input, origin, size, index, constants, constants)
    kernels.patch_gather(input.to(torch.uint8), origin, size, index, constants, constants)
    kernels.patch_gather_grad_origin(grad, input, origin, index, constants)
    kernels.patch_gather_grad_input(grad, origin, index, constants, shape)


def gated_conv2d(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    kernel: int,
    gates: str,
    format: torch.memory_format,
    groups: int = 1,
    precision: str = "highest",
    gradient: bool = True,
    multiprocessors: int = 1,
) -> None:
    convolve.multiprocessors = lambda device: multiprocessors
    input = torch.zeros(shape, dtype=dtype).contiguous(memory_format=format)
    rows, channels = shape[:2]
    weight = torch.zeros(channels, channels // groups, kernel, kernel, dtype=dtype)
    policy, in_policy = (
        torch.zeros(rows, channels, dtype=torch.int64) if gate in gates else None for gate in "oi"
    )
    torch.set_float32_matmul_precision(precision)
    same = [1, 1], [kernel // 2] * 2, [1, 1]
    kernels.gated_conv2d(input, weight, weight[:, 0, 0, 0], policy, in_policy, 4, *same, groups, 1)
    if not gradient:
        return
    kernels.gated_conv2d_backward(
        input, input, weight, policy, in_policy, 4, *same, groups, True, True, False
    )


def sliced_conv3d(
    dtype: torch.dtype, format: torch.memory_format, stride: int = 1, groups: int = 1, packed: bool = False
) -> None:
    input = torch.zeros((8, 64, 14, 14) if packed else (2, 64, 4, 14, 14), dtype=dtype)
    input = input.contiguous(memory_format=format)
    weight = torch.zeros(64, 64 // groups, 3, 3, 3, dtype=dtype)
    temporal = torch.zeros(2, dtype=torch.bool)
    offsets = torch.zeros(3, dtype=torch.int32) if packed else None
    convolution = [1, stride, stride], [1, 1, 1], [1, 1, 1], groups
    output = kernels.sliced_conv3d(input, weight, weight[:, 0, 0, 0, 0], temporal, offsets, *convolution, 1)
    kernels.sliced_conv3d_backward(output, input, weight, temporal, offsets, *convolution, True, True, False)


def slim_conv(dtype: torch.dtype) -> None:
    input = torch.zeros(8, 48, 14, 14, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(64, 80, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    used = 40, [0, 32, 64, 80], [1, 1], [1, 1], [1, 1], 1
    output = kernels.slim_conv(input, weight, weight[:, 0, 0, 0], *used, 1)
    kernels.slim_conv_backward(output, input, weight, *used, True, False, False)


def dynamic_conv3d(dtype: torch.dtype, format: torch.memory_format) -> None:
    input = torch.zeros(2, 64, 4, 14, 14, dtype=dtype).contiguous(memory_format=format)
    weight = torch.zeros(64, 64, 1, 3, 3, dtype=dtype)
    filters = torch.zeros(64, 3, 3, dtype=dtype)
    gates = torch.zeros(2, 2), torch.zeros(2, 2)
    arguments = weight[:, 0, 0, 0, 0], *gates, filters[None], filters, [1] * 3, [0, 1, 1], [1] * 3, 1
    output = kernels.dynamic_conv3d(input, weight, *arguments, 1)
    wanted = [True, True, False, True, True, True, True]
    kernels.dynamic_conv3d_backward(output, input, weight, *arguments, *wanted)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Name -> what launches every kernel of an operator, for one dtype.
CALLS: dict[str, Callable[[torch.dtype], None]] = {}
for name, format in FORMATS.items():
    for soft in (False, True):
        CALLS[f"temporal_fuse-{name}-{'soft' if soft else 'values'}"] = partial(
            temporal_fuse, soft=soft, format=format
        )
    # With a size of 1 Triton makes a constant of it.
    for shape in ((8, 3, 224, 224), (1, 1, 2, 2)):
        for indexed in (False, True):
            CALLS[f"patch_gather-{name}-{shape[0]}-{'indexed' if indexed else 'one_each'}"] = partial(
                patch_gather, indexed=indexed, shape=shape, format=format
            )
for kernel in (1, 3):
    # What is neither whole blocks nor a multiple of 16, and what is.
    for shape, gates in (((8, 36, 7, 7), "oi"), ((8, 64, 14, 14), "o"), ((8, 64, 14, 14), "i")):
        name = f"gated_conv2d-{kernel}-{shape[1]}-{gates}"
        CALLS[name] = partial(
            gated_conv2d,
            shape=shape,
            kernel=kernel,
            gates=gates,
            format=torch.channels_last,
            gradient=kernel > 1 or gates == "oi",
        )
CALLS["gated_conv2d-tf32"] = partial(
    gated_conv2d,
    shape=(8, 64, 14, 14),
    kernel=3,
    gates="o",
    format=torch.channels_last,
    precision="high",
)
CALLS["gated_conv2d-split"] = partial(
    gated_conv2d, shape=(4, 512, 7, 7), kernel=3, gates="oi", format=torch.channels_last, multiprocessors=132
)
CALLS["gated_conv2d-contiguous"] = partial(
    gated_conv2d, shape=(8, 64, 14, 14), kernel=3, gates="oi", format=torch.contiguous_format, gradient=False
)
for name, format in FORMATS.items():
    CALLS[f"gated_conv2d-depthwise-{name}"] = partial(
        gated_conv2d, shape=(8, 96, 14, 14), kernel=5, gates="oi", format=format, groups=96
    )
CALLS["sliced_conv3d"] = partial(sliced_conv3d, format=torch.channels_last_3d)
CALLS["sliced_conv3d-packed"] = partial(sliced_conv3d, format=torch.contiguous_format, stride=2, packed=True)
CALLS["sliced_conv3d-depthwise"] = partial(sliced_conv3d, format=torch.channels_last_3d, groups=64)
CALLS["slim_conv"] = slim_conv
CALLS["dynamic_conv3d"] = partial(dynamic_conv3d, format=torch.channels_last_3d)


class StandIn:
    """What a launch asks of Triton's driver until it has compiled."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int, folder: Path, shared_limit: int) -> None:
    triton.runtime.driver.set_active(StandIn(capability))
    launch = triton.JITFunction.run
    compiled: list[tuple[str, Any]] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.JITFunction.run = compile_only
    for name, call in CALLS.items():
        for dtype in DTYPES:
            compiled.clear()
            call(dtype)
            assert compiled, f"{name} launches no kernel"
            for number, (kernel, code) in enumerate(compiled):
                shared = code.metadata.shared
                assert shared <= shared_limit, f"{name}: {kernel} takes {shared} bytes of shared memory"
                file = f"{name}.{str(dtype).removeprefix('torch.')}.{kernel}.{number}.cubin"
                (folder / file).write_bytes(code.asm["cubin"])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

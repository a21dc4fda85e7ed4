"""The machine code of the GPU kernels: what ptxas makes of each, for GPUs that need not be there."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TRITON_TARGETS = (80, 90, 100)
NVCC_TARGETS = ("80", "90a")
# Shared memory that a block can have, in bytes.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Instructions that the code of a kernel must contain, by a pattern of "file: kernel" and by target.
INSTRUCTIONS: dict[str, dict[int, tuple[str, ...]]] = {
    "warpgroup_matmul_kernel": {90: ("HGMMA.64x32x16.F32",)},
    "[0-9]matmul_kernel": dict.fromkeys((80, 90), ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS")),
    r"weight_gradient_kernel.*(Half|BFloat16)": dict.fromkeys(
        (80, 90), ("HMMA.16816.F32", "LDSM.16", "LDGSTS")
    ),
    r"^convolution.*(Half|BFloat16).*convolution_kernel": {
        80: ("HMMA.16816.F32", "LDSM.16.M", "LDGSTS.E.BYPASS.128"),
        90: ("HGMMA.64x", "LDGSTS.E.BYPASS.128"),
    },
    r"^convolution.*convolution_kernelIf\S*Lb0ELb0E": {80: ("HMMA.1688.F32.TF32",), 90: ("HGMMA.64x",)},
    r"^convolution.*convolution_kernelIf\S*Lb1ELb0E": dict.fromkeys((80, 90), ("FFMA", "LDGSTS")),
    # Features come by shared memory.
    r"^reconstruction\..*: .*reconstruction_kernel": dict.fromkeys((80, 90), ("FFMA", "LDS", "STS")),
    r"(gated|sliced|dynamic|slim)_conv.*(float16|tf32).*: convolution": {
        80: ("HMMA",),
        90: ("HGMMA",),
        100: ("UTCHMMA",),
    },
}
# Others only launch kernels.
CUDA_SOURCES = {
    path.name: path
    for path in (*ROOT.glob("csrc/cuda/*.cu"), ROOT / "tests/native/probes.cu")
    if "__global__" in path.read_text()
}


@dataclass(frozen=True)
class Resources:
    """What one kernel of a cubin takes."""

    registers: int
    stack: int
    local: int
    shared: int


def tool(name: str) -> str:
    """Path of one of the CUDA binary tools: the toolkit's, or the one in Triton's wheel."""
    folder = None
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "backends/nvidia/bin"
    found = shutil.which(name) or shutil.which(name, path=folder)
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor in Triton's wheel")
    return found


def resources(cubin: Path) -> dict[str, Resources]:
    """Resources of every kernel in a cubin, by its name."""
    text = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: Resources(int(registers), int(stack), int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(pattern, text)
    }


def check(cubin: Path, capability: int) -> None:
    """No kernel of the cubin spills, takes too much shared memory or lacks an instruction that it is for."""
    kernels = resources(cubin)
    assert kernels, f"{cubin.name} has no kernel"
    wrong = {
        name: used
        for name, used in kernels.items()
        if used.stack or used.local or used.shared > SHARED_LIMIT[capability]
    }
    assert not wrong, f"{cubin.name}: registers spill or there is too much shared memory: {wrong}"
    for pattern, wanted in INSTRUCTIONS.items():
        for name in kernels:
            if re.search(pattern, f"{cubin.name}: {name}") and capability in wanted:
                command = [tool("cuobjdump"), "-sass", "-fun", name, str(cubin)]
                code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                missing = [instruction for instruction in wanted[capability] if instruction not in code]
                assert not missing, f"{cubin.name}: {name} has no {', '.join(missing)}"


@pytest.fixture(scope="module")
def triton_cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    """The cubins of all Triton kernels, by target."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    base = tmp_path_factory.mktemp("triton")

    def compile_for(capability: int) -> list[Path]:
        folder = base / str(capability)
        folder.mkdir()
        env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(base / f"cache{capability}")}
        script = Path(__file__).with_name("compile_triton.py")
        done = subprocess.run(
            [sys.executable, str(script), str(capability), str(folder), str(SHARED_LIMIT[capability])],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return sorted(folder.iterdir())

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TRITON_TARGETS, pool.map(compile_for, TRITON_TARGETS), strict=True))


@pytest.mark.parametrize("capability", TRITON_TARGETS)
def test_triton_kernels(triton_cubins: dict[int, list[Path]], capability: int) -> None:
    cubins = triton_cubins[capability]
    assert cubins
    for cubin in cubins:
        check(cubin, capability)


@cache
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not on PATH")
    return found


def compile_cuda(source: Path, target: str, folder: Path) -> Path:
    cubin = folder / f"{source.stem}.{target}.cubin"
    command = [nvcc(), "-std=c++20", f"-arch=sm_{target}", "-cubin", "-o", str(cubin), f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include"), "-Werror", "all-warnings"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin


@pytest.fixture(scope="module")
def cuda_cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Future[Path]]:
    """The cubins of all .cu, by file and target, which are compiled side by side."""
    nvcc()
    folder = tmp_path_factory.mktemp("cuda")
    # The largest files first.
    sources = sorted(CUDA_SOURCES, key=lambda name: -CUDA_SOURCES[name].stat().st_size)
    pool = ThreadPoolExecutor(os.cpu_count())
    return {
        (name, target): pool.submit(compile_cuda, CUDA_SOURCES[name], target, folder)
        for name in sources
        for target in NVCC_TARGETS
    }


@pytest.mark.parametrize("target", NVCC_TARGETS)
@pytest.mark.parametrize("source", sorted(CUDA_SOURCES))
def test_cuda_kernels(cuda_cubins: dict[tuple[str, str], Future[Path]], source: str, target: str) -> None:
    check(cuda_cubins[source, target].result(), int(target.rstrip("a")))


def test_faults_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "faults.cu"
    source.write_text(
        "__global__ void stack_kernel(float* to, int index) {\n"
        "  float local[64];\n"
        "  for (int i = 0; i < 64; ++i) local[i] = to[i] * i;\n"
        "  __syncthreads();\n"
        "  local[index] = 8;\n"
        "  for (int i = 0; i < 64; ++i) to[i * 64] = local[(i * index) & 63];\n"
        "}\n"
    )
    with pytest.raises(AssertionError, match="registers spill"):
        check(compile_cuda(source, "80", tmp_path), 80)
    source.write_text("__global__ void matmul_kernel(float* to) { to[0] = 1; }\n")
    with pytest.raises(AssertionError, match=r"matmul_kernel.* has no HMMA"):
        check(compile_cuda(source, "80", tmp_path), 80)

"""What every test shares: a fixed number of threads, the settings of the fuzzing, the kernels for GPUs."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from adakernels import _extension

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()

# Without a GPU the Triton kernels run in the interpreter. It acts where they are defined, at their import.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    # The first call of a shape may compile, allocate or wait for another process: no deadline holds.
    hypothesis.settings.register_profile(
        "ci", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("ci")
elif os.environ.get("CI") != "true":
    # A machine with a GPU may lack it: what is fuzzed is skipped there, and the other tests run.
    class _Anything(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

        __or__ = __call__

    stand_in: Any = ModuleType("hypothesis")
    stand_in.given = lambda *args, **kwargs: pytest.mark.skip(reason="hypothesis is not installed")
    stand_in.settings = lambda *args, **kwargs: lambda test: test
    stand_in.HealthCheck = stand_in.strategies = _Anything("hypothesis.strategies")
    sys.modules |= {"hypothesis": stand_in, "hypothesis.strategies": stand_in.strategies}


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def emulated(name: str, *sources: Path) -> Path:
    """Compile CUDA sources for the host, together with the emulation, into build/emulation/<name>.so."""
    compiler = os.environ.get("CXX", "").split(" ")[0] or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs a C++ compiler")
    emulation, torch_folder = ROOT / "tests/native/emulation", Path(torch.__file__).parent
    flags = "-std=c++20 -O2 -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -x c++".split()
    flags += "-Wall -Wextra -Werror -Wno-unknown-pragmas".split()
    flags += [f"-I{emulation}", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include")]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    headers = sorted([*ROOT.glob("csrc/cuda/*.cuh"), *emulation.rglob("*.h"), *emulation.rglob("*.cuh")])
    common = (
        b"".join(header.read_bytes() for header in headers) + f"{compiler}{flags}{torch.__version__}".encode()
    )
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        key = hashlib.sha256(common + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{key}.o"
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}")
            subprocess.run([compiler, *flags, "-c", str(source), "-o", str(unfinished)], check=True)
            unfinished.rename(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, [*sorted(emulation.glob("*.cpp")), *sources])]
    link = [compiler, "-shared", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = folder / f"{name}-{hashlib.sha256(' '.join(link).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*link, "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


@contextmanager
def _guarded_memory(library: Path) -> Iterator[None]:
    """Tensors that are made inside lie between guards, which the emulation in that library watches."""
    guard_memory = ctypes.CDLL(str(library)).guard_memory
    guard_memory(True)
    yield
    guard_memory(False)


@pytest.fixture(scope="session")
def emulate() -> Callable[..., Path]:
    return emulated


@pytest.fixture(scope="session")
def guarded_memory() -> Callable[[Path], Any]:
    return _guarded_memory


@cache
def emulated_operators() -> Path:
    return emulated("operators", *sorted(ROOT.glob("csrc/cuda/*.cu")))


@pytest.fixture(scope="session")
def cuda_kernels() -> Any:
    """The operators of csrc/cuda: on a GPU as they were built, without one for CPU tensors, emulated."""
    if HAS_GPU:
        if not _extension.has_cuda:
            pytest.fail(f"a machine with a GPU must test the CUDA kernels: {_extension.why_not_cuda}")
    else:
        torch.ops.load_library(str(emulated_operators()))
    return torch.ops.adakernels_cuda


@pytest.fixture(scope="session")
def triton_kernels() -> Any:
    """The functions of adakernels.triton: on a GPU as they are, without one for CPU tensors, interpreted."""
    if importlib.util.find_spec("triton") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must test the Triton kernels: triton is not installed")
        pytest.skip("triton is not installed")
    from adakernels import triton

    if not HAS_GPU:
        _mend_the_interpreter()
    return triton


def _mend_the_interpreter() -> None:
    """What Triton's interpreter gets wrong: it does not matter to compiled kernels.

    Bounds of loops are arrays of one element, which NumPy 2.4 does not convert to int any more. A mask made
    with a scalar condition is an array of integers, which Triton 3.9 refuses. Products of bfloat16 blocks are
    made of their bits.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_count

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    dot = builder.create_dot

    def widened(block: Any) -> Any:
        if block.dtype.scalar != tl.bfloat16:
            return block
        return interpreter.TensorHandle((block.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot_of_any(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    builder.create_dot = dot_of_any


def without_waiting(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with an error where the host waits for the GPU."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not HAS_GPU:
            return call(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


@dataclass
class Kernels:
    """One implementation of the operators for GPUs, and where its tensors have to be."""

    name: str
    device: str
    namespace: Any

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return without_waiting(getattr(self.namespace, op))


@pytest.fixture(name="without_waiting", scope="session")
def without_waiting_() -> Callable[..., Any]:
    return without_waiting


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Runs the test on the CUDA and on the Triton kernels, where no call may wait for the GPU."""
    namespace = request.getfixturevalue(f"{request.param}_kernels")
    emulation = request.param == "cuda" and not HAS_GPU
    with _guarded_memory(emulated_operators()) if emulation else nullcontext():
        yield Kernels(request.param, "cuda" if HAS_GPU else "cpu", namespace)

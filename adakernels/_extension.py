"""The compiled operators, `_ops.so` and `_cuda_ops.so`: optional, loaded once their schemas are declared."""

from __future__ import annotations

from pathlib import Path

import torch

has_cpu: bool = False
"""Whether the C++ kernels for the CPU are registered."""

why_not: str = "the native library is not loaded yet"
"""Why they are not, in one sentence; empty when they are."""

has_cuda: bool = False
"""Whether the CUDA kernels are registered, which does not need a GPU."""

why_not_cuda: str = "the native library is not loaded yet"
"""Why they are not, in one sentence; empty when they are."""

_LIBRARY = Path(__file__).with_name("_ops.so")
_CUDA_LIBRARY = Path(__file__).with_name("_cuda_ops.so")
_NOTE = Path(__file__).with_name("_why_not_native.txt")


def load() -> None:
    """Registers the compiled implementations with torch's dispatcher, or says why not; may be repeated."""
    global has_cpu, why_not, has_cuda, why_not_cuda
    if not has_cpu:
        reason = f": {_NOTE.read_text().strip()}" if _NOTE.exists() else ""
        why_not = _load(_LIBRARY, f"adakernels was installed without native code{reason}")
        has_cpu = not why_not
    if not has_cuda:
        if torch.version.cuda is None:
            why_not_cuda = f"torch {torch.__version__} has no CUDA"
        else:
            why_not_cuda = _load(_CUDA_LIBRARY, "adakernels was installed without CUDA kernels")
        has_cuda = not why_not_cuda


def _load(library: Path, missing: str) -> str:
    """Loads a library and gives "", or the reason why it can't be loaded: `missing` where it isn't there."""
    if not library.exists():
        return missing
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return ""

"""The compiled operators, `_ops.so`: loaded once their schemas are declared, and optional."""

from __future__ import annotations

from pathlib import Path

import torch

has_cpu: bool = False
"""Whether the C++ kernels for the CPU are registered."""

why_not: str = "the native library is not loaded yet"
"""Why they are not, in one sentence; empty when they are."""

_LIBRARY = Path(__file__).with_name("_ops.so")
_NOTE = Path(__file__).with_name("_why_not_native.txt")


def load() -> None:
    """Registers the compiled implementations with torch's dispatcher, or sets `why_not`; may be repeated."""
    global has_cpu, why_not
    if has_cpu:
        return
    if not _LIBRARY.exists():
        reason = f": {_NOTE.read_text().strip()}" if _NOTE.exists() else ""
        why_not = f"adakernels was installed without native code{reason}"
        return
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        why_not = f"{_LIBRARY.name} does not load with torch {torch.__version__}: {error}"
        return
    has_cpu, why_not = True, ""

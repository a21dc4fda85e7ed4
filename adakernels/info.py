"""What is installed, what was built and which backends can run: the text of `python -m adakernels info`."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from adakernels import _extension, backends


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the package and of what it runs on."""
    return {
        "adakernels": f"{_version('adakernels')}, {Path(__file__).parent}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "triton": _version("triton"),
    }


def build() -> dict[str, str]:
    """What the native build made, and which of it this processor uses."""
    operators = "loaded" if _extension.has_cpu else _extension.why_not
    cuda_operators = "loaded" if _extension.has_cuda else _extension.why_not_cuda
    try:
        from adakernels import _C
    except ImportError as error:
        return {"operators": operators, "CUDA operators": cuda_operators, "build info": f"none: {error}"}
    made = _C.build_info()
    features = _C.cpu_features()
    try:
        selected = _C.best_isa()
    except ValueError as error:
        selected = f"none: {error}"
    limit = os.environ.get("ADAKERNELS_CPU_ISA", "")
    return {
        "operators": operators,
        "CUDA operators": cuda_operators,
        "compiler": made["compiler"],
        "against torch": made["torch"],
        "CPU kernels": ", ".join(made["cpu_isas"]),
        "CUDA kernels": ", ".join(f"sm_{arch}" for arch in made["cuda_archs"]) or "none",
        "CPU features": ", ".join(name for name, present in features.items() if present) or "none known",
        "CPU ISA used": selected + (f" (ADAKERNELS_CPU_ISA={limit})" if limit else ""),
    }


def devices() -> dict[str, str]:
    """The processor and the GPUs that torch can use."""
    found = {"CPU": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    return found


def report() -> str:
    """The whole text, one fact per line."""
    sections = {
        "versions": versions(),
        "devices": devices(),
        "native build": build(),
        "backends": {
            name: f"cannot run: {reason}" if reason else "can run"
            for name, reason in backends.available_backends().items()
        },
    }
    width = max(len(name) for facts in sections.values() for name in facts)
    lines: list[str] = []
    for title, facts in sections.items():
        lines += [title, *(f"  {name:<{width}}  {fact}" for name, fact in facts.items()), ""]
    return "\n".join(lines[:-1])

"""Peak memory of a call as the operating system sees it: PyTorch's tensors and native scratch alike.

`python -m benchmarks.memory FORM FORMAT INDEX THREADS` measures one form of one case of `CASES` of its own,
so that nothing an earlier call left in the heap can hide what this one takes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.cases import MEMORY, MemoryCase
from benchmarks.dynamic import DynamicCase, DynamicLayer
from benchmarks.layers import Layer
from benchmarks.measure import Result
from benchmarks.sliced import ClipCase, Clips
from benchmarks.slim import SlimCase, SlimLayer

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ClipMemoryCase:
    """A layer over clips whose peak memory is measured."""

    layer: ClipCase | DynamicCase | SlimCase
    quick: bool = False

    family = "memory"

    @property
    def name(self) -> str:
        return f"{self.layer.family}-{self.layer.name}"


MEMORY_3D = [
    ClipMemoryCase(ClipCase(256, 64, 64, (8, 8))),
    ClipMemoryCase(ClipCase(256, 64, 64, (5, 8, 11))),
    ClipMemoryCase(SlimCase(64, 64, (1, 3, 3), 56, 8, 0.63)),
    ClipMemoryCase(DynamicCase("dynamic_conv3d", 128, 288, 8, 32, ((0, 0), (0, 1), (1, 0), (1, 1)))),
]
CASES: list[MemoryCase | ClipMemoryCase] = [*MEMORY, *MEMORY_3D]


def clip_runner(
    case: ClipCase | DynamicCase | SlimCase, form: str, memory_format: str
) -> Callable[[], Result]:
    """The call of a form ("dense", "masked" or "ours") of a layer in a memory format."""
    if isinstance(case, SlimCase):
        slim = SlimLayer(case)
        forms = {"dense": slim.dense, "masked": slim.sliced, "ours": slim.ours}
        return forms[form]()[memory_format]
    layer = Clips(case) if isinstance(case, ClipCase) else DynamicLayer(case)
    runner: Callable[[], Result] = getattr(layer.in_format(memory_format), form)
    return runner


def available() -> bool:
    """Whether this system can reset a process's peak resident size (Linux)."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_of_call(call: Callable[[], object], calls: int = 3) -> int:
    """Bytes by which the resident size peaks during `calls` calls, their last results included.

    Exact only where freed blocks go back to the system at once: see `child_environment`.
    """
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(calls):
        result = call()
        del result
    return max(0, resident("VmHWM") - before)


def child_environment() -> dict[str, str]:
    """The environment under which glibc maps every block of 64 KB or more afresh and unmaps it when freed."""
    return os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
        "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), *sys.path) if path),
    }


def peak_in_fresh_process(form: str, memory_format: str, index: int, threads: int) -> int:
    """Peak bytes of `form` ("dense", "masked", "ours", "operator" or "fused") of a case, in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", form, memory_format, str(index), str(threads)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout)


def main(form: str, memory_format: str, index: str, threads: str) -> None:
    """Warm the code up on a small input, then measure the full one: scratch that is kept counts as well."""
    torch.set_num_threads(int(threads))
    case = CASES[int(index)]
    runner: Callable[[], Result]
    # Made outside of inference mode, as usual: then what is made of a layer's weight is kept.
    if isinstance(case, ClipMemoryCase):
        warm = clip_runner(replace(case.layer, size=8), form, memory_format)
        runner = clip_runner(case.layer, form, memory_format)
    else:
        small = replace(case, shape=replace(case.shape, size=case.shape.kernel), batch=2)
        warm, runner = (getattr(Layer(c).in_format(memory_format), form) for c in (small, case))
    with torch.inference_mode():
        for _ in range(3):
            warm()
        print(peak_of_call(runner))


if __name__ == "__main__":
    main(*sys.argv[1:])

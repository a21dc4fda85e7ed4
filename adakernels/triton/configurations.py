"""Launch configurations: JSON by class of device, read when a kernel is first launched.

`configs/sm_90.json` holds what was measured on GPUs of that architecture, `configs/default.json` an entry for
every class of shape that nothing was measured for; an entry of the first comes before that of the second.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from triton import knobs
from triton.runtime import driver

FOLDER = Path(__file__).with_name("configs")


def _device_class() -> str:
    if knobs.runtime.interpret:
        return "default"
    return f"sm_{driver.active.get_current_target().arch}"


@cache
def _configurations(name: str) -> dict[str, dict[str, dict[str, int]]]:
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text())["configurations"] if file.exists() else {}


def configuration(kernel: str, shape_class: str) -> dict[str, int]:
    """Blocks, warps and pipeline stages for a class of shapes on the current device."""
    measured = _configurations(_device_class()).get(kernel, {})
    return measured.get(shape_class) or _configurations("default")[kernel][shape_class]

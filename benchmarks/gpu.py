"""`python -m benchmarks.gpu`: times of the GPU kernels on this machine's GPU, beside torch and a plain copy.

Times are of device events around the replay of a CUDA graph that holds one call for each of several sets
of inputs, together larger than the L2 cache, so none finds its inputs there; and once more of the same calls
made one by one. The contenders take turns. A time is only taken of what has just matched the reference.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import adakernels as ak
from adakernels.ops import patch_gather_reference, temporal_fuse_reference
from benchmarks.measure import FORMATS, Race, assert_matches

ROUNDS = 20
# Of the largest number of the result: roundings to the format, and of sums in float32 in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
Call = Callable[[], Any]


class Contest:
    """Contenders for the same task: each makes one call for every set of inputs."""

    def __init__(self, name: str, bytes_moved: int) -> None:
        self.name = name
        self.bytes_moved = bytes_moved
        self.calls: dict[str, list[Call]] = {}

    def add(self, name: str, call: Callable[..., Any], inputs: Sequence[Sequence[Any]]) -> None:
        self.calls[name] = [partial(call, *arguments) for arguments in inputs]


def sets_of_inputs(make: Callable[[int], Sequence[Any]], bytes_each: int) -> list[Sequence[Any]]:
    """As many sets as four times the L2 cache holds, two at least."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return [make(seed) for seed in range(max(2, min(64, -(-4 * cache // bytes_each))))]


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of all the calls, which have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds_on_device(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class DeviceRace(Race):
    """A race whose samples are times between events on the device."""

    def _sample(self, name: str) -> float:
        return seconds_on_device(self.runners[name])


def peak_memory(call: Call) -> int:
    """Bytes that one call takes at most, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measure(contest: Contest) -> dict[str, Any]:
    """Times of all contenders by graph and one by one, in seconds per call, and their peak memory."""
    graphs = {name: capture(calls) for name, calls in contest.calls.items()}
    runners: dict[str, Call] = {f"{name}, graph": graph.replay for name, graph in graphs.items()}
    for name, calls in contest.calls.items():
        runners[f"{name}, eager"] = lambda calls=calls: [call() for call in calls] and None
    race = DeviceRace(runners)
    race.warm_up(3)
    race.run(ROUNDS)
    count = len(next(iter(contest.calls.values())))
    times = {
        name: {key: value if key == "rounds" else value / count for key, value in spread.items()}
        for name, spread in race.times().items()
    }
    memory = {name: peak_memory(calls[0]) for name, calls in contest.calls.items()}
    return {"name": contest.name, "bytes": contest.bytes_moved, "times": times, "peak_memory": memory}


def backends() -> list[str]:
    return [name for name in ("cuda", "triton") if not ak.available_backends()[name]]


def under(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with ak.use_backend(backend):
            return call(*arguments)

    return run


def add_ours(
    contest: Contest, call: Callable[..., Any], inputs: Sequence[Any], expected: Any, dtype: Any
) -> None:
    for backend in backends():
        run = under(backend, call)
        assert_matches(run(*inputs[0]), expected, TOLERANCES[dtype])
        contest.add(backend, run, inputs)


def fuse_contest(dtype: torch.dtype, format: str) -> Contest:
    """8 clips of 8 frames of ResNet-50's second stage, a third of the channels each kept, reused, skipped."""
    rows, channels, size, frames = 64, 256, 56, 8
    bytes_each = 2 * rows * channels * size * size * dtype.itemsize

    def make(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        input = torch.randn(rows, channels, size, size, device="cuda", generator=generator).to(dtype)
        policy = torch.randint(0, 3, (rows, channels), device="cuda", generator=generator)
        return input.contiguous(memory_format=FORMATS[format]), policy

    inputs = sets_of_inputs(make, bytes_each)
    contest = Contest(f"temporal_fuse {rows}x{channels}x{size}x{size} {format} {dtype}", bytes_each)
    reference = partial(temporal_fuse_reference, frames=frames)
    contest.add("copy", lambda input, policy: input.clone(), inputs)
    contest.add("torch", reference, inputs)
    add_ours(contest, partial(ak.temporal_fuse, frames=frames), inputs, reference(*inputs[0]), dtype)
    return contest


def sample(input: Tensor, origin: Tensor, size: int) -> Tensor:
    """The same patches by `affine_grid` and `grid_sample`."""
    extent = input.shape[-1]
    scale = torch.full_like(origin[:, 0], size / extent)
    y, x = (2 * origin / extent + size / extent - 1).unbind(1)
    zero = torch.zeros_like(scale)
    theta = torch.stack((scale, zero, x, zero, scale, y), 1).unflatten(1, (2, 3)).to(input.dtype)
    grid = F.affine_grid(theta, [*input.shape[:2], size, size], align_corners=False)
    return F.grid_sample(input, grid, align_corners=False)


def gather_contest(dtype: torch.dtype, format: str, gradient: bool) -> Contest:
    """32 patches of 128² from frames of 224², with or without the gradient to their places."""
    patches, channels, extent, size = 32, 3, 224, 128
    bytes_each = 2 * patches * channels * size * size * dtype.itemsize

    def make(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        input = torch.randn(patches, channels, extent, extent, device="cuda", generator=generator).to(dtype)
        origin = torch.rand(patches, 2, device="cuda", generator=generator) * (extent - size)
        return input.contiguous(memory_format=FORMATS[format]), origin.requires_grad_(gradient)

    def with_gradient(call: Callable[..., Tensor]) -> Callable[..., Any]:
        def run(input: Tensor, origin: Tensor) -> Tensor:
            output = call(input, origin)
            return torch.autograd.grad(output, origin, torch.ones_like(output))[0] if gradient else output

        return run

    inputs = sets_of_inputs(make, bytes_each)
    contest = Contest(f"patch_gather{' and gradient' * gradient} {format} {dtype}", bytes_each)
    reference = with_gradient(lambda input, origin: patch_gather_reference(input, origin, (size, size)))
    contest.add("copy", lambda input, origin: input[..., :size, :size].clone(), inputs)
    contest.add("torch", with_gradient(partial(sample, size=size)), inputs)
    ours = with_gradient(lambda input, origin: ak.patch_gather(input, origin, size))
    add_ours(contest, ours, inputs, reference(*inputs[0]), dtype)
    return contest


CONTESTS = {
    "temporal_fuse": [
        partial(fuse_contest, dtype, format)
        for dtype in (torch.bfloat16, torch.float32)
        for format in FORMATS
    ],
    "patch_gather": [
        partial(gather_contest, dtype, format, gradient)
        for dtype in (torch.bfloat16, torch.float32)
        for format in FORMATS
        for gradient in (False, True)
    ],
}


def machine() -> dict[str, Any]:
    """The GPU, the versions and the commit that the times belong to."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    properties = torch.cuda.get_device_properties()
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def render(record: Mapping[str, Any]) -> str:
    lines = [record["name"]]
    for name, spread in record["times"].items():
        low, middle, high = (spread[key] * 1e6 for key in ("p20", "p50", "p80"))
        lines.append(f"  {name:<16}{middle:10.1f} us  ({low:.1f} to {high:.1f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch finds no NVIDIA GPU")
    records = []
    for contests in CONTESTS.values():
        for make in contests:
            records.append(measure(make()))
            print(render(records[-1]), flush=True)
            torch.cuda.empty_cache()
    what = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", what["device"].lower()).strip("-")
    folder = arguments.output or Path(__file__).parent / "results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "kernels.json"
    file.write_text(json.dumps({"machine": what, "records": records}, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.gpu`: times of the GPU kernels on this machine's GPU, beside torch and a plain copy.

Times are of device events around the replay of a CUDA graph that holds one call for each of several sets
of inputs, together larger than the L2 cache, so none finds its inputs there; and once more of the same calls
made one by one. The contenders take turns. A time is only taken of what has just matched the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
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
from adakernels.backends import MEASURED, ON_GPU, device_file, shape_class
from adakernels.ops import (
    dynamic_conv3d_flops,
    dynamic_conv3d_reference,
    gated_conv2d_reference,
    patch_gather_reference,
    sliced_conv3d_reference,
    slim_conv_reference,
    temporal_fuse_reference,
)
from adakernels.ops._conv_arguments import activate
from adakernels.ops._layout import CHANNELS_LAST
from benchmarks.cases import ConvShape, draw_policy, work_ratio
from benchmarks.measure import FORMATS, Race, assert_matches

DEVICE = "cuda"
ROUNDS = 20
# Of the largest number of the result: roundings to the format, and of sums in float32 in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
Call = Callable[[], Any]


class Contest:
    """Contenders for the same task: each makes one call for every set of inputs."""

    def __init__(self, name: str, bytes_moved: int, decides: tuple[str, str], work: float = 1.0) -> None:
        """`decides`: operator and class of shapes whose backend the times choose. `work`: the share of the
        dense multiply-adds that is left to do."""
        self.name = name
        self.bytes_moved = bytes_moved
        self.decides = decides
        self.work = work
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
    return {
        "name": contest.name,
        "bytes": contest.bytes_moved,
        "work": contest.work,
        "decides": contest.decides,
        "times": times,
        "peak_memory": memory,
    }


def backends() -> list[str]:
    """Those that can run here."""
    return [name for name in ON_GPU if not ak.available_backends()[name]]


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
    name = f"temporal_fuse {rows}x{channels}x{size}x{size} {format} {dtype}"
    contest = Contest(name, bytes_each, ("temporal_fuse", shape_class(dtype, (size, size))))
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
    op = "patch_gather_grad_origin" if gradient else "patch_gather"
    contest = Contest(f"{op} {format} {dtype}", bytes_each, (op, shape_class(dtype, (size, size))))
    reference = with_gradient(lambda input, origin: patch_gather_reference(input, origin, (size, size)))
    contest.add("copy", lambda input, origin: input[..., :size, :size].clone(), inputs)
    contest.add("torch", with_gradient(partial(sample, size=size)), inputs)
    ours = with_gradient(lambda input, origin: ak.patch_gather(input, origin, size))
    add_ours(contest, ours, inputs, reference(*inputs[0]), dtype)
    return contest


def differentiated(call: Callable[..., Tensor], leaves: int) -> Callable[..., Any]:
    """The call, or if there are leaves the gradients of its result to so many of its first arguments."""

    def run(*inputs: Tensor) -> Any:
        output = call(*inputs)
        if leaves == 0:
            return output
        return torch.autograd.grad(output, inputs[:leaves], torch.ones_like(output))

    return run


def conv_contest(shape: ConvShape, updated: float, dtype: torch.dtype, gradient: bool) -> Contest:
    """8 clips of 8 frames under policies of their own, beside cuDNN's convolution of all channels."""
    rows, frames = 64, 8
    sizes = (
        (rows, shape.in_channels, shape.size, shape.size),
        (rows, shape.out_channels, *(shape.out_size,) * 2),
    )
    weight_size = (shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.kernel)
    bytes_each = sum(math.prod(size) for size in (*sizes, weight_size)) * dtype.itemsize

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator("cuda").manual_seed(seed)
        leaves = [
            torch.randn(size, device="cuda", generator=generator).to(dtype)
            for size in (sizes[0], weight_size, weight_size[:1])
        ]
        leaves[:2] = [leaf.contiguous(memory_format=torch.channels_last) for leaf in leaves[:2]]
        leaves[1] /= math.prod(weight_size[1:]) ** 0.5
        policy = draw_policy(updated, rows, shape.out_channels, frames, seed)
        return *(leaf.requires_grad_(gradient) for leaf in leaves), policy.cuda()

    def dense(input: Tensor, weight: Tensor, bias: Tensor, policy: Tensor) -> Tensor:
        convolved = F.conv2d(input, weight, bias, shape.stride, shape.padding, groups=shape.groups)
        return activate(convolved, shape.activation)

    arguments = {
        "frames": frames,
        "stride": shape.stride,
        "padding": shape.padding,
        "groups": shape.groups,
        "activation": shape.activation,
    }
    inputs = sets_of_inputs(make, bytes_each)
    op = "gated_conv2d_backward" if gradient else "gated_conv2d"
    work = work_ratio(shape, inputs[0][3].cpu(), None, frames)
    decides = op, shape_class(dtype, sizes[0], weight_size, shape.groups)
    contest = Contest(f"{op} {shape.name} u={updated} {dtype}", bytes_each, decides, work)
    reference = differentiated(partial(gated_conv2d_reference, **arguments), 3 * gradient)
    contest.add("dense", differentiated(dense, 3 * gradient), inputs)
    contest.add("masked", reference, inputs)
    ours = differentiated(partial(ak.gated_conv2d, **arguments), 3 * gradient)
    add_ours(contest, ours, inputs, reference(*inputs[0]), dtype)
    return contest


class ClipContest(Contest):
    """Convolutions with weights and filters of these sizes, channels last, beside cuDNN's dense one."""

    def __init__(
        self,
        op: str,
        name: str,
        sizes: Sequence[Sequence[int]],
        output: Sequence[int],
        control: Callable[[Sequence[Tensor], int], Sequence[Tensor]],
        dtype: torch.dtype,
        gradient: bool,
        work: float = 1.0,
    ) -> None:
        """`sizes`: of input, weight, bias and filters. `control`: what else a set of inputs with that seed
        has, given these."""
        backward = "_backward" * gradient
        bytes_each = sum(math.prod(size) for size in (*sizes, output)) * dtype.itemsize
        decides = op + backward, shape_class(dtype, sizes[0], sizes[1])
        super().__init__(f"{op}{backward} {name} {dtype}", bytes_each, decides, work)
        self.leaves = len(sizes) * gradient

        def make(seed: int) -> tuple[Tensor, ...]:
            generator = torch.Generator(DEVICE).manual_seed(seed)
            leaves = [torch.randn(size, device=DEVICE, generator=generator) for size in sizes]
            for i, leaf in enumerate(leaves):
                # The input and the bias come as they are.
                scale = leaf[0].numel() ** 0.5 if i not in (0, 2) else 1.0
                format = CHANNELS_LAST[leaf.dim()] if i < 2 else torch.contiguous_format
                leaves[i] = (leaf / scale).to(dtype).contiguous(memory_format=format)
            more = control(leaves, seed)
            return *(leaf.requires_grad_(gradient) for leaf in leaves), *more

        self.inputs = sets_of_inputs(make, bytes_each)
        self.dtype = dtype

    def race(
        self,
        dense: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        ours: Callable[..., Tensor],
    ) -> ClipContest:
        """Adds the contenders, all of the same arguments; the dense one has three leaves."""
        self.add("dense", differentiated(dense, min(self.leaves, 3)), self.inputs)
        reference = differentiated(reference, self.leaves)
        self.add("masked", reference, self.inputs)
        expected = reference(*self.inputs[0])
        add_ours(self, differentiated(ours, self.leaves), self.inputs, expected, self.dtype)
        return self


def sliced_contest(
    channels: int, out_channels: int, size: int, dtype: torch.dtype, gradient: bool = False
) -> Contest:
    """The first convolution of I3D's bottlenecks for 8 clips of 8 frames, half of which are 2D."""
    clips, frames, taps = 8, 8, 3

    def control(leaves: Sequence[Tensor], seed: int) -> tuple[Tensor]:
        return (torch.randperm(clips, generator=torch.Generator().manual_seed(seed)).to(DEVICE) % 2 == 0,)

    contest = ClipContest(
        "sliced_conv3d",
        f"{channels}to{out_channels}k{taps}x1x1at{size}",
        ((clips, channels, frames, size, size), (out_channels, channels, taps, 1, 1), (out_channels,)),
        (clips, out_channels, frames, size, size),
        control,
        dtype,
        gradient,
        work=(1 + 1 / taps) / 2,
    )
    arguments: dict[str, Any] = {"padding": (taps // 2, 0, 0), "activation": "relu"}
    return contest.race(
        lambda input, weight, bias, temporal: F.relu(F.conv3d(input, weight, bias, padding=(1, 0, 0))),
        partial(sliced_conv3d_reference, **arguments),
        partial(ak.sliced_conv3d, **arguments),
    )


def dynamic_contest(
    channels: int,
    out_channels: int,
    frames: int,
    size: int,
    levels: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    gradient: bool = False,
) -> Contest:
    """A 1x3x3 convolution of R(2+1)D for 8 clips that take turns at these levels of time and channels."""
    clips = 8

    def control(leaves: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([levels[(clip + seed) % len(levels)] for clip in range(clips)])
        gates = F.one_hot(chosen, 2).float().to(DEVICE)
        return gates[:, 0].contiguous(), gates[:, 1].contiguous()

    sizes = (
        (clips, channels, frames, size, size),
        (out_channels, channels, 1, 3, 3),
        (out_channels,),
        (1, out_channels, 3, 3),
        (out_channels, 3, 3),
    )
    output = clips, out_channels, frames, size, size
    whole, counts = dynamic_conv3d_flops(
        sizes[1], *(gate.cpu() for gate in control((), 0)), batch=clips, output_size=output[2:], taps=9
    )
    what = "+".join(f"R{2**temporal}r{2**channel}" for temporal, channel in levels)
    name = f"{channels}to{out_channels}k1x3x3at{frames}x{size} {what}"
    contest = ClipContest(
        "dynamic_conv3d", name, sizes, output, control, dtype, gradient, float(counts.mean()) / whole
    )

    def dense(input: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
        return F.relu(F.conv3d(input, weight, bias, padding=(0, 1, 1)))

    def on(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            input, weight, bias, temporal_weight, channel_weight, *gates = inputs
            filters = {"temporal_weight": temporal_weight, "channel_weight": channel_weight}
            return op(input, weight, bias, *gates, **filters, padding=(0, 1, 1), activation="relu")

        return run

    return contest.race(dense, on(dynamic_conv3d_reference), on(ak.dynamic_conv3d))


def slim_contest(width: int, size: int, share: float, dtype: torch.dtype) -> Contest:
    """A 3x3 convolution at a share of its width, beside one that was allocated at that width."""
    rows, used = 32, round(share * width / 8) * 8

    def control(leaves: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor]:
        weight = leaves[1][:used, :used].contiguous(memory_format=torch.channels_last)
        return weight, leaves[2][:used].clone()

    contest = ClipContest(
        "slim_conv",
        f"{used} of {width} k3 at {size}",
        ((rows, used, size, size), (width, width, 3, 3), (width,)),
        (rows, used, size, size),
        control,
        dtype,
        gradient=False,
    )

    def dense(input: Tensor, whole: Tensor, whole_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.conv2d(input, weight, bias, padding=1))

    def on(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda input, weight, bias, *others: op(
            input, weight, bias, out_channels=used, padding=1, activation="relu"
        )

    return contest.race(dense, on(slim_conv_reference), on(ak.slim_conv2d))


# Gated convolutions of ResNet-18 and ResNet-50, and depthwise ones of EfficientNet-b0.
CONVOLUTIONS = (
    *(ConvShape(width, width, size) for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(
        ConvShape(*widths, size, 1)
        for *widths, size in ((256, 64, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7))
    ),
    *(
        ConvShape(width, width, size, kernel, groups=width)
        for width, size, kernel in ((144, 56, 3), (480, 14, 5))
    ),
)

SLICED = ((64, 64, 64), (256, 64, 64), (512, 128, 32), (1024, 256, 16), (2048, 512, 8))
DYNAMIC = ((64, 144, 16, 64), (128, 288, 8, 32), (256, 576, 4, 16))
LEVELS: Sequence[Sequence[tuple[int, int]]] = (((1, 0),), ((0, 0), (1, 0), (0, 1), (1, 1)))
SLIM = ((64, 56), (256, 14))

CONTESTS = {
    "sliced_conv3d": [
        *(partial(sliced_contest, *shape, torch.bfloat16) for shape in SLICED),
        *(partial(sliced_contest, *shape, torch.float16) for shape in SLICED[:1]),
        *(partial(sliced_contest, *shape, torch.bfloat16, True) for shape in SLICED[1::2]),
    ],
    "dynamic_conv3d": [
        *(partial(dynamic_contest, *shape, levels, torch.bfloat16) for shape in DYNAMIC for levels in LEVELS),
        partial(dynamic_contest, *DYNAMIC[1], LEVELS[1], torch.float16),
        partial(dynamic_contest, *DYNAMIC[1], LEVELS[1], torch.bfloat16, True),
    ],
    "slim_conv": [
        partial(slim_contest, *shape, share, torch.bfloat16) for shape in SLIM for share in (0.5, 0.63, 0.83)
    ],
    "gated_conv2d": [
        *(
            partial(conv_contest, shape, updated, torch.bfloat16, False)
            for shape in CONVOLUTIONS
            for updated in (0.75, 0.5, 0.25)
        ),
        *(partial(conv_contest, shape, 0.5, torch.bfloat16, True) for shape in CONVOLUTIONS),
    ],
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


def fastest(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """By operator and class of shapes, the backend that took the least time by graph in all its contests."""
    sums: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        of_class = sums.setdefault(tuple(record["decides"]), {})
        for name in ON_GPU:
            if f"{name}, graph" in record["times"]:
                of_class[name] = of_class.get(name, 0.0) + record["times"][f"{name}, graph"]["p50"]
    found: dict[str, dict[str, str]] = {}
    for (op, shapes), times in sums.items():
        if len(times) == len(ON_GPU):
            found.setdefault(op, {})[shapes] = min(times, key=times.__getitem__)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    parser.add_argument("--choose", action="store_true", help="let these times choose between the backends")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch finds no NVIDIA GPU")
    records = []
    for contests in CONTESTS.values():
        for make in contests:
            records.append(measure(make()))
            print(render(records[-1]), flush=True)
            torch.cuda.empty_cache()
    what = machine()
    name = device_file(what["device"])
    folder = arguments.output or Path(__file__).parent / "results" / name.removesuffix(".json")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "kernels.json"
    file.write_text(json.dumps({"machine": what, "records": records}, indent=1) + "\n")
    print(f"wrote {file}")
    if arguments.choose:
        MEASURED.mkdir(exist_ok=True)
        (MEASURED / name).write_text(
            json.dumps({"machine": what, "fastest": fastest(records)}, indent=1) + "\n"
        )
        print(f"wrote {MEASURED / name}")


if __name__ == "__main__":
    main()

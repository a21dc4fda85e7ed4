"""What is measured: layer shapes, models and policies as data, and the targets their results are held to."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

KEEP, REUSE, SKIP = 0, 1, 2
CLIP = 8
REUSED_PER_KEPT = 0.16
UPDATED = (1.0, 0.75, 0.5, 0.25)
SKIPPED = (0.25, 0.5)
BATCHES = (8, 32)


@dataclass(frozen=True)
class ConvShape:
    """A square convolution: channels, input height (= width) in pixels, kernel, stride and activation."""

    in_channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    activation: str | None = "relu"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def macs_per_channel(self) -> int:
        """Multiply-adds of one output channel of one frame with every input channel live."""
        return self.out_size**2 * self.kernel**2 * self.in_channels // self.groups

    @property
    def name(self) -> str:
        channels = f"dw{self.out_channels}" if self.groups > 1 else f"{self.in_channels}to{self.out_channels}"
        return f"{channels}k{self.kernel}at{self.size}" + (f"s{self.stride}" if self.stride > 1 else "")


@dataclass(frozen=True)
class LayerCase:
    """One layer at one batch size: `updated` is u = |U_t| / C_out, `skipped` the share of SKIP inputs."""

    family: str
    shape: ConvShape
    batch: int
    updated: float | None = None
    skipped: float | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        policy = "" if self.updated is None else f"-u{self.updated:.2f}"
        in_policy = "" if self.skipped is None else f"-skip{self.skipped:.2f}"
        return f"{self.shape.name}-n{self.batch}{policy}{in_policy}"

    @property
    def seed(self) -> int:
        return zlib.crc32(f"{self.family}/{self.name}".encode())


@dataclass(frozen=True)
class MemoryCase(LayerCase):
    """A layer whose peak memory is measured in one form: "operator", "ours" with what the layer keeps, or
    "fused" for `temporal_fuse` alone."""

    form: str = "operator"

    @property
    def name(self) -> str:
        return super().name + ("-temporal-fuse" if self.form == "fused" else "")


@dataclass(frozen=True)
class PatchCase:
    """Square patches of square frames: `batch` of them, from as many frames unless `frames` says fewer.

    `gradients` are those taken after the forward pass: none, "origin", or "both" (also to the frames).
    """

    batch: int
    channels: int
    extent: int
    patch: int
    dtype: torch.dtype = torch.float32
    gradients: str | None = None
    frames: int | None = None
    quick: bool = False

    @property
    def family(self) -> str:
        if self.gradients is not None:
            return f"patch_{self.gradients}"
        return "patch_uint8" if self.dtype == torch.uint8 else "patch_forward"

    @property
    def name(self) -> str:
        shared = "" if self.frames is None else f"-of{self.frames}"
        dtype = "-uint8" if self.dtype == torch.uint8 else ""
        return f"n{self.batch}{shared}-c{self.channels}at{self.extent}to{self.patch}{dtype}"

    @property
    def seed(self) -> int:
        return zlib.crc32(f"{self.family}/{self.name}".encode())

    @property
    def bytes(self) -> int:
        """What cannot be left out: samples read and patches written, and the like for each gradient."""
        read = self.batch * self.channels * (self.patch + 1) ** 2 * self.dtype.itemsize
        patches = 4 * self.batch * self.channels * self.patch**2
        total = read + patches
        if self.gradients is not None:
            total += read + patches
        if self.gradients == "both":
            total += patches + 4 * (self.frames or self.batch) * self.channels * self.extent**2
        return total


@dataclass(frozen=True)
class ModelCase:
    """A gated model against its plain backbone; `work` is the share of the dense work that it is to do."""

    model: str
    backbone: str
    work: float
    clips: int = 1
    quick: bool = False

    family = "model"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.clips}x{CLIP}frames"


@dataclass(frozen=True)
class Target:
    """A row of the result table: which records it gathers, which of their numbers it judges, and the goals.

    `metric` is a key of records; `worst` bounds every case and `mean` their geometric mean, in the direction
    that `higher` says; `aim` is what we would like the mean (or, without one, every case) to reach. None
    means that the row is shown but not judged on that. `updated` and `cases` narrow the family down.
    """

    label: str
    family: str
    metric: str = "eta"
    mean: float | None = None
    worst: float | None = None
    aim: float | None = None
    updated: tuple[float, ...] | None = None
    cases: tuple[str, ...] | None = None

    @property
    def higher(self) -> bool:
        return self.metric in ("eta", "speedup")

    def gathers(self, record: Mapping[str, Any]) -> bool:
        """Whether `record` belongs to this row."""
        return (
            record["family"] == self.family
            and (self.updated is None or record.get("updated") in self.updated)
            and (self.cases is None or record["case"] in self.cases)
        )


RESNET18_CONV1 = (
    ConvShape(64, 64, 56),
    ConvShape(64, 128, 56, stride=2),
    ConvShape(128, 128, 28),
    ConvShape(128, 256, 28, stride=2),
    ConvShape(256, 256, 14),
    ConvShape(256, 512, 14, stride=2),
    ConvShape(512, 512, 7),
)
RESNET50_CONV1 = (
    ConvShape(64, 64, 56, kernel=1),
    ConvShape(256, 64, 56, kernel=1),
    ConvShape(256, 128, 56, kernel=1),
    ConvShape(512, 128, 28, kernel=1),
    ConvShape(512, 256, 28, kernel=1),
    ConvShape(1024, 256, 14, kernel=1),
    ConvShape(1024, 512, 14, kernel=1),
    ConvShape(2048, 512, 7, kernel=1),
)
RESNET50_CONV2 = (
    ConvShape(64, 64, 56),
    ConvShape(128, 128, 56, stride=2),
    ConvShape(128, 128, 28),
    ConvShape(256, 256, 28, stride=2),
    ConvShape(256, 256, 14),
    ConvShape(512, 512, 14, stride=2),
    ConvShape(512, 512, 7),
)
EFFICIENTNET_B0_DEPTHWISE = tuple(
    ConvShape(channels, channels, size, kernel, stride, groups=channels, activation="silu")
    for channels, size, kernel, stride in (
        (96, 112, 3, 2),
        (144, 56, 3, 1),
        (144, 56, 5, 2),
        (240, 28, 5, 1),
        (240, 28, 3, 2),
        (480, 14, 3, 1),
        (480, 14, 5, 1),
        (672, 14, 5, 1),
        (672, 14, 5, 2),
        (1152, 7, 5, 1),
        (1152, 7, 3, 1),
    )
)
RESNET_3X3 = tuple(dict.fromkeys(RESNET18_CONV1 + RESNET50_CONV2))

QUICK_SHAPES = frozenset(
    shape.name
    for shape in (
        RESNET18_CONV1[0],
        RESNET18_CONV1[2],
        RESNET18_CONV1[4],
        RESNET18_CONV1[6],
        RESNET50_CONV1[1],
        RESNET50_CONV1[3],
        RESNET50_CONV1[5],
        RESNET50_CONV1[7],
        EFFICIENTNET_B0_DEPTHWISE[1],
        EFFICIENTNET_B0_DEPTHWISE[3],
        EFFICIENTNET_B0_DEPTHWISE[7],
        EFFICIENTNET_B0_DEPTHWISE[10],
    )
)


def _sweep(
    family: str, shapes: Iterable[ConvShape], updated: Iterable[float] = (), skipped: Iterable[float] = ()
) -> list[LayerCase]:
    cases = []
    for shape in shapes:
        for batch in BATCHES:
            quick = batch == BATCHES[0] and shape.name in QUICK_SHAPES
            cases += [LayerCase(family, shape, batch, updated=u, quick=quick and u == 0.5) for u in updated]
            cases += [LayerCase(family, shape, batch, skipped=s, quick=quick and s == 0.5) for s in skipped]
    return cases


LAYERS = (
    _sweep("gated_3x3", RESNET_3X3, updated=UPDATED)
    + _sweep("gated_1x1", RESNET50_CONV1, updated=UPDATED)
    + _sweep("gated_input", RESNET50_CONV2, skipped=SKIPPED)
    + _sweep("gated_depthwise", EFFICIENTNET_B0_DEPTHWISE, updated=UPDATED, skipped=SKIPPED)
)
BACKWARD = [
    LayerCase("gated_backward", shape, BATCHES[0], updated=0.5, quick=shape == RESNET18_CONV1[2])
    for shape in (
        RESNET18_CONV1[0],
        RESNET18_CONV1[2],
        RESNET18_CONV1[4],
        RESNET18_CONV1[6],
        RESNET50_CONV1[3],
    )
]
MODELS = [
    ModelCase("adafuse_resnet18", "resnet18", work=0.70, quick=True),
    ModelCase("adafuse_resnet50", "resnet50", work=0.67),
    ModelCase("adafuse_resnet18", "resnet18", work=0.70, clips=4),
    ModelCase("adafuse_resnet50", "resnet50", work=0.67, clips=4),
]
MEMORY = [
    MemoryCase("memory", RESNET18_CONV1[0], BATCHES[1], updated=0.5, quick=True),
    MemoryCase("memory", RESNET18_CONV1[6], BATCHES[1], updated=0.5),
    MemoryCase("memory", RESNET50_CONV1[1], BATCHES[1], updated=0.5),
    MemoryCase("memory", RESNET50_CONV2[2], BATCHES[1], skipped=0.5),
    MemoryCase("memory", EFFICIENTNET_B0_DEPTHWISE[1], BATCHES[1], updated=0.5),
    MemoryCase("memory", RESNET18_CONV1[0], BATCHES[1], updated=0.5, form="fused"),
    MemoryCase("memory_layer", RESNET18_CONV1[0], BATCHES[1], updated=0.5, form="ours"),
    MemoryCase("memory_layer", RESNET18_CONV1[6], BATCHES[1], updated=0.5, form="ours"),
    MemoryCase("memory_layer", RESNET50_CONV2[2], BATCHES[1], skipped=0.5, form="ours"),
]
PATCH = PatchCase(32, 3, 224, 128, quick=True)
PATCH_GRADIENT = replace(PATCH, gradients="origin")
WIDE_PATCH = PatchCase(8, 64, 224, 128)
PATCHES = [
    PATCH,
    *(replace(PATCH, batch=batch, quick=False) for batch in (1, 8, 128)),
    *(replace(PATCH, patch=patch, quick=False) for patch in (96, 160, 176)),
    *(PatchCase(32, 3, 256, patch) for patch in (128, 176)),
    PatchCase(1536, 3, 224, 96),
    WIDE_PATCH,
    replace(PATCH, dtype=torch.uint8),
    PatchCase(1, 3, 224, 96, torch.uint8),
    PatchCase(32, 3, 256, 176, torch.uint8),
    PatchCase(128, 3, 224, 144, torch.uint8),
    PATCH_GRADIENT,
    *(PatchCase(batch, 3, 256, 176, gradients="origin") for batch in (1, 32)),
    replace(PATCH_GRADIENT, dtype=torch.uint8, quick=False),
    replace(WIDE_PATCH, gradients="origin"),
    *(PatchCase(32, 3, 224, patch, gradients="both") for patch in (96, 128)),
    PatchCase(64, 3, 256, 144, gradients="both", frames=8),
    replace(WIDE_PATCH, gradients="both"),
]
TINY = LayerCase("overhead", ConvShape(4, 4, 4, activation=None), batch=2, updated=0.5, quick=True)
INFERENCE_CALLS = ("no policy", "policy", "in_policy")
TRAINING_CALLS = ("policy, recording for backward",)
LAYER_CALLS = ("layer, policy",)

BELOW_ONE = tuple(u for u in UPDATED if u < 1)
TARGETS = [
    Target("gated conv 3x3, u < 1", "gated_3x3", mean=0.90, worst=0.80, aim=1.0, updated=BELOW_ONE),
    Target("gated conv 3x3, u = 1", "gated_3x3", "time_ratio", worst=1.05, aim=1.0, updated=(1.0,)),
    Target("gated conv 1x1, u < 1", "gated_1x1", mean=0.80, worst=0.70, aim=0.95, updated=BELOW_ONE),
    Target("gated conv 1x1, u = 1", "gated_1x1", "time_ratio", updated=(1.0,)),
    Target("gated input 3x3", "gated_input", mean=0.80, aim=0.95),
    Target("gated depthwise", "gated_depthwise", mean=0.80, aim=0.95),
    Target("gated conv, forward + backward", "gated_backward"),
    Target("AdaFuse ResNet-18, 1 clip", "model", "time_ratio", worst=0.80, aim=0.72, cases=(MODELS[0].name,)),
    Target("AdaFuse ResNet-50, 1 clip", "model", "time_ratio", worst=0.80, aim=0.72, cases=(MODELS[1].name,)),
    Target("AdaFuse ResNet-18, 4 clips", "model", "time_ratio", cases=(MODELS[2].name,)),
    Target("AdaFuse ResNet-50, 4 clips", "model", "time_ratio", cases=(MODELS[3].name,)),
    Target("sliced conv3d, half the clips 2D", "sliced_conv3d", mean=0.85, aim=0.97),
    Target("sliced conv3d, forward + backward", "sliced_backward"),
    Target("Ada3D I3D-R50, time - work", "ada3d_model", "excess", worst=0.08),
    Target("slim conv", "slim", "time_ratio", worst=1.05, aim=1.0),
    Target("slim conv, forward + backward", "slim_backward", "time_ratio"),
    Target("A3D Slow-R50 within budgets", "slim_model"),
    Target("dynamic conv3d, R(2+1)D shapes", "dynamic_conv3d", mean=0.80, aim=0.95),
    Target("dynamic conv3d, X3D shapes", "dynamic_x3d", mean=0.80, aim=0.95),
    Target("VA-RED² R(2+1)D-18 at work 0.73", "vared2_model", "time_ratio", worst=0.80),
    Target("patch gather 32x3x224² to 128²", "patch_forward", "speedup", worst=10.0, cases=(PATCH.name,)),
    Target("the same and origin gradient", "patch_origin", "speedup", worst=10.0, cases=(PATCH.name,)),
    Target("patch gather, all shapes", "patch_forward", "speedup"),
    Target("patch gather, uint8", "patch_uint8", "speedup"),
    Target("patch gather, origin gradient", "patch_origin", "speedup"),
    Target("patch gather, both gradients", "patch_both", "speedup"),
    Target("peak memory, gated and 3D", "memory", "memory_ratio", worst=1.1, aim=1.0),
    Target("peak memory with what layers keep", "memory_layer", "memory_ratio"),
    Target("call overhead", "overhead", "overhead_us", worst=15.0, aim=5.0, cases=INFERENCE_CALLS),
    Target("call overhead, training", "overhead", "overhead_us", worst=15.0, aim=5.0, cases=TRAINING_CALLS),
    Target("call overhead of a layer", "overhead", "overhead_us", cases=LAYER_CALLS),
]


def keep_probability(updated: float, frames: int) -> float:
    """P(KEEP) for which |U_t| averages `updated` · C over a clip of `frames`, with P(REUSE) = 0.16 · P(KEEP).

    A channel is in U_t if it is kept at t or reused at t+1 (AdaFuse, Eq. 5), and the last frame of a clip has
    no successor, so the mean is k + 0.16 · k · (1 - k) · (frames - 1) / frames, solved for k here.
    """
    reused = REUSED_PER_KEPT * (frames - 1) / frames
    if updated >= 1 or reused == 0:
        return min(updated, 1.0)
    return (1 + reused - math.sqrt((1 + reused) ** 2 - 4 * reused * updated)) / (2 * reused)


def draw_policy(updated: float, batch: int, channels: int, frames: int, seed: int) -> Tensor:
    """An int64 policy [N, C], independent per frame and channel, whose |U_t| / C averages `updated`.

    KEEP, REUSE and SKIP come in the proportions that learned policies show (about 1 : 0.16 : rest).
    """
    keep = keep_probability(updated, frames)
    reuse = min(REUSED_PER_KEPT * keep, 1 - keep)
    return _draw(torch.tensor([keep, reuse, 1 - keep - reuse]), batch, channels, seed)


def draw_in_policy(skipped: float, batch: int, channels: int, seed: int) -> Tensor:
    """An int64 policy [N, C], independent per frame and channel, with a share `skipped` of SKIP."""
    keep = (1 - skipped) / (1 + REUSED_PER_KEPT)
    return _draw(torch.tensor([keep, 1 - skipped - keep, skipped]), batch, channels, seed)


def _draw(probabilities: Tensor, batch: int, channels: int, seed: int) -> Tensor:
    uniform = torch.rand(batch, channels, generator=torch.Generator().manual_seed(seed))
    bounds = probabilities.clamp(min=0).cumsum(0)[:2]
    return (uniform[..., None] >= bounds).sum(-1)


def updated_mask(
    policy: Tensor,  # [N, C]
    frames: int,
) -> Tensor:  # [N, C]
    """The channels U_t that are kept at t or reused at t+1 as a bool mask; clips are rows of `frames`."""
    clips = policy.unflatten(0, (-1, frames))
    updated = clips == KEEP
    updated[:, :-1] |= clips[:, 1:] == REUSE
    return updated.flatten(0, 1)


def floor(
    shape: ConvShape,
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    frames: int,
    batch: int,
) -> tuple[float, float]:
    """Floating-point operations and float32 bytes that a layer with these policies cannot do without.

    A multiply-add is two operations. The live input planes and the weights are read once and every output
    plane is written once, zeros included.
    """
    operations = 2.0 * shape.macs_per_channel * shape.out_channels * batch
    live = float((in_policy != SKIP).double().mean()) if in_policy is not None else 1.0
    if shape.groups > 1:
        live = work_ratio(shape, policy, in_policy, frames)
    planes_in = live * batch * shape.in_channels * shape.size**2
    planes_out = batch * shape.out_channels * shape.out_size**2
    weights = shape.out_channels * shape.in_channels // shape.groups * shape.kernel**2
    return operations * work_ratio(shape, policy, in_policy, frames), 4.0 * (planes_in + planes_out + weights)


def work_ratio(
    shape: ConvShape,
    policy: Tensor | None,  # [N, C_out]
    in_policy: Tensor | None,  # [N, C_in]
    frames: int,
) -> float:
    """The share of the dense multiply-adds that these policies leave to do."""
    updated = torch.ones(1, 1) if policy is None else updated_mask(policy, frames).double()
    live = torch.ones(1, 1) if in_policy is None else (in_policy != SKIP).double()
    if shape.groups > 1:
        return float((updated * live).mean())
    return float((updated.mean(1) * live.mean(1)).mean())

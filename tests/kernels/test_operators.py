"""The public operators on the GPU kernels: dispatch, autograd, compilation, and on a GPU also streams.

Without a GPU the kernels stand in for those of the CPU, so that all but the GPU itself is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import adakernels as ak
from adakernels.backends import ON_GPU
from adakernels.ops import (
    _library,
    dynamic_conv3d_reference,
    gated_conv2d_reference,
    patch_gather_reference,
    sliced_conv3d_reference,
    slim_conv_reference,
    temporal_fuse_reference,
)

HAS_GPU = torch.cuda.is_available()


def make_fuse(device: str) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Differentiable arguments, the operator and its reference."""
    input, policy = torch.randn(6, 8, 5, 4, device=device), torch.rand(6, 8, 3, device=device)
    return (
        [input.contiguous(memory_format=torch.channels_last), policy],
        lambda input, policy: ak.temporal_fuse(input, policy, frames=3),
        lambda input, policy: temporal_fuse_reference(input, policy, frames=3),
    )


def make_gather(device: str) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    input, origin = torch.randn(3, 3, 9, 8, device=device), torch.rand(3, 2, device=device) * 4
    mean, std = torch.rand(3, device=device), torch.rand(3, device=device) + 0.5
    return (
        [input, origin],
        lambda input, origin: ak.patch_gather(input, origin, 4, mean=mean, std=std),
        lambda input, origin: patch_gather_reference(input, origin, (4, 4), mean=mean, std=std),
    )


def make_conv(device: str) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    input, bias = torch.randn(6, 5, 7, 6, device=device), torch.randn(8, device=device)
    policy, in_policy = (torch.randint(0, 3, (6, channels), device=device) for channels in (8, 5))
    arguments = {"frames": 3, "stride": 2, "padding": 1, "in_policy": in_policy, "activation": "silu"}
    return (
        [
            input.contiguous(memory_format=torch.channels_last),
            torch.randn(8, 5, 3, 3, device=device) / 6,
            bias,
        ],
        lambda *leaves: ak.gated_conv2d(*leaves, policy, **arguments),
        lambda *leaves: gated_conv2d_reference(*leaves, policy, **arguments),
    )


def make_sliced(device: str) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    input, bias = torch.randn(7, 4, 4, 3, device=device), torch.randn(6, device=device)
    arguments = {
        "temporal": torch.tensor([True, False, True], device=device),
        "frame_offsets": torch.tensor([0, 3, 4, 7], dtype=torch.int32, device=device),
        "padding": (1, 0, 0),
        "activation": "silu",
    }
    return (
        [
            input.contiguous(memory_format=torch.channels_last),
            torch.randn(6, 4, 3, 1, 1, device=device) / 4,
            bias,
        ],
        lambda *leaves: ak.sliced_conv3d(*leaves, **arguments),
        lambda *leaves: sliced_conv3d_reference(*leaves, **arguments),
    )


def make_slim(device: str) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    input, bias = torch.randn(2, 5, 4, 3, device=device), torch.randn(6, device=device)
    arguments = {"out_channels": 4, "segments": ((0, 3), (6, 8)), "padding": 1, "activation": "relu6"}
    return (
        [
            input.contiguous(memory_format=torch.channels_last),
            torch.randn(6, 8, 3, 3, device=device) / 6,
            bias,
        ],
        lambda *leaves: ak.slim_conv2d(*leaves, **arguments),
        lambda *leaves: slim_conv_reference(*leaves, **arguments),
    )


def make_dynamic(device: str) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    leaves = [
        torch.randn(2, 3, 3, 3, 4, device=device).contiguous(memory_format=torch.channels_last_3d),
        torch.randn(4, 3, 3, 1, 1, device=device) / 3,
        torch.randn(4, device=device),
        torch.tensor([[0.0, 0.7], [0.2, 0.5]], device=device),
        torch.tensor([[0.4, 0.3], [0.0, 0.6]], device=device),
        torch.randn(1, 4, 3, 3, device=device) / 3,
        torch.randn(4, 3, 3, device=device) / 3,
    ]

    def arguments(temporal_weight: Tensor, channel_weight: Tensor) -> dict[str, Any]:
        filters = {"temporal_weight": temporal_weight, "channel_weight": channel_weight}
        return {**filters, "padding": (1, 0, 0), "activation": "silu"}

    return (
        leaves,
        lambda *leaves: ak.dynamic_conv3d(*leaves[:5], **arguments(*leaves[5:])),
        lambda *leaves: dynamic_conv3d_reference(*leaves[:5], **arguments(*leaves[5:])),
    )


OPERATORS = {
    "temporal_fuse": make_fuse,
    "patch_gather": make_gather,
    "gated_conv2d": make_conv,
    "sliced_conv3d": make_sliced,
    "slim_conv": make_slim,
    "dynamic_conv3d": make_dynamic,
}
ON_KERNELS = pytest.mark.parametrize(
    ("kernels", "make"),
    [pytest.param(name, make, id=f"{op}-{name}") for op, make in OPERATORS.items() for name in ON_GPU],
    indirect=["kernels"],
)


@pytest.fixture
def on_kernels(kernels: Any) -> Iterator[str]:
    """The operators run on the kernels; gives the device to run on."""
    if HAS_GPU:
        with ak.use_backend(kernels.name):
            yield "cuda"
        return
    stand_in = torch.library.Library("adakernels", "IMPL")
    for name in _library.gpu_operators:
        stand_in.impl(
            name, lambda *args, _name=name: getattr(kernels, _name)(*args), "CPU", allow_override=True
        )
    with ak.use_backend("cpu"):
        yield "cpu"
    stand_in._destroy()


@ON_KERNELS
def test_gradients(
    on_kernels: str, make: Callable[..., Any], without_waiting: Callable[..., Callable[..., Any]]
) -> None:
    leaves, op, reference = make(on_kernels)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    got = without_waiting(op)(*leaves)
    grad = torch.ones_like(got).expand_as(got)
    grads = without_waiting(torch.autograd.grad)(got, leaves, grad)
    want = reference(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for mine, exact in zip(grads, torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@ON_KERNELS
def test_compiled(on_kernels: str, make: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for _ in range(2):
        leaves, op, reference = make(on_kernels)
        compiled = torch.compile(op, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(*leaves), reference(*leaves), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", _library.gpu_operators)
def test_every_kernel_has_the_arguments_of_its_operator(name: str, triton_kernels: Any) -> None:
    schema = getattr(torch.ops.adakernels, name).default._schema
    compiled = getattr(torch.ops.adakernels_cuda, name).default._schema
    assert str(compiled).removeprefix("adakernels_cuda::") == str(schema).removeprefix("adakernels::")
    arguments = list(inspect.signature(getattr(triton_kernels, name)).parameters)
    assert arguments == [argument.name for argument in schema.arguments]


def test_entry_follows_the_requested_backend(
    cuda_kernels: Any, triton_kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = _library._gpu_entry("temporal_fuse")
    device = "cuda" if HAS_GPU else "cpu"
    input, policy = torch.randn(4, 3, 2, 2, device=device), torch.randint(0, 3, (4, 3), device=device)
    calls: list[str] = []
    real = triton_kernels.temporal_fuse
    monkeypatch.setattr(triton_kernels, "temporal_fuse", lambda *args: calls.append("triton") or real(*args))
    want = temporal_fuse_reference(input, policy, frames=2)
    for backend, triton_calls in (("cuda", 0), ("triton", 1)):
        with ak.use_backend(backend):
            assert torch.equal(entry(input, policy, 2), want)
        assert len(calls) == triton_calls


def recorded(call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Results of a CUDA graph, and what replays it. Without a GPU what replays it calls again."""
    if not HAS_GPU:
        results = call()

        def replay() -> None:
            for result, again in zip(results, call(), strict=True):
                result.copy_(again)

        return results, replay
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay


@ON_KERNELS
def test_graph_follows_its_arguments(on_kernels: str, make: Callable[..., Any]) -> None:
    leaves, op, reference = make(on_kernels)
    (output,), replay = recorded(lambda: (op(*leaves),))
    for leaf in leaves:
        leaf.copy_(torch.rand_like(leaf))
    replay()
    torch.testing.assert_close(output, reference(*leaves), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 6])
def test_graph_follows_policies_changed_in_place(on_kernels: str, groups: int) -> None:
    shapes = (6, 6, 7, 5), (12, 6 // groups, 3, 3), (12,)
    leaves = [torch.randn(shape, device=on_kernels).requires_grad_() for shape in shapes]
    policy, in_policy = (torch.zeros(6, width, dtype=torch.int64, device=on_kernels) for width in (12, 6))
    arguments = {"frames": 3, "padding": 1, "groups": groups, "in_policy": in_policy, "activation": "relu"}

    def run(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        output = op(*leaves, policy, **arguments)
        return output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))

    results, replay = recorded(lambda: run(ak.gated_conv2d))
    for _ in range(3):
        for values in (policy, in_policy):
            values.copy_(torch.randint(0, 3, values.shape))
        replay()
        for mine, exact in zip(results, run(gated_conv2d_reference), strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cuda", "triton"] if HAS_GPU else ["reference", "cpu"])
def test_debugging_looks_at_values(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAKERNELS_DEBUG", "1")
    device = "cuda" if HAS_GPU else "cpu"
    with ak.use_backend(backend):
        with pytest.raises(ValueError, match=r"temporal_fuse: expected policy values .*, got 3"):
            ak.temporal_fuse(
                torch.zeros(1, 1, 1, 1, device=device), torch.tensor([[3]], device=device), frames=1
            )
        with pytest.raises(
            ValueError, match=r"patch_gather: expected frame_index values from 0 to N - 1 = 0"
        ):
            ak.patch_gather(
                torch.zeros(1, 1, 2, 2, device=device),
                torch.zeros(1, 2, device=device),
                1,
                frame_index=torch.tensor([1], device=device),
            )

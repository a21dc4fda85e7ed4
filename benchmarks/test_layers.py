"""Gated layers against the dense and the masked layer."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import adakernels as ak
from benchmarks.cases import LayerCase, floor
from benchmarks.layers import Layer
from benchmarks.measure import FORMATS, compare, upstream_gradient


def describe(case: LayerCase, layer: Layer) -> dict[str, Any]:
    """What identifies a layer record, and the operations and bytes it cannot do without."""
    operations, moved = floor(case.shape, layer.policy, layer.in_policy, layer.frames, case.batch)
    return {
        "family": case.family,
        "case": case.name,
        "shape": asdict(case.shape),
        "backend": layer.backend(),
        "batch": case.batch,
        "updated": case.updated,
        "skipped": case.skipped,
        "operations": operations,
        "bytes": moved,
    }


def test_layer(benchmark: Any, layer_case: LayerCase, quick: bool) -> None:
    plain = Layer(layer_case)
    layers = {name: plain.in_format(name) for name in FORMATS}
    with torch.inference_mode():
        record = compare(
            benchmark,
            ours={name: layer.ours for name, layer in layers.items()},
            dense={name: layer.dense for name, layer in layers.items()},
            masked={name: layer.masked for name, layer in layers.items()},
            expected=plain.reference(),
            work=plain.work,
            quick=quick,
        )
    benchmark.group = layer_case.family
    benchmark.extra_info.update(describe(layer_case, plain), **record)


def test_backward(benchmark: Any, backward_case: LayerCase, quick: bool) -> None:
    """Forward and backward to input, weight and bias; the result that is checked is the three gradients."""
    plain = Layer(backward_case)
    layers = {name: plain.in_format(name) for name in FORMATS}
    for layer in layers.values():
        for leaf in (layer.input, layer.weight, layer.bias):
            leaf.requires_grad_()
    output = plain.reference()
    upstream = upstream_gradient(output, backward_case.seed)
    upstreams = {name: upstream.contiguous(memory_format=FORMATS[name]) for name in FORMATS}

    def gradients(name: str, form: str) -> tuple[torch.Tensor, ...]:
        layer = layers[name]
        leaves = (layer.input, layer.weight, layer.bias)
        return torch.autograd.grad(getattr(layer, form)(), leaves, upstreams[name])

    with ak.use_backend("reference"):
        expected = gradients("contiguous", "operator")
    record = compare(
        benchmark,
        ours={name: partial(gradients, name, "operator") for name in FORMATS},
        dense={name: partial(gradients, name, "dense") for name in FORMATS},
        masked={name: partial(gradients, name, "masked") for name in FORMATS},
        expected=expected,
        work=plain.work,
        quick=quick,
        tolerance=1e-3,
    )
    benchmark.group = backward_case.family
    benchmark.extra_info.update(describe(backward_case, plain), **record)

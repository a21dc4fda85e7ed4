"""How a backend is chosen, forced and explained."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import adakernels as ak
from adakernels import _extension, backends


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(2, 4, 5, 5, dtype=dtype),
        torch.randn(8, 4, 3, 3, dtype=dtype),
        torch.randn(8, dtype=dtype),
        torch.randint(0, 3, (2, 8)),
    )


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )


def test_available_backends() -> None:
    reasons = ak.available_backends()
    assert list(reasons) == ["reference", "cpu", "triton", "cuda"]
    assert reasons["reference"] == ""
    if not torch.cuda.is_available():
        assert reasons["triton"] == reasons["cuda"] == "torch finds no NVIDIA GPU"
    assert (reasons["cpu"] == "") == _extension.has_cpu


def test_use_backend_nests_and_survives_errors() -> None:
    outer = backends.requested_backend()
    with ak.use_backend("reference"):
        with pytest.raises(KeyError), ak.use_backend("auto"):
            assert backends.requested_backend() == "auto"
            raise KeyError
        assert backends.requested_backend() == "reference"
    assert backends.requested_backend() == outer


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match="use_backend: expected one of auto, reference, cpu, triton, cuda, got 'cudnn'"
    ):
        ak.use_backend("cudnn")
    done = run("import adakernels", ADAKERNELS_BACKEND="gpu")
    assert "ADAKERNELS_BACKEND: expected one of auto, reference, cpu, triton, cuda, got 'gpu'" in done.stderr


def test_environment_variable() -> None:
    code = "from adakernels import backends; print(backends.requested_backend())"
    assert run(code, ADAKERNELS_BACKEND="reference").stdout.strip() == "reference"


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_forced_backend_that_cannot_run(name: str) -> None:
    input, weight, bias, policy = tensors()
    with ak.use_backend(name):
        cannot = f"backend '{name}' cannot run this call"
        with pytest.raises(ValueError, match=f"gated_conv2d: {cannot}: the tensors are on 'cpu'"):
            ak.gated_conv2d(input, weight, bias, policy, padding=1)
        with pytest.raises(ValueError, match=f"temporal_fuse: {cannot}: the tensors are on 'cpu'"):
            ak.temporal_fuse(input, policy[:, :4], frames=1)


@pytest.mark.usefixtures("cpu_backend")
def test_what_the_cpu_kernels_refuse() -> None:
    input, weight, bias, policy = tensors(torch.float64)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this call: .*not float64"):
        ak.gated_conv2d(input, weight, bias, policy)
    input, weight, bias, policy = tensors()
    with pytest.raises(ValueError, match="it takes groups = 1 or C_in = 4, not 2"):
        ak.gated_conv2d(input, weight[:, :2], bias, policy, groups=2)
    with ak.use_backend("auto"):
        ak.gated_conv2d(input, weight[:, :2], bias, policy, groups=2)


@pytest.mark.usefixtures("cpu_backend")
def test_explain() -> None:
    input, weight, bias, policy = tensors()
    with ak.use_backend("auto"):
        found = ak.explain(ak.gated_conv2d, input, weight, bias, policy, padding=1)
        assert found.backend == "cpu"
        assert str(found).splitlines() == [
            "gated_conv2d: runs on 'cpu'",
            "  not cuda: the tensors are on 'cpu'",
            "  not triton: the tensors are on 'cpu'",
            "  not reference: 'cpu' comes first",
        ]
        grouped = ak.explain(ak.gated_conv2d, input, weight[:, :2], bias, policy, groups=2)
        assert grouped.backend == "reference"
        assert grouped.reasons["cpu"] == "it takes groups = 1 or C_in = 4, not 2"
        plain = ak.explain(ak.gated_conv2d, input, weight, bias)
        assert plain.backend == "reference"
        assert plain.reasons["cpu"] == "this call needs no kernel, torch's own operators do it"
    with ak.use_backend("reference"):
        found = ak.explain(ak.temporal_fuse, input, policy[:, :4], frames=2)
        assert found.backend == "reference" and found.reasons["cpu"] == "backend 'reference' is asked for"
    with ak.use_backend("cuda"):
        found = ak.explain(ak.temporal_fuse, input, policy[:, :4], frames=2)
        assert found.backend is None and str(found).startswith("temporal_fuse: raises ValueError")


def test_explain_checks_its_arguments() -> None:
    input, weight, bias, policy = tensors()
    with pytest.raises(ValueError, match="explain: expected an operator of adakernels, got <built-in"):
        ak.explain(torch.conv2d, input, weight)
    with pytest.raises(ValueError, match=r"expected policy of shape \[N, C_out\] = \[2, 8\], got \[2, 4\]"):
        ak.explain(ak.gated_conv2d, input, weight, bias, policy[:, :4])


def test_reasons_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    input, weight, bias, policy = tensors(torch.float64)
    with caplog.at_level(logging.DEBUG, logger="adakernels"), ak.use_backend("auto"):
        ak.gated_conv2d(input[..., :4], weight, bias, policy)
    assert "gated_conv2d: backend 'cuda' cannot run this call: the tensors are on 'cpu'" in caplog.text


def test_import_is_lean() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import adakernels; new = set(sys.modules) - before;"
        "assert not torch.cuda.is_initialized();"
        "optional = ('triton', 'torchvision', 'matplotlib', 'skimage', 'torch._dynamo', 'torch._inductor');"
        "print([name for name in new if name.startswith(optional)])"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_forced_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    input, weight, bias, policy = tensors()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(policy: torch.Tensor) -> torch.Tensor:
        with ak.use_backend("reference"):
            return ak.gated_conv2d(input, weight, bias, policy)

    outer = backends.requested_backend()
    torch.testing.assert_close(
        call(policy), ak.gated_conv2d(input, weight, bias, policy), rtol=1e-4, atol=1e-4
    )
    assert backends.requested_backend() == outer


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU on which Triton was the fastest for one class of shapes of gated_conv2d."""
    classes = {"16 bits, 3x3, small map": "triton", "16 bits, 3x3, large map": "cuda"}
    file = tmp_path / "nvidia-test-1.json"
    file.write_text(json.dumps({"fastest": {"gated_conv2d": classes}}))
    monkeypatch.setattr(backends, "MEASURED", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test (1)")
    monkeypatch.setattr(_extension, "has_cuda", True)
    backends._fastest.cache_clear()
    yield
    backends._fastest.cache_clear()


@pytest.mark.usefixtures("measured")
def test_measurements_decide() -> None:
    def order(op: str, dtype: torch.dtype, size: int) -> tuple[list[str], str, str]:
        input = ((8, 64, size, size), dtype, torch.device("cuda", 0))
        predicates = dict.fromkeys(("cuda", "triton", "cpu"), lambda *, raise_error=False: True)
        found = backends.in_order(op, predicates, input, (64, 64, 3, 3), 1)
        return list(found), found.why, backends.gpu_backend(op, input, (64, 64, 3, 3), 1)

    measured = "was measured to be faster on NVIDIA Test (1)"
    default = ["cuda", "triton", "cpu"]
    with ak.use_backend("auto"):
        assert order("gated_conv2d", torch.float16, 14) == (["triton", "cuda", "cpu"], measured, "triton")
        assert order("gated_conv2d", torch.bfloat16, 56) == (default, measured, "cuda")
        # Nothing was measured for these.
        assert order("gated_conv2d", torch.float32, 14) == (default, "comes first", "cuda")
        assert order("temporal_fuse", torch.float16, 14) == (default, "comes first", "cuda")
    with ak.use_backend("cuda"):
        assert order("gated_conv2d", torch.float16, 14)[2] == "cuda"


@pytest.mark.usefixtures("measured")
def test_explain_tells_what_measurements_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_not_this_gpu", lambda index: "")
    with ak.use_backend("auto"), FakeTensorMode():
        tensors = [
            torch.empty(size, dtype=torch.float16, device="cuda")
            for size in ((8, 64, 14, 14), (64, 64, 3, 3))
        ]
        policy = torch.empty(8, 64, dtype=torch.int64, device="cuda")
        found = ak.explain(ak.gated_conv2d, *tensors, None, policy, padding=1)
    assert found.backend == "triton"
    assert found.reasons["cuda"] == "'triton' was measured to be faster on NVIDIA Test (1)"
    assert found.reasons["reference"] == "'triton' comes first"


def test_classes_of_shapes() -> None:
    def name(*shapes: tuple[int, ...], groups: int = 1) -> str:
        return backends.shape_class(torch.float32, *shapes, *([groups] if len(shapes) > 1 else []))

    assert name((8, 4, 5, 5)) == "32 bits"
    assert name((8, 4, 16, 16), (4, 4, 1, 1)) == "32 bits, 1x1, small map"
    assert name((8, 4, 2, 16, 17), (4, 1, 3, 1, 1), groups=4) == "32 bits, depthwise, 3x1x1, large map"
    assert backends.device_file("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090.json"

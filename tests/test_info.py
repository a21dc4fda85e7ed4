"""`python -m adakernels info`, also where nothing or something unusable was built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adakernels
from adakernels import __main__, _extension, backends, info

PACKAGE = Path(adakernels.__file__).parent


def run_info(folder: Path, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-m", "adakernels", "info"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def uncompiled(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no compiled file."""
    leave_out = shutil.ignore_patterns("*.so", "__pycache__", _extension._NOTE.name)
    shutil.copytree(PACKAGE, tmp_path / "adakernels", ignore=leave_out)
    # An editable installation would find the source tree's _C for this copy.
    (tmp_path / "adakernels" / "_C.py").write_text("raise ImportError('_C was not built')")
    return tmp_path


def test_info_tells_versions_build_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert str(PACKAGE) in text
    for name, reason in backends.available_backends().items():
        line = next(line for line in text.split("backends\n")[1].splitlines() if line.split()[0] == name)
        assert line.endswith(f"cannot run: {reason}" if reason else "can run")


def test_info_tells_what_was_built() -> None:
    _C = pytest.importorskip("adakernels._C")
    built = info.build()
    made = _C.build_info()
    assert made["cpu_isas"][0] == "portable"
    assert all(re.fullmatch(r"\d+[af]?", arch) for arch in made["cuda_archs"])
    assert built["compiler"] == made["compiler"]
    assert (built["CUDA operators"] == "loaded") == _extension.has_cuda
    assert _extension.has_cuda or built["CUDA operators"] == _extension.why_not_cuda
    assert built["CUDA kernels"] == (", ".join(f"sm_{arch}" for arch in made["cuda_archs"]) or "none")
    assert _C.best_isa() in made["cpu_isas"]


def test_info_without_compiled_extension(uncompiled: Path) -> None:
    text = run_info(uncompiled)
    assert "adakernels was installed without native code\n" in text
    assert "none: _C was not built\n" in text
    assert any(line.split()[:3] == ["cpu", "cannot", "run:"] for line in text.splitlines())
    assert any(line.split() == ["reference", "can", "run"] for line in text.splitlines())


def test_info_says_why_nothing_was_built(uncompiled: Path) -> None:
    (uncompiled / "adakernels" / _extension._NOTE.name).write_text("there is no C++ compiler\n")
    assert "adakernels was installed without native code: there is no C++ compiler" in run_info(uncompiled)


def test_info_with_a_library_that_does_not_load(uncompiled: Path) -> None:
    (uncompiled / "adakernels" / "_ops.so").write_bytes(b"not a library")
    assert f"_ops.so does not load with torch {torch.__version__}: " in run_info(uncompiled)


@pytest.mark.skipif(not _extension.has_cpu, reason="needs the compiled extension")
def test_load_may_be_repeated() -> None:
    _extension.load()
    assert _extension.has_cpu
    assert _extension.why_not == ""


def best_isa(limit: str) -> subprocess.CompletedProcess[str]:
    """Ask a new process, because the environment is read only once; it does without torch."""
    _C = pytest.importorskip("adakernels._C")
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.best_isa(), "torch" in sys.modules)
"""
    env = {**os.environ, "ADAKERNELS_CPU_ISA": limit}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("limit", ["portable", "avx2", "avx512"])
def test_isa_is_capped_by_the_environment(limit: str) -> None:
    _C = pytest.importorskip("adakernels._C")
    expected = min(limit, _C.supported_isa(), key=["portable", "avx2", "avx512"].index)
    assert best_isa(limit).stdout.split() == [expected, "False"]


def test_unknown_isa_is_an_error() -> None:
    assert (
        "ValueError: ADAKERNELS_CPU_ISA must be portable, avx2 or avx512, got 'sse9'"
        in best_isa("sse9").stderr
    )


def test_info_tells_the_isa_and_why() -> None:
    pytest.importorskip("adakernels._C")
    text = run_info(PACKAGE.parent, ADAKERNELS_CPU_ISA="portable")
    assert "portable (ADAKERNELS_CPU_ISA=portable)\n" in text


@pytest.mark.parametrize("arguments", [[], ["train"], ["info", "--verbose"]])
def test_bad_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        __main__.main(arguments)
    assert error.value.code == 2
    assert "usage: adakernels" in capsys.readouterr().err


def test_bench_is_given_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from adakernels import bench

    seen: list[list[str]] = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.append(argv) or 3)
    assert __main__.main(["bench", "--quick", "-h"]) == 3
    assert seen == [["--quick", "-h"]]

"""What is installed, how it is built and what importing it costs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from adakernels import _extension

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("matplotlib", "pybind11", "pytest", "skimage", "torchvision", "triton")


CI = os.environ.get("CI") == "true"


def installed(package: str, major: int = 0) -> bool:
    try:
        return int(metadata.version(package).split(".")[0]) >= major
    except metadata.PackageNotFoundError:
        return False


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_import_is_lean() -> None:
    """Nothing optional is imported, no compiler is loaded and CUDA is left alone."""
    # torch's FLOP counter, where the operators' formulas are registered, imports triton itself.
    code = f"""
import sys, torch, torch.utils.flop_counter
before = set(sys.modules)
import adakernels
new = set(sys.modules) - before
print(sorted({{name.split(".")[0] for name in new}} & set({OPTIONAL!r})))
print(sorted(name for name in new if name.startswith(("torch._inductor", "torch.utils.cpp_extension"))))
print(torch.cuda.is_initialized())
"""
    result = run(sys.executable, "-c", code)
    assert result.stdout.splitlines() == ["[]", "[]", "False"], result.stderr


@pytest.mark.skipif(not installed("adakernels") and not CI, reason="the package is not installed")
def test_import_works_from_another_directory(tmp_path: Path) -> None:
    result = run(sys.executable, "-c", "import adakernels; print(adakernels.__file__)", cwd=tmp_path)
    assert Path(result.stdout.strip()) == ROOT / "adakernels" / "__init__.py", result.stderr


def test_build_without_compiler_goes_on_and_says_so(tmp_path: Path) -> None:
    result = run(sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "building WITHOUT NATIVE CODE: there is no C++ compiler" in result.stderr
    assert [path.name for path in (tmp_path / "adakernels").iterdir()] == [_extension._NOTE.name]


@pytest.mark.skipif(not _extension.has_cpu, reason="needs what the compiled extension needs")
@pytest.mark.skipif(
    not CI and not (installed("pip") and installed("setuptools", 77)), reason="needs pip and setuptools 77"
)
def test_wheel_contents(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    result = run(*pip, "-w", str(tmp_path), str(ROOT))
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = next(name for name in names if name.endswith("METADATA"))
        requirements = [line for line in archive.read(about).decode().splitlines() if "Requires-Dist" in line]
    assert {"adakernels/__init__.py", "adakernels/_ops.so", "adakernels/py.typed"} <= names
    assert "adakernels/triton/configs/default.json" in names
    assert any(name.startswith("adakernels/_C.") and name.endswith(".so") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"adakernels"}
    assert [line for line in requirements if "extra ==" not in line] == ["Requires-Dist: torch>=2.10"]


def cmake() -> str:
    """The one that the native build takes: that of this environment, else the system's."""
    found = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    return found or pytest.skip("needs cmake")


def configure(folder: Path, *definitions: str, **environment: str) -> subprocess.CompletedProcess[str]:
    torch_folder = Path(torch.__file__).parent
    definitions = (
        f"-DADAKERNELS_TORCH_DIR={torch_folder}",
        f"-DADAKERNELS_PYBIND11_INCLUDE_DIR={torch_folder / 'include'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *definitions,
    )
    return run(cmake(), "-S", str(ROOT), "-B", str(folder), *definitions, **environment)


@pytest.mark.parametrize(
    ("value", "message"),
    [("on", "CMake finds no CUDA compiler"), ("yes", "must be auto, on or off, got 'yes'")],
)
def test_cuda_option_is_checked(value: str, message: str, tmp_path: Path) -> None:
    result = configure(tmp_path, f"-DADAKERNELS_CUDA={value}", CUDACXX="no-such-nvcc")
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_says_at_once_that_there_is_no_gpu() -> None:
    result = run(str(ROOT / ".ci" / "gpu"), sys.executable)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"make gpu: torch .*(has no CUDA|finds no NVIDIA GPU)\n", result.stderr)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_cuda_library_builds_where_torch_has_no_cuda(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DADAKERNELS_CUDA=on", "-DADAKERNELS_CUDA_ARCHS=80")
    assert result.returncode == 0, result.stderr
    result = run(cmake(), "--build", str(tmp_path), "--parallel", "2", "--target", "_cuda_ops")
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "adakernels" / "_cuda_ops.so").exists()

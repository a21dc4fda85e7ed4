"""Drives the native build of CMakeLists.txt.

torch is no build requirement, because an isolated build would then fetch a second one. It is looked for in
the environment that runs the build, also from inside pip's isolated environment, whose interpreter is the one
that the package is installed for. Where something that the native build needs is missing, the package is
built without native code, and `python -m adakernels info` tells why.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
WHY_NOT_NATIVE = "_why_not_native.txt"

FIND_TORCH = """
import importlib.util, json, pathlib
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    folder = pathlib.Path(spec.origin).parent
    version = {}
    exec((folder / "version.py").read_text(), version)
    found = {"folder": str(folder), "version": version["__version__"], "cuda": version["cuda"] or ""}
    print(json.dumps(found))
"""


def find_torch() -> dict[str, str] | None:
    """Folder, version and CUDA version of the torch that the package will run with, not imported."""
    env = dict(os.environ)
    # pip's isolated environment is nothing but these variables; beneath them is the user's own environment.
    if "pip-build-env" in env.get("PYTHONPATH", ""):
        env.pop("PYTHONPATH")
        env.pop("PYTHONNOUSERSITE", None)
    command = [sys.executable, "-c", FIND_TORCH]
    output = subprocess.run(command, env=env, cwd="/", stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(output) if output else None


def find_tool(name: str, folder_attribute: str) -> str | None:
    """Path of a program that a PyPI package of the same name brings, or else of the system's."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        folder = None
    return shutil.which(name, path=folder) or shutil.which(name)


def find_compiler() -> str | None:
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


class NativeBuildImpossible(Exception):
    """Something that the native build needs is not on this machine."""


def run_cmake() -> Path:
    """Builds all targets and returns the folder that they lie in. Raises NativeBuildImpossible."""
    torch = find_torch()
    if torch is None:
        raise NativeBuildImpossible(f"{sys.executable} had no torch; it has to be there before adakernels")
    if tuple(int(part) for part in torch["version"].split(".")[:2]) < OLDEST_TORCH:
        raise NativeBuildImpossible(f"torch {torch['version']} is too old; 2.10 or newer is needed")
    if find_compiler() is None:
        raise NativeBuildImpossible("there is no C++ compiler; install g++ or clang++ (C++20), or set CXX")
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    ninja = find_tool("ninja", "BIN_DIR")
    if cmake is None or ninja is None:
        raise NativeBuildImpossible("cmake or ninja is missing; pip install cmake ninja")
    try:
        pybind11 = importlib.import_module("pybind11").get_include()
    except ImportError:
        pybind11 = str(Path(torch["folder"], "include"))  # torch's own copy
    build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    definitions = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "ADAKERNELS_TORCH_DIR": torch["folder"],
        "ADAKERNELS_TORCH_VERSION": torch["version"],
        "ADAKERNELS_TORCH_CUDA": torch["cuda"],
        "ADAKERNELS_PYBIND11_INCLUDE_DIR": pybind11,
        "ADAKERNELS_CUDA": os.environ.get("ADAKERNELS_CUDA", "auto"),
        "ADAKERNELS_CUDA_ARCHS": os.environ.get("ADAKERNELS_CUDA_ARCHS", "80;90a"),
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    for command in (
        configure + [f"-D{name}={value}" for name, value in definitions.items()],
        [cmake, "--build", str(build)],
    ):
        if subprocess.run(command).returncode != 0:
            raise CompileError("CMake failed; the reason is in its output above")
    return build / "adakernels"


class CMakeBuild(build_ext):
    """Builds every extension with one run of CMake and ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        # The operators do not use Python's ABI, so their file does not carry its tag.
        if fullname.endswith("_ops"):
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        targets = [(extension, Path(self.get_ext_fullpath(extension.name))) for extension in self.extensions]
        note = Path(self.build_lib, "adakernels", WHY_NOT_NATIVE)
        for stale in (note, *(target for _, target in targets)):
            stale.unlink(missing_ok=True)
        try:
            built = run_cmake()
        except NativeBuildImpossible as reason:
            print(f"adakernels: building WITHOUT NATIVE CODE: {reason}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{reason}\n")
            self.extensions = []
            return
        self.extensions = [extension for extension, target in targets if (built / target.name).exists()]
        for _, target in targets:
            if (built / target.name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(built / target.name, target)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        note = Path("adakernels", WHY_NOT_NATIVE)
        if self.extensions:
            note.unlink(missing_ok=True)
        else:
            shutil.copy2(Path(self.build_lib) / note, note)


native_sources = [path for path in ROOT.glob("csrc/**/*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}]
sources = ["CMakeLists.txt", *sorted(str(path.relative_to(ROOT)) for path in native_sources)]
setup(
    ext_modules=[Extension(f"adakernels.{name}", sources=sources) for name in ("_C", "_ops", "_cuda_ops")],
    cmdclass={"build_ext": CMakeBuild},
)

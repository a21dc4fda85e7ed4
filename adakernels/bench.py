"""`python -m adakernels bench`: runs the benchmark suites of a source checkout, reports what they show."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REQUIREMENTS = {
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "matplotlib": "matplotlib",
    "skimage": "scikit-image",
}


class BenchError(Exception):
    """The benchmarks cannot run here, for the reason given."""


def checkout() -> Path:
    """The root of the source checkout: the one this package is imported from, else the current directory.

    Raises:
        BenchError: if neither holds the benchmark suites.
    """
    places = [Path(__file__).resolve().parents[1], Path.cwd()]
    for place in places:
        if (place / "benchmarks" / "cases.py").is_file() and (place / "adakernels" / "bench.py").is_file():
            return place
    raise BenchError(
        "the benchmark suites are part of the source checkout, not of the installed package; there is no "
        f"benchmarks/cases.py in {' or '.join(str(place) for place in dict.fromkeys(places))}"
    )


def check_requirements() -> None:
    """Raise BenchError naming every package that is missing."""
    missing = [name for module, name in REQUIREMENTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BenchError(f"the benchmarks need {', '.join(missing)}: pip install {' '.join(missing)}")


class Collection:
    """A pytest plugin that counts the cases of each suite, and keeps what could not be collected."""

    def __init__(self) -> None:
        self.cases: Counter[Path] = Counter()
        self.failures: list[tuple[str, str]] = []

    def pytest_collection_finish(self, session: Any) -> None:
        self.cases.update(item.path for item in session.items)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append((report.nodeid, _reason(report)))

    def suites(self) -> list[Path]:
        """Layers and models come first."""
        first = ("test_layers.py", "test_models.py")
        return sorted(self.cases, key=lambda file: (*(file.name != name for name in first), file.name))


class Progress:
    """A pytest plugin that shows how far the suites are and keeps what failed."""

    WIDTH = 30

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.failures: list[tuple[str, str]] = []
        self.skipped: list[tuple[str, str]] = []
        self.start = time.monotonic()
        self.shown = 0.0
        self.live = sys.stderr.isatty()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.show(nodeid.partition("::")[2])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append((report.nodeid, _reason(report)))
        elif report.skipped:
            self.skipped.append((report.nodeid, str(report.longrepr[2])))
        if report.when == "teardown":
            self.done += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append((report.nodeid, _reason(report)))

    def show(self, name: str, last: bool = False) -> None:
        """Draw the bar; without a terminal, print a line for every tenth part instead."""
        share = self.done / self.total if self.total else 0.0
        elapsed = time.monotonic() - self.start
        left = f", {elapsed / share - elapsed:.0f} s left" if share and not last else f", {elapsed:.0f} s"
        if self.live:
            bar = "█" * round(share * self.WIDTH)
            line = f"[{bar:<{self.WIDTH}}] {self.done}/{self.total}{left}  {name}"
            sys.stderr.write(f"\r\x1b[2K{line[:110]}" + ("\n" if last else ""))
            sys.stderr.flush()
        elif share >= self.shown + 0.1 or (last and share > self.shown):
            self.shown = share
            print(f"{self.done}/{self.total}{left}", file=sys.stderr, flush=True)


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext if crash is None else f"{crash.path}:{crash.lineno}: {crash.message}"
    lines = text.splitlines()
    return "\n".join([line[:200] for line in lines[:6]] + (["…"] if len(lines) > 6 else []))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adakernels bench",
        description="Measure the package against dense and masked PyTorch on this machine.",
    )
    parser.add_argument("--quick", action="store_true", help="a small part of every suite, about a minute")
    parser.add_argument(
        "-k", "--filter", metavar="EXPRESSION", help="only the cases that match, as pytest's -k"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: what PyTorch takes)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for results.json and results.png (default: benchmarks/results/<device>, or "
        "build/bench/<device> when only a part is run)",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="JSON",
        help="measure nothing: write the tables of this result file into the README and the kernel pages",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (default: the process's) and return its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        root = checkout()
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        if arguments.readme:
            return rewrite(root, arguments.readme.resolve())
        check_requirements()
        if arguments.threads is not None and arguments.threads < 1:
            raise BenchError(f"expected --threads to be at least 1, got {arguments.threads}")
        return measure(root, arguments)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def rewrite(root: Path, file: Path) -> int:
    """Write the tables of `file` into the pages under `root`."""
    from benchmarks import report

    try:
        pages = report.rewrite_pages(root, file)
    except (OSError, ValueError) as error:
        raise BenchError(str(error)) from error
    for page in pages:
        print(f"rewrote {page.relative_to(root)}")
    return 0


def in_own_process(root: Path, options: list[str], progress: Progress) -> Progress:
    """Run a suite, `options[0]`, so that it finds neither the heap nor the caches of those before it.

    Returns what has become of `progress`.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_run, root, options, progress).result()
        except BrokenProcessPool:
            progress.failures.append((options[0], "its process died"))
            return progress


def _run(root: Path, options: list[str], progress: Progress) -> Progress:
    import pytest

    os.chdir(root)
    status = pytest.main(options, plugins=[progress])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        progress.failures.append((options[0], f"pytest ended with {status!r}"))
    return progress


def measure(root: Path, arguments: argparse.Namespace) -> int:
    """Run the suites, print the table and write the result file and its plot."""
    import pytest
    import torch

    from adakernels import backends
    from benchmarks import report

    reason = backends.available_backends()["cpu"]
    if reason:
        print(f"warning: what is measured is the reference: {reason}", file=sys.stderr)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads()
    machine = report.describe_machine(threads)
    if (machine["busy_cores"] or 0) > 0.2:
        busy = f"{machine['busy_cores']:.1f} of {machine['cores']} cores"
        print(f"warning: other programs keep {busy} busy, times will be off", file=sys.stderr)
    partial = arguments.quick or arguments.filter is not None
    slug = report.device_slug(machine["device"], threads)
    base = root / "build" / "bench" if partial else root / "benchmarks" / "results"
    folder = arguments.output.resolve() if arguments.output else base / slug

    options = [
        f"--rootdir={root}",
        f"--confcutdir={root / 'benchmarks'}",
        f"--threads={threads}",
        "--benchmark-quiet",
        "--override-ini=addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:terminal",
    ]
    options += ["--quick"] if arguments.quick else []
    options += ["-k", arguments.filter] if arguments.filter is not None else []
    collection = Collection()
    status = pytest.main([str(root / "benchmarks"), *options, "--collect-only"], plugins=[collection])
    progress = Progress(collection.cases.total())
    measured: dict[str, Any] = {"benchmarks": []}
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.json"
        for suite in collection.suites():
            name = suite.relative_to(root).as_posix()
            progress = in_own_process(root, [name, *options, f"--benchmark-json={raw}"], progress)
            if raw.exists() and raw.stat().st_size:
                one = json.loads(raw.read_text())
                measured = one | {"benchmarks": measured["benchmarks"] + one["benchmarks"]}
                raw.unlink()

    progress.show("", last=True)
    failures = collection.failures + progress.failures
    for name, text in failures:
        print(f"\n{name} has no speed, it failed: {text}", file=sys.stderr)
    for name, reason in progress.skipped:
        print(f"{name} skipped: {reason}", file=sys.stderr)
    if not measured["benchmarks"]:
        nothing_chosen = status == pytest.ExitCode.NO_TESTS_COLLECTED
        raise BenchError("no case matches the filter" if nothing_chosen else "nothing was measured")

    settings = {
        "quick": arguments.quick,
        "filter": arguments.filter,
        "failed": [name for name, _ in failures],
    }
    results = report.collect(measured, machine, settings)
    file, picture = report.save(results, folder)
    print(f"\n{report.describe(results)}\n\n{report.render_text(report.summarise(results['records']))}\n")
    print(f"wrote {file}\n      {picture}")
    return 1 if failures else 0

"""From pytest-benchmark's JSON to the result file, and from that to the table, the plot and the pages."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CLIP, SKIPPED, TARGETS, UPDATED, Target
from benchmarks.measure import geometric_mean, medians

SCHEMA = 1
HEADER = ("family", "cases", "measured", "time ÷ dense", "time ÷ masked", "target", "")
FAMILY_TITLES = {
    "gated_3x3": "gated 3x3",
    "gated_1x1": "gated 1x1",
    "gated_input": "gated input",
    "gated_depthwise": "depthwise",
    "gated_backward": "with backward",
    "model": "model",
    "sliced_conv3d": "sliced conv3d",
    "sliced_backward": "sliced, with backward",
    "ada3d_model": "Ada3D model",
    "dynamic_conv3d": "dynamic conv3d",
    "dynamic_x3d": "dynamic conv3d, X3D",
    "vared2_model": "VA-RED² model",
}
SLICED = ("sliced_conv3d", "sliced_backward", "ada3d_model")
DYNAMIC = ("dynamic_conv3d", "dynamic_x3d", "vared2_model")
PATCH_TITLES = {
    "patch_forward": "forward",
    "patch_uint8": "forward, uint8",
    "patch_origin": "forward + origin",
    "patch_both": "forward + both",
}

Record = Mapping[str, Any]
Results = Mapping[str, Any]


def cpu_name() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def device_slug(device: str, threads: int) -> str:
    """Folder name of a device's results, such as ``amd-epyc-7r13-2-threads``."""
    words = re.sub(r"\(r\)|\(tm\)|\bcpu\b|\bprocessor\b|@.*$", " ", device.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return f"{slug}-{threads}-thread" + ("s" if threads != 1 else "")


def busy_cores(seconds: float = 0.5) -> float | None:
    """How many cores other programs keep busy while this one sleeps; None where /proc/stat is missing."""

    def read() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    if not Path("/proc/stat").exists():
        return None
    total, idle = read()
    time.sleep(seconds)
    total_after, idle_after = read()
    share = 1 - (idle_after - idle) / max(1, total_after - total)
    return share * (os.cpu_count() or 1)


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, threads, and the peaks of dense convolution (GFLOP/s) and copy (GB/s, read + write)."""
    import torch

    def best(call: Any, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # Large enough for the vendor's best kernel, which a matrix product need not have on every processor.
    frames, weight = torch.randn(16, 512, 14, 14), torch.randn(512, 512, 3, 3)
    frames = frames.contiguous(memory_format=torch.channels_last)
    source, copy = torch.randn(1 << 25), torch.randn(1 << 25)
    with torch.inference_mode():
        conv_time = best(lambda: torch.nn.functional.conv2d(frames, weight, padding=1), 8)
    copy_time = best(lambda: copy.copy_(source), 8)
    torch.set_num_threads(before)
    return {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "busy_cores": busy_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "conv_gflops": 2 * frames.numel() * weight[0].numel() / conv_time / 1e9,
        "copy_gb_per_s": 2 * 4 * (1 << 25) / copy_time / 1e9,
    }


def collect(
    raw: Mapping[str, Any], machine: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The result file's contents from the JSON that pytest-benchmark wrote.

    `machine` comes from `describe_machine`; `settings` is kept as it is.
    """
    import torch

    from adakernels import info

    commit = raw.get("commit_info", {})
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": {"id": commit.get("id", "unknown"), "dirty": commit.get("dirty")},
        "versions": {
            "adakernels": info.versions()["adakernels"].partition(",")[0],
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "build": info.build(),
        "machine": dict(machine),
        "settings": dict(settings),
        "records": [bench["extra_info"] for bench in raw["benchmarks"] if "family" in bench["extra_info"]],
    }


def save(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write ``results.json`` and ``results.png`` into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    file, picture = folder / "results.json", folder / "results.png"
    file.write_text(json.dumps(_rounded(results), indent=1, ensure_ascii=False) + "\n")
    plot(load(file), picture)
    return file, picture


def load(file: Path) -> dict[str, Any]:
    """Read a result file; ValueError when it isn't one of this schema."""
    results = json.loads(file.read_text())
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{file}: expected a result file of schema {SCHEMA}")
    return results


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value


@dataclass(frozen=True)
class Row:
    """One line of the table; `verdict` is "hit", "hit, aim too", "miss", or empty when there is no target."""

    target: Target
    cases: int
    mean: float
    worst: float
    efficiency: float | None
    time_ratio: float | None
    masked_ratio: float | None
    copy_ratio: float | None
    verdict: str

    def cells(self) -> tuple[str, ...]:
        return (
            self.target.label,
            str(self.cases),
            self.measured(),
            _ratio(self.time_ratio),
            _ratio(self.masked_ratio),
            goal(self.target),
            self.verdict,
        )

    def measured(self) -> str:
        metric, many = self.target.metric, self.cases > 1
        if metric == "eta":
            return f"η {self.mean:.2f}" + (f" mean, {self.worst:.2f} min" if many else "")
        if metric == "excess":
            return f"{self.worst:+.2f} of dense" + (" max" if many else "")
        if metric == "overhead_us":
            return f"{self.worst:.1f} µs" + (" max" if many else "")
        if metric == "speedup":
            value = f"{self.mean:.1f}x faster" + (f" mean, {self.worst:.1f}x min" if many else "")
            return value if self.copy_ratio is None else f"{value} ({self.copy_ratio:.2f}x a copy)"
        value = f"{self.worst:.2f}x" + (" max" if many else "")
        return value if self.efficiency is None else f"{value} (η {self.efficiency:.2f})"


def goal(target: Target) -> str:
    """The target as text."""
    if target.metric == "overhead_us" and target.worst is not None:
        return f"≤ {target.worst:.0f} µs"
    bounds = [(target.mean, " mean"), (target.worst, " each")]
    sign = "≥" if target.higher else "≤"
    texts = [f"{sign} {bound:.2f}{kind}" for bound, kind in bounds if bound is not None]
    return ("η " if target.metric == "eta" and texts else "") + ", ".join(texts)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _mean_of(records: Sequence[Record], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return geometric_mean(values) if values else None


def summarise(records: Iterable[Record], targets: Iterable[Target] = TARGETS) -> list[Row]:
    """One row for each target that has records."""
    records = list(records)
    rows = []
    for target in targets:
        chosen = [record for record in records if target.gathers(record)]
        if not chosen:
            continue
        values = [record[target.metric] for record in chosen]
        mean = geometric_mean(values) if min(values) > 0 else sum(values) / len(values)
        worst = min(values) if target.higher else max(values)
        rows.append(
            Row(
                target,
                len(chosen),
                mean,
                worst,
                _mean_of(chosen, "eta"),
                _mean_of(chosen, "time_ratio"),
                _mean_of(chosen, "masked_ratio"),
                _mean_of(chosen, "copy_ratio"),
                _verdict(target, mean, worst),
            )
        )
    return rows


def _verdict(target: Target, mean: float, worst: float) -> str:
    def reaches(value: float, bound: float | None) -> bool:
        return bound is None or (value >= bound if target.higher else value <= bound)

    if target.mean is None and target.worst is None:
        return ""
    if not (reaches(mean, target.mean) and reaches(worst, target.worst)):
        return "miss"
    aimed = target.aim is not None and reaches(worst if target.mean is None else mean, target.aim)
    return "hit, aim too" if aimed else "hit"


def render_text(rows: Iterable[Row]) -> str:
    """The table for a terminal."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    texts = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * (sum(widths) + 2 * len(widths) - 2), *texts[1:]])


def render_markdown(rows: Iterable[Row]) -> str:
    """The table for a page."""
    return _markdown(HEADER, [row.cells() for row in rows])


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def describe(results: Results) -> str:
    """One line about where and with what the results were measured."""
    machine, versions, commit = results["machine"], results["versions"], results["commit"]
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] != 1 else "")
    state = " with uncommitted changes" if commit["dirty"] else ""
    return (
        f"{machine['device']}, {threads} ({machine['instruction_set']}), float32, torch {versions['torch']}, "
        f"commit {commit['id'][:10]}{state}, {results['created'][:10]}"
    )


def render_gap(results: Results, batch: int = 32, updated: float = 0.5, skipped: float = 0.5) -> str:
    """What each layer must do, what it took, and how far that is from the machine's peaks, for a page.

    The floor is the longer of operations ÷ convolution rate and bytes ÷ copy rate, both measured there.
    """
    flops_per_ms = results["machine"]["conv_gflops"] * 1e6
    bytes_per_ms = results["machine"]["copy_gb_per_s"] * 1e6
    lines = []
    for record in results["records"]:
        if record["family"] not in FAMILY_TITLES or record.get("batch") != batch:
            continue
        if record.get("updated") != updated and record.get("skipped") != skipped:
            continue
        arithmetic, traffic = record["operations"] / flops_per_ms, record["bytes"] / bytes_per_ms
        dense, ours = (record["times"][record["best"][form]]["p50"] * 1e3 for form in ("dense", "ours"))
        limit = max(arithmetic, traffic)
        lines.append(
            (
                FAMILY_TITLES[record["family"]],
                record["case"].replace(f"-n{batch}", ""),
                f"{record['operations'] / 1e9:.2f}",
                f"{record['bytes'] / 1e6:.1f}",
                f"{limit:.2f} ({'operations' if arithmetic >= traffic else 'bytes'})",
                f"{dense:.2f}",
                f"{ours:.2f}",
                f"{ours / limit:.1f}x",
                f"{record['eta']:.2f}",
            )
        )
    header = (
        "family",
        "layer",
        "GFLOP",
        "MB",
        "floor, ms (set by)",
        "dense, ms",
        "ours, ms",
        "ours ÷ floor",
        "η",
    )
    return _markdown(header, lines)


def render_patches(results: Results) -> str:
    """What each patch case must move, and how long that, a copy of the output, we and the baselines took.

    The floor is bytes ÷ copy rate, as measured there.
    """
    bytes_per_ms = results["machine"]["copy_gb_per_s"] * 1e6
    lines = []
    for record in results["records"]:
        if record["family"] not in PATCH_TITLES:
            continue
        ms = {group: seconds * 1e3 for group, seconds in medians(record).items()}
        limit = record["bytes"] / bytes_per_ms
        lines.append(
            (
                PATCH_TITLES[record["family"]],
                record["case"],
                f"{record['bytes'] / 1e6:.1f}",
                f"{limit:.3f}",
                *(
                    f"{ms[group]:.3f}" if group in ms else ""
                    for group in ("copy", "ours", "slices", "sampled")
                ),
                f"{ms['ours'] / limit:.1f}x",
                f"{record['speedup']:.1f}x",
            )
        )
    header = (
        "passes",
        "case",
        "MB",
        "floor, ms",
        "copy, ms",
        "ours, ms",
        "integer slices, ms",
        "grid_sample, ms",
        "ours ÷ floor",
        "faster",
    )
    return _markdown(header, lines)


def render_3d(results: Results, families: Sequence[str]) -> str:
    """What the cases of these families took, in milliseconds, and in which form, for a page.

    Two columns are there only where some record has them: the share of frames and channels computed, and the
    time over dense that a paper's own implementation took.
    """
    records = [record for record in results["records"] if record["family"] in families]
    optional = {"computed_ratio": "r ÷ R", "published": "the paper's"}
    shown = {key: title for key, title in optional.items() if any(key in record for record in records)}
    lines = []
    for record in records:
        forms = {group: name.partition(" ")[2] for group, name in record["best"].items()}
        ms = {group: f"{seconds * 1e3:.2f}" for group, seconds in medians(record).items()}
        lines.append(
            (
                record["case"],
                f"{record['work_ratio']:.2f}",
                f"{ms['dense']} ({forms['dense']})",
                ms.get("masked", ""),
                f"{ms['ours']} ({forms['ours']})",
                f"{record['time_ratio']:.2f}",
                f"{record['eta']:.2f}",
                *(f"{record[key]:.2f}" if key in record else "" for key in shown),
            )
        )
    header = ("case", "work ÷ dense", "dense, ms", "masked, ms", "ours, ms", "time ÷ dense", "η")
    return _markdown((*header, *shown.values()), lines)


def _slim(results: Results) -> str:
    # Imports torch, which the rest of this module does without.
    from benchmarks.slim import SLIM_HEADER, render_slim

    return _markdown(SLIM_HEADER, render_slim(results["records"]))


def plot(results: Results, picture: Path) -> None:
    """Draw time against work, and η by family and policy, into a PNG."""
    from matplotlib.figure import Figure

    records = [record for record in results["records"] if "eta" in record]
    families = [family for family in FAMILY_TITLES if any(record["family"] == family for record in records)]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    scatter, strips = figure.subplots(1, 2, width_ratios=(1, 1.15))

    for number, family in enumerate(families):
        chosen = [record for record in records if record["family"] == family]
        scatter.scatter(
            [record["work_ratio"] for record in chosen],
            [record["time_ratio"] for record in chosen],
            s=90 if family.endswith("model") else 16,
            marker="*" if family.endswith("model") else "o",
            alpha=0.75,
            color=f"C{number}",
            label=FAMILY_TITLES[family],
        )
    scatter.plot([0, 1.05], [0, 1.05], color="black", linewidth=0.8)
    scatter.annotate("η = 1", (0.09, 0.13), rotation=38, fontsize=8)
    scatter.axhline(1, color="gray", linewidth=0.6, linestyle=":")
    scatter.set(xlabel="work ÷ dense work", ylabel="time ÷ best dense time", xlim=(0, 1.05))
    scatter.set_ylim(bottom=0)
    if families:
        scatter.legend(fontsize=8, frameon=False)

    labels: list[str] = []
    for number, family in enumerate(families):
        for label, chosen in _strips([record for record in records if record["family"] == family]):
            values = sorted(record["eta"] for record in chosen)
            strips.plot(
                values, [len(labels)] * len(values), "|", color=f"C{number}", markersize=11, alpha=0.7
            )
            strips.plot(geometric_mean(values), len(labels), "o", color=f"C{number}", markersize=6)
            labels.append(f"{FAMILY_TITLES[family]}, {label}" if label else FAMILY_TITLES[family])
    strips.axvline(1, color="black", linewidth=0.8)
    strips.set_yticks(range(len(labels)), labels, fontsize=8)
    strips.invert_yaxis()
    strips.set_xlabel("efficiency η (bars: cases, dots: geometric mean)")
    figure.suptitle(describe(results), fontsize=9)
    figure.savefig(picture, dpi=120, metadata={"Software": None})


def _strips(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    strips = [(f"u = {u:g}", [r for r in records if r.get("updated") == u]) for u in UPDATED]
    strips += [(f"skip {s:.0%}", [r for r in records if r.get("skipped") == s]) for s in SKIPPED]
    strips.append(("", [r for r in records if r.get("updated") is None and r.get("skipped") is None]))
    return [(label, chosen) for label, chosen in strips if chosen]


def rewrite_pages(root: Path, file: Path) -> list[Path]:
    """Put the tables of a result file between the ``bench`` markers of the README and of the kernel pages.

    Returns the pages that changed. Raises ValueError when a page's marker has no end.
    """
    results = load(file)
    texts = {
        "table": lambda page: _measured_section(results, file, page),
        "gap": lambda page: f"Measured on: {describe(results)}.\n\n{render_gap(results)}",
        "sliced": lambda page: f"Measured on: {describe(results)}.\n\n{render_3d(results, SLICED)}",
        "dynamic": lambda page: f"Measured on: {describe(results)}.\n\n{render_3d(results, DYNAMIC)}",
        "patches": lambda page: f"Measured on: {describe(results)}.\n\n{render_patches(results)}",
        "slim": lambda page: f"Measured on: {describe(results)}.\n\n{_slim(results)}",
    }
    changed = []
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        before = text = page.read_text()
        for name, write in texts.items():
            text = _between(text, name, write(page), page)
        if text != before:
            page.write_text(text)
            changed.append(page)
    return changed


def _measured_section(results: Results, file: Path, page: Path) -> str:
    link, picture = (os.path.relpath(path, page.parent) for path in (file, file.with_suffix(".png")))
    return (
        f"Measured on: {describe(results)}. Clips of gated layers and AdaFuse have {CLIP} frames. "
        f"Source of every number: [`{link}`]({link}).{_without_a_speed(results)}\n\n"
        f"{render_markdown(summarise(results['records']))}\n\n![time against work, and efficiency]({picture})"
    )


def _without_a_speed(results: Results) -> str:
    """A sentence about the cases that failed, if there are any."""
    names = [re.sub(r".*\[(.*)\]", r"`\1`", name) for name in results["settings"]["failed"]]
    return f" Without a speed, because they failed: {', '.join(names)}." if names else ""


def _between(text: str, name: str, content: str, page: Path) -> str:
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if start not in text:
        return text
    head, _, rest = text.partition(start)
    if end not in rest:
        raise ValueError(f"{page}: expected {end} after {start}")
    return f"{head}{start}\n{content}\n{end}{rest.partition(end)[2]}"

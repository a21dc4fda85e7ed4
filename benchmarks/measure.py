"""How it is measured: interleaved timing of several callables in one process, and what is derived from it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MIN_ROUNDS = 15
MAX_ROUNDS = 60
WARM_UP = 3
WARM_UP_3D = 2
MIN_ROUNDS_OF_CLIPS = 5
CONTENDER = 1.25
FINALISTS = 2
HEAT_ROUNDS = 5
BUDGET = 0.5
# Its temporaries take several times the memory of a layer's tensors, and would leave the caches to no one.
APART = "masked"
Result = Tensor | Sequence[Tensor]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def spread(samples: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of `samples` (nearest rank, true median), and how many there are."""
    ordered = sorted(samples)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {
        "p20": ordered[math.ceil(0.2 * len(ordered)) - 1],
        "p50": median,
        "p80": ordered[math.ceil(0.8 * len(ordered)) - 1],
        "rounds": len(ordered),
    }


def efficiency(dense: float, ours: float, work: float) -> float:
    """η = (t_dense / t_ours) * (work_ours / work_dense): how much of the saved work is saved time."""
    return dense / ours * work


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


class Race:
    """Takes turns: one timed sample of every runner per round, so that all see the same machine.

    `runners` are callables without arguments. A sample is the time of `calls` calls in a row divided by
    `calls`, which is 1 unless `sample_time` (seconds) asks for longer samples of runners too short to time.
    Every lap starts with another runner than the one before, so that none is always first. A round of `run`
    is a lap of all runners; one of `run_for` is a lap of the others, and then always the subject.
    """

    def __init__(
        self,
        runners: Mapping[str, Callable[[], Result]],
        *,
        sample_time: float = 0.0,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runners = dict(runners)
        self.timer = timer
        self.sample_time = sample_time
        self.calls = dict.fromkeys(self.runners, 1)
        self.samples: dict[str, list[float]] = {name: [] for name in self.runners}
        self.round = 0

    def _sample(self, name: str) -> float:
        runner, calls = self.runners[name], range(self.calls[name])
        start = self.timer()
        for _ in calls:
            runner()
        return (self.timer() - start) / len(calls)

    def warm_up(self, laps: int = 2) -> dict[str, float]:
        """Run every runner `laps` times, set the calls per sample and return the best times in seconds."""
        best = dict.fromkeys(self.runners, math.inf)
        for _ in range(laps):
            for name in self.runners:
                best[name] = min(best[name], self._sample(name))
        if self.sample_time:
            self.calls = {
                name: max(1, math.ceil(self.sample_time / max(seconds, 1e-9)))
                for name, seconds in best.items()
            }
        return best

    def lap(self, names: Iterable[str]) -> None:
        """One timed sample of each of `names`."""
        order = list(names)
        start = self.round % len(order) if order else 0
        self.round += 1
        for name in order[start:] + order[:start]:
            self.samples[name].append(self._sample(name))

    def run(self, rounds: int, names: Iterable[str] | None = None) -> None:
        """Time `rounds` laps of all runners, or of some."""
        with _no_garbage_collection():
            for _ in range(rounds):
                self.lap(self.runners if names is None else names)

    def run_for(self, benchmark: Any, subject: str, rounds: int) -> Result:
        """The same with pytest-benchmark timing `subject`, last in every round: the others run in its setup.

        Returns what the last timed call of `subject` returned.
        """
        runner, calls = self.runners[subject], range(self.calls[subject])
        others = [name for name in self.runners if name != subject]

        def block() -> Result:
            for _ in calls:
                result = runner()
            return result

        with _no_garbage_collection():
            result: Result = benchmark.pedantic(
                block, setup=lambda: self.lap(others), rounds=rounds, iterations=1
            )
        if benchmark.stats is None:
            self.lap([subject])
        else:
            self.samples[subject] = [seconds / len(calls) for seconds in benchmark.stats.stats.data]
        return result

    def times(self) -> dict[str, dict[str, float]]:
        """The spread of the samples of every runner that has some, in seconds."""
        return {name: spread(samples) for name, samples in self.samples.items() if samples}


class _no_garbage_collection:
    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()


def upstream_gradient(
    output: Tensor,  # of a ReLU
    seed: int,
) -> Tensor:
    """A random gradient of `output`, zero where rounding decides whether ReLU passes it on."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=random) * (output > 1e-4)


def rounds_for(lap_time: float, budget: float, least: int = MIN_ROUNDS) -> int:
    """As many rounds as `budget` seconds allow, never fewer than `least` nor more than 60."""
    return max(least, min(MAX_ROUNDS, int(budget / max(lap_time, 1e-9))))


def assert_matches(actual: Result, expected: Result, tolerance: float = 1e-4) -> None:
    """Raise AssertionError unless max|actual - expected| ≤ tolerance * max|expected| for every tensor."""
    if not isinstance(actual, Tensor):
        for one, other in zip(actual, expected, strict=True):
            assert_matches(one, other, tolerance)
        return
    assert isinstance(expected, Tensor)
    if actual.shape != expected.shape:
        raise AssertionError(f"expected a result of shape {list(expected.shape)}, got {list(actual.shape)}")
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((actual - expected).abs().max()) if expected.numel() else 0.0
    if not error <= tolerance * scale:
        raise AssertionError(f"result is off by {error:.3g} where the reference reaches {scale:.3g}")


def contest(
    benchmark: Any,
    groups: Mapping[str, Mapping[str, Callable[[], Result]]],
    expected: Result,
    tolerances: Mapping[str, float],
    *,
    quick: bool,
    sample_time: float = 0.0,
    warm_up: int = WARM_UP,
    min_rounds: int = MIN_ROUNDS,
    finalists: int = FINALISTS,
    together: Callable[[Result], Result] | None = None,
) -> dict[str, Any]:
    """Race groups of variants, one of which is "ours", and return times and winners as parts of a record.

    The variants of a group race each other, and the fastest one stands for it. Then those of the groups take
    turns, the masked one in a race of its own with ours. Every variant of the groups in `tolerances` must
    match `expected` first, and so must our last result timed.

    Args:
        benchmark: the pytest-benchmark fixture; its samples are those of our fastest variant.
        groups: callables by name of the variant (memory format), by name of the group.
        quick: only the variant of each group that was fastest in the warm-up races, and for 15 rounds;
            otherwise the `finalists` fastest race each other, as far as they came within 25 % of it, for 5
            rounds or a quarter of a second, and the winners for 15 or half a second, whichever is longer.
        sample_time: as in `Race`.
        warm_up, min_rounds: laps before the races and in the last one at least, fewer than usual for calls of
            seconds.
        together: brings what a variant returned into the form of `expected`, untimed.
    """

    def check(result: Result, group: str) -> None:
        assert_matches(together(result) if together else result, expected, tolerances[group])

    for group in tolerances:
        for runner in groups[group].values():
            check(runner(), group)
    runners = {
        f"{group} {name}": runner for group, variants in groups.items() for name, runner in variants.items()
    }
    heats = Race(runners, sample_time=sample_time)
    warm = heats.warm_up(warm_up)

    def rounds(names: Iterable[str], budget: float, least: int) -> int:
        return rounds_for(
            sum(warm[name] * heats.calls[name] for name in names), 0 if quick else budget, least
        )

    best = {}
    for group in groups:
        ranking = sorted((name for name in runners if name.startswith(group)), key=warm.__getitem__)
        ranking = ranking[: 1 if quick else finalists]
        close = [name for name in ranking if warm[name] <= warm[ranking[0]] * CONTENDER]
        if len(close) > 1:
            heats.run(rounds(close, BUDGET / 2, HEAT_ROUNDS), close)
        seconds = {name: times["p50"] for name, times in heats.times().items()}
        best[group] = min(close, key=lambda name: seconds.get(name, 0))

    def race(names: Sequence[str]) -> tuple[Race, int]:
        last = Race({name: runners[name] for name in names}, sample_time=sample_time)
        last.calls = {name: heats.calls[name] for name in names}
        return last, rounds(names, BUDGET, min_rounds)

    record = {"warm_up": warm, "best": best, "times": heats.times()}
    if APART in best:
        apart, count = race([best[APART], best["ours"]])
        apart.run(count)
        record["times"][best[APART]] = apart.times()[best[APART]]
        record["ours_beside_masked"] = apart.times()[best["ours"]]
    final, count = race([name for group, name in best.items() if group != APART])
    check(final.run_for(benchmark, best["ours"], count), "ours")
    record["times"] |= final.times()
    return record


def masked_ratio(record: Mapping[str, Any]) -> float:
    """Our median time in the race with the masked variant, of that one's."""
    ratio: float = record["ours_beside_masked"]["p50"] / medians(record)[APART]
    return ratio


def medians(record: Mapping[str, Any]) -> dict[str, float]:
    """The median time of each group's fastest variant, in seconds."""
    return {group: record["times"][name]["p50"] for group, name in record["best"].items()}


def contest_of_networks(
    benchmark: Any,
    groups: Mapping[str, Mapping[str, Callable[[], Result]]],
    expected: Result,
    *,
    quick: bool,
    clips: int,
) -> dict[str, Any]:
    """`contest` between 3D networks, of which a call takes seconds where there are several clips."""
    return contest(
        benchmark,
        groups,
        expected,
        {"ours": 1e-3},
        quick=quick,
        warm_up=WARM_UP_3D,
        min_rounds=MIN_ROUNDS_OF_CLIPS if clips > 1 else MIN_ROUNDS,
        finalists=1,
    )


def report_3d(benchmark: Any, case: Any, record: Mapping[str, Any], work: float, **facts: Any) -> None:
    """Keep a 3D case's record, and `facts`, with what follows from work, which is work_ours / work_dense."""
    seconds = medians(record)
    benchmark.group = case.family
    benchmark.extra_info.update(
        family=case.family,
        case=case.name,
        **facts,
        **record,
        work_ratio=work,
        time_ratio=seconds["ours"] / seconds["dense"],
        excess=seconds["ours"] / seconds["dense"] - work,
        eta=efficiency(seconds["dense"], seconds["ours"], work),
    )
    if APART in seconds:
        benchmark.extra_info["masked_ratio"] = masked_ratio(record)


def compare(
    benchmark: Any,
    ours: Mapping[str, Callable[[], Result]],
    dense: Mapping[str, Callable[[], Result]],
    masked: Mapping[str, Callable[[], Result]],
    expected: Result,
    *,
    work: float,
    quick: bool,
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Race ours against the dense and the masked baseline as `contest` does and return the record of it.

    Args:
        work: work_ours / work_dense.
        tolerance: of ours and of the masked baseline; the dense one computes something else.
    """
    record = contest(
        benchmark,
        {"dense": dense, "masked": masked, "ours": ours},
        expected,
        {"ours": tolerance, "masked": tolerance},
        quick=quick,
    )
    seconds = medians(record)
    return record | {
        "work_ratio": work,
        "time_ratio": seconds["ours"] / seconds["dense"],
        "masked_ratio": masked_ratio(record),
        "eta": efficiency(seconds["dense"], seconds["ours"], work),
    }

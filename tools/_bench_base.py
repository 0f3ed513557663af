"""What every section of `lethe bench` shares: options, guarded rows, clocks, and the arithmetic of the figures."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

Row = dict[str, Any]
"""One line of a table, JSON-ready. Under "error" stands why it has no figures; without one it has them."""


@dataclass(frozen=True)
class Options:
    """The command line, read and checked; see `bench --help`."""

    only: tuple[str, ...]
    shapes: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    contestants: tuple[str, ...]
    page_sizes: tuple[int, ...]
    max_tokens: int
    repeats: int
    steps: int
    new_tokens: int
    concurrency: tuple[int, ...]
    cell_seconds: float
    measured: bool
    layers: int | None
    time_limit: float | None
    quick: bool
    json: Path | None
    update: bool


@dataclass
class Bench:
    """A run under way: where it runs, the bandwidths measured at its start, and when it must end."""

    options: Options
    device: torch.device
    bandwidth: Row = field(default_factory=dict)  # bytes/s, see `_bench_kernels.bandwidth`
    deadline: float = float("inf")  # of time.monotonic
    say: Callable[[str], None] = lambda text: None  # progress, for whoever watches
    keep: Callable[[list[Row]], None] = lambda rows: None  # rows of this section so far, in case it does not end

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def read_bandwidth(self) -> float:
        """Bytes per second that one pass over a large buffer reads."""
        return float(self.bandwidth["read"])

    def row(self, facts: Row, work: Callable[[], Row]) -> Row:
        """`facts` with what `work` measures, or with the reason why it could not, memory given back."""
        if self.seconds_left <= 0:
            return {**facts, "error": f"not run: the time limit of {self.options.time_limit:g} s was reached"}
        try:
            return {**facts, **work()}
        except Exception as error:  # a comparator may fail in any way; its row says how
            failed = {**facts, "error": reason(error)}
        release()
        return failed


def reason(error: BaseException) -> str:
    """Kind and first line of an error, short enough for a table's footnote."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def release() -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- clocks


class Clock:
    """Marks in a device's order of work: CUDA events, that do not hold the host up, or the host's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def spans(self) -> list[float]:
        """Seconds between each mark and the next; waits for the device."""
        pairs = list(pairwise(self._marks))
        if not self._cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


@dataclass(frozen=True)
class Run:
    """A contestant of `interleave`: `work` is timed, `prepare` before it is not; `calls` of the op make one `work`."""

    work: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    calls: int = 1


def interleave(runs: Mapping[str, Run], repeats: int, device: torch.device, warmup: int = 3) -> dict[str, float]:
    """Median seconds of one call of each contestant, timed in turns (A B C A B C …), so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            run.prepare()
            clock = Clock(device)
            clock.mark()
            run.work()
            clock.mark()
            if turn >= warmup:
                seconds[name].append(clock.spans()[0] / run.calls)
    return {name: median(values) for name, values in seconds.items()}


def graphed(work: Callable[[], Any], calls: int, device: torch.device) -> Callable[[], Any]:
    """`calls` times `work` as one replay of a CUDA graph, which is how a decode step runs it; a plain loop elsewhere.

    `work` must have run once before, so that nothing compiles while it is captured.
    """

    def loop() -> None:
        for _ in range(calls):
            work()

    if device.type != "cuda":
        return loop
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()

    def replay() -> None:
        assert work is not None  # keeps the tensors that the graph reads
        graph.replay()

    return replay


# --------------------------------------------------------------------------------------------------------- arithmetic


def roofline(weight_bytes: int, kv_bytes: float, read_bandwidth: float) -> float:
    """Least seconds of a decode step: weights and retained keys and values, each read once at `read_bandwidth` B/s."""
    return (weight_bytes + kv_bytes) / read_bandwidth


def integrate(points: Sequence[tuple[int, float]], start: int, end: int) -> float:
    """Seconds of the decode steps at lengths start..end, from (length, seconds of a step) measured at some lengths.

    The trapezoid rule; beyond the first and last length, the nearest pair goes on in a straight line. One point stands
    for all lengths.
    """
    ordered = sorted(points)
    if not ordered:
        raise ValueError("no step was measured, so there is nothing to integrate")
    if len(ordered) == 1:
        return (end - start) * ordered[0][1]
    inner = [length for length, _ in ordered if start < length < end]
    grid = [start, *inner, end]
    values = [_line(ordered, length) for length in grid]
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(grid[:-1], grid[1:], values[:-1], values[1:], strict=True))


def _line(points: Sequence[tuple[int, float]], at: int) -> float:
    """The broken line through `points`, its first and last pieces extended."""
    index = next((i for i, (length, _) in enumerate(points[1:-1], 1) if at <= length), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of decode steps, rounds told apart.

    Attributes:
        step: a step without a round, median.
        round: what a round adds to the step before which it runs, median.
        amortised: a step with its share of the rounds.
    """

    step: float
    round: float
    interval: int

    @property
    def amortised(self) -> float:
        return self.step + self.round / self.interval if self.interval else self.step

    @property
    def share(self) -> float:
        """Rounds' part of decode time, 0..1."""
        return 1 - self.step / self.amortised


def split_rounds(seconds: Sequence[float], interval: int) -> StepTimes:
    """Tell rounds, one every `interval` steps, from steps: the phase of the interval that took longest has them.

    With an interval of 0 there are none. Fewer steps than two intervals cannot tell and raise `ValueError`.
    """
    if not interval:
        return StepTimes(median(seconds), 0.0, 0)
    if interval < 2 or len(seconds) < 2 * interval:
        raise ValueError(f"{len(seconds)} steps do not show what rounds every {interval} steps cost: at least two each")
    phases = [median(seconds[phase::interval]) for phase in range(interval)]
    slowest = phases.index(max(phases))
    plain = median(s for index, s in enumerate(seconds) if index % interval != slowest)
    return StepTimes(plain, max(0.0, phases[slowest] - plain), interval)

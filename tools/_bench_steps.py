"""Milliseconds of a decode step at several batch sizes and lengths, each contestant against its roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from lethe_compile.api import optimize
from lethe_compile.config import LetheConfig
from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools import _bench_sessions as sessions
from lethe_compile.tools._bench_base import Bench, Clock, Row, StepTimes, reason, release, roofline, split_rounds
from lethe_compile.tools._bench_sessions import DYNAMIC, FULL, LETHE, STATIC, Session
from lethe_compile.tools._bench_shapes import REASONER, Subject, load

_WARMUP = 4  # steps before those that count: the first ones compile, and capture CUDA graphs
_INTERVALS = 4  # of rounds in one timed block
CPU_MAX_TOKENS = 256  # hard cap of the CPU table: near what the demo's reasoner retains by itself


@dataclass(frozen=True)
class Sample:
    """One block of steps of one contestant."""

    times: StepTimes
    kv_bytes: int
    retained: float
    peak_bytes: int | None  # of the device during the block, weights left out; None on a CPU


Open = Callable[[], AbstractContextManager[Session]]


def run(bench: Bench) -> list[Row]:
    """Rows of every shape, batch, length and contestant."""
    rows: list[Row] = []
    for name in bench.options.shapes:
        rows += _shape(bench, name, bench.options.max_tokens, rows)
        release()
    return rows


def run_cpu(bench: Bench) -> list[Row]:
    """The same columns for the bundled reasoner on a CPU, in float32."""
    options = bench.options
    lengths = tuple(length for length in options.lengths if length <= 4096) or (1024,)
    return _shape(replace(bench, options=replace(options, lengths=lengths)), REASONER, CPU_MAX_TOKENS)


def lethe_config(bench: Bench, max_tokens: int) -> LetheConfig:
    """The defaults, with a hard cap, so that a run with random weights retains what a trained model would be given."""
    page = bench.options.page_sizes[0] if bench.device.type == "cuda" else None
    return LetheConfig(max_tokens=max_tokens, page_size=page)


def _shape(bench: Bench, name: str, max_tokens: int, before: Sequence[Row] = ()) -> list[Row]:
    """Rows of one shape; `before` them come those of other shapes, and what is complete is kept as it comes."""
    cases = [(batch, length) for batch in bench.options.batches for length in bench.options.lengths]
    bench.say(f"steps: {name}, optimize")
    torch.compiler.reset()  # what was compiled for the shape before is given back
    try:
        subject = load(name, bench.device, bench.options.layers)
        fast = optimize(subject.model, lethe_config(bench, max_tokens))
    except Exception as error:  # the shape's rows say why they are empty
        return [
            {"shape": name, "batch": batch, "length": length, "contestant": contestant, "error": reason(error)}
            for batch, length in cases
            for contestant in bench.options.contestants
        ]
    rows: list[Row] = []
    for batch, length in cases:
        bench.say(f"steps: {name}, {batch} × {length}")
        rows += _case(bench, subject, fast, batch, length)
        bench.keep([*before, *rows])
        release()
    return rows


def _case(bench: Bench, subject: Subject, fast: OptimizedModel, batch: int, length: int) -> list[Row]:
    """All contestants at one batch and length, in turns; each holds its cache only while it runs."""
    facts = {"shape": subject.name, "layers": subject.layers, "batch": batch, "length": length}
    opens = openers(subject, fast, batch, length, steps_needed(bench, fast))
    samples: dict[str, list[Sample]] = {name: [] for name in bench.options.contestants}
    rows: dict[str, Row] = {}
    for _ in range(bench.options.repeats):
        for name in bench.options.contestants:
            if "error" not in rows.get(name, {}):
                own = fast.cache.pool_bytes if name in (FULL, LETHE) else 0
                work = partial(_sample, bench, opens[name], batch, samples[name], own)
                rows[name] = bench.row({**facts, "contestant": name}, work)
    for name, row in rows.items():
        if samples[name]:
            row.pop("error", None)  # a repeat that came too late takes nothing from those before it
            row.update(figures(subject, batch, samples[name], bench.read_bandwidth))
    return list(rows.values())


def steps_needed(bench: Bench, fast: OptimizedModel) -> int:
    """Steps that one session runs at most, warm-up included."""
    interval = fast.config.interval
    return _WARMUP + interval + max(bench.options.steps, _INTERVALS * interval)


def openers(subject: Subject, fast: OptimizedModel, batch: int, length: int, steps: int) -> dict[str, Open]:
    """How to start a session of each contestant. The static one is made when first opened, and stays."""
    made: list[Any] = []

    def static() -> AbstractContextManager[Session]:
        if not made:
            made.append(sessions.Static(subject, batch, length, steps))
        opened: AbstractContextManager[Session] = made[0]()
        return opened

    return {
        DYNAMIC: partial(sessions.dynamic, subject, batch, length, steps),
        STATIC: static,
        FULL: partial(sessions.ours, fast, batch, length, steps, pruned=False),
        LETHE: partial(sessions.ours, fast, batch, length, steps, pruned=True),
    }


def _sample(bench: Bench, open_session: Open, batch: int, samples: list[Sample], own: int) -> Row:
    samples.append(measure(bench, open_session, batch, own))
    return {}


def measure(bench: Bench, open_session: Open, batch: int, own: int = 0) -> Sample:
    """Time one block of steps. `own` bytes on the device are the contestant's already, from a session before."""
    others = _allocated(bench.device) - own
    tokens = torch.zeros(batch, dtype=torch.int64, device=bench.device)
    clock = Clock(bench.device)
    with torch.no_grad(), open_session() as session:
        _reset_peak(bench.device)
        for _ in range(_WARMUP + session.interval):
            tokens = session.step(tokens)
        before = session.retained()
        clock.mark()
        for _ in range(max(bench.options.steps, _INTERVALS * session.interval)):
            tokens = session.step(tokens)
            clock.mark()
        times = split_rounds(clock.spans(), session.interval)
        peak = None if bench.device.type != "cuda" else torch.cuda.max_memory_allocated() - others
        return Sample(times, session.kv_bytes(), (before + session.retained()) / 2, peak)


def figures(subject: Subject, batch: int, samples: list[Sample], read_bandwidth: float) -> Row:
    """Medians over the repeats, and the roofline of what the contestant retains."""
    step, amortised = (median(getattr(s.times, name) for s in samples) for name in ("step", "amortised"))
    retained = median(sample.retained for sample in samples)
    read = batch * retained * subject.kv_bytes_per_token
    least = roofline(subject.weight_bytes, read, read_bandwidth)
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    weights = sum(parameter.nbytes for parameter in subject.model.parameters())
    return {
        "ms": amortised * 1e3,
        "step_ms": step * 1e3,
        "tokens_per_s": batch / amortised,
        "roofline_ms": least * 1e3,
        "of_roofline": step / least,
        "round_ms": median(sample.times.round for sample in samples) * 1e3,
        "rounds_share": median(sample.times.share for sample in samples),
        "retained": retained,
        "kv_bytes": max(sample.kv_bytes for sample in samples),
        "peak_bytes": weights + max(peaks) if peaks else None,
        "repeats": len(samples),
    }


def _allocated(device: torch.device) -> int:
    release()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

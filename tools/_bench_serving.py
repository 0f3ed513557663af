"""A closed loop of so many concurrent requests on an engine: all of their cache, and Lethe's, in the same memory.

Each of the concurrent users submits a request, waits for its last token, and submits the next one, for a fixed time.
Tokens count that come within it; requests that have no token by its end count with the time that they have waited.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lethe_compile.api import optimize
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving import Engine, Request, SamplingParams
from lethe_compile.tools._bench_base import Bench, Row
from lethe_compile.tools._bench_sessions import FULL, LETHE
from lethe_compile.tools._bench_shapes import REASONER, load
from lethe_compile.tools._bench_steps import lethe_config

_SETTLE = 0.25  # of a cell's time passes before tokens count: by then the rows are at different places
_GIB = 2**30


@dataclass(frozen=True)
class Load:
    """What users ask for: prompts, new tokens of each, and the bytes of the cache."""

    prompts: Sequence[Sequence[int]]
    new_tokens: tuple[int, int]  # least and most
    kv_memory: int
    ignore_eos: bool

    def requests(self, seed: int) -> Iterator[tuple[Sequence[int], SamplingParams]]:
        """The same for every contestant."""
        rng = random.Random(seed)
        while True:
            for prompt in self.prompts:
                new = rng.randint(*self.new_tokens)
                yield prompt, SamplingParams(max_new_tokens=new, do_sample=False, ignore_eos=self.ignore_eos)


def run(bench: Bench) -> list[Row]:
    """A row for each policy and number of concurrent requests."""
    name = bench.options.shapes[0] if bench.device.type == "cuda" else REASONER
    bench.say(f"serving: {name}, optimize")
    subject = load(name, bench.device, bench.options.layers)
    pruning = lethe_config(bench, bench.options.max_tokens)
    if name == REASONER:
        pruning = replace(pruning, max_tokens=None)  # its layers prune by themselves
    fast = optimize(subject.model, pruning)
    work = _reasoner_load() if name == REASONER else _random_load(bench, fast)
    facts = {"shape": name, "layers": subject.layers, "kv_budget": work.kv_memory}
    facts |= {"new_tokens": list(work.new_tokens), "prompt": max(map(len, work.prompts))}
    cells = _concurrency(bench)
    rows: list[Row] = []
    for contestant, config in ((LETHE, pruning), (FULL, replace(pruning, policy="full", max_tokens=None))):
        fast.reconfigure(config)
        with Engine(fast, max_batch=max(cells), kv_memory=work.kv_memory) as engine:
            for users in cells:
                bench.say(f"serving: {name}, {contestant}, {users} concurrent requests")
                row = {**facts, "contestant": contestant, "concurrent": users}
                rows.append(bench.row(row, partial(_cell, bench, engine, work, users)))
                bench.keep(rows)
            engine.close(abort=True)
    return rows


def _concurrency(bench: Bench) -> tuple[int, ...]:
    given = bench.options.concurrency
    return given or ((1, 8, 32, 64, 128) if bench.device.type == "cuda" else (1, 4, 16, 32))


def _reasoner_load() -> Load:
    """The reasoner's own problems, which it ends itself, in memory that holds a handful of whole traces."""
    from lethe_compile.models import reasoner

    made = reasoner.problems(64, seed=11, min_tokens=2000, max_tokens=3000)
    return Load([made.prompt(row) for row in range(len(made))], (3500, 3500), 64 * 2**20, ignore_eos=False)


def _random_load(bench: Bench, fast: OptimizedModel) -> Load:
    """Random prompts of 128 to 640 tokens and traces around `new_tokens`; 8 GiB, or on a small model what 24 whole
    sequences take."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, fast.vocab_size, rng.integers(128, 640)).tolist() for _ in range(64)]
    mean = min(bench.options.new_tokens, 4096)
    whole = sum(fast.token_bytes) * (640 + mean)
    return Load(prompts, (mean // 2, mean * 3 // 2), min(8 * _GIB, 24 * whole), ignore_eos=True)


@dataclass(frozen=True)
class _Look:
    """An engine's counters at one moment."""

    at: float
    stats: Any


def _cell(bench: Bench, engine: Engine, work: Load, users: int) -> Row:
    """`users` at once for `cell_seconds`, or less where the time limit comes first."""
    seconds = min(bench.options.cell_seconds, max(1.0, bench.seconds_left))
    ended: queue.SimpleQueue[Request] = queue.SimpleQueue()
    source = work.requests(seed=users)
    begun: list[Request] = []

    def submit() -> None:
        prompt, params = next(source)
        begun.append(engine.submit(prompt, params))
        begun[-1].add_done_callback(ended.put)

    start = time.monotonic()
    for _ in range(users):
        submit()
    first, peak = None, 0
    while (left := start + seconds - time.monotonic()) > 0:
        if first is None and left < (1 - _SETTLE) * seconds:
            first = _Look(time.monotonic(), engine.stats())
        peak = max(peak, engine.stats().bytes_used)
        try:
            request = ended.get(timeout=min(left, 0.2))
        except queue.Empty:
            continue
        request.result()  # an error is the row's
        submit()
    last = _Look(time.monotonic(), engine.stats())
    assert first is not None
    figures = _figures(begun, first, last) | {"kv_peak": peak, "seconds": seconds}
    for request in begun:
        request.cancel()
    for request in begun:
        request.result(timeout=60)
    return figures


def _figures(requests: Sequence[Request], first: _Look, last: _Look) -> Row:
    span, before, after = last.at - first.at, first.stats, last.stats
    stats = [request.stats for request in requests]
    waited = [
        one.first_token if one.first_token is not None else last.at - request.submitted
        for one, request in zip(stats, requests, strict=True)
    ]
    each = [one.per_token for one in stats if one.per_token is not None]
    steps = max(1, after.steps - before.steps)
    return {
        "tokens_per_s": (after.generated_tokens - before.generated_tokens) / span,
        "batch": (after.step_rows - before.step_rows) / steps,
        "ms_per_step": span / steps * 1e3,
        "ttft_p50": _percentile(waited, 50),
        "ttft_p95": _percentile(waited, 95),
        "tpot_p50": _percentile(each, 50),
        "tpot_p95": _percentile(each, 95),
        "requests": len(requests),
        "without_token": sum(one.first_token is None for one in stats),
        "finished": sum(request.finish_reason in ("stop", "length") for request in requests),
        "preemptions": sum(one.preemptions for one in stats),
        "recomputed_tokens": after.recomputed_tokens - before.recomputed_tokens,
        "rounds": after.rounds - before.rounds,
        "pressed": after.pressed - before.pressed,
    }


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None

"""How many sequences of 16k generated tokens fit into the same memory: all of their cache, and Lethe's part of it."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch

from lethe_compile.api import optimize
from lethe_compile.errors import InputError
from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools import _bench_sessions as sessions
from lethe_compile.tools._bench_base import Bench, Row
from lethe_compile.tools._bench_sessions import FULL, LETHE
from lethe_compile.tools._bench_shapes import load
from lethe_compile.tools._bench_steps import lethe_config

_SHARE = 0.4  # of the device's memory, for keys and values
_NEW_TOKENS = 16384
_INTERVALS = 8  # of rounds that the batch is run for, past the cap


def run(bench: Bench, budget: int | None = None, new_tokens: int = _NEW_TOKENS) -> list[Row]:
    """A row for each policy: the largest batch within `budget` bytes; Lethe's is run as well."""
    if budget is None:
        budget = int(_SHARE * torch.cuda.get_device_properties(bench.device).total_memory)
    name = bench.options.shapes[0]
    facts = {"shape": name, "new_tokens": new_tokens, "prompt": sessions.PROMPT, "budget_bytes": budget}
    bench.say(f"memory: {name}, optimize")
    subject = load(name, bench.device, bench.options.layers)
    fast = optimize(subject.model, lethe_config(bench, bench.options.max_tokens))
    fast.kv_memory = budget
    full = bench.row({**facts, "contestant": FULL}, partial(_full, fast, new_tokens))
    lethe = bench.row({**facts, "contestant": LETHE}, partial(_lethe, bench, fast, new_tokens))
    return [full, lethe]


def _full(fast: OptimizedModel, new_tokens: int) -> Row:
    tokens = sessions.PROMPT + new_tokens
    return {"sequences": largest_batch(fast, tokens), "tokens": tokens}


def _lethe(bench: Bench, fast: OptimizedModel, new_tokens: int) -> Row:
    """The admitted batch, taken to its cap and some rounds on: the pool must stay within its limit."""
    assert isinstance(fast.kv_memory, int) and fast.config.max_tokens is not None
    interval, cap = fast.config.interval, fast.config.max_tokens
    batch, heads = largest_batch(fast, cap), fast.cache.keep_sets.heads
    bench.say(f"memory: {batch} sequences past {cap} tokens")
    active = torch.ones(batch, dtype=torch.bool, device=fast.device)
    tokens = torch.zeros(batch, dtype=torch.int64, device=fast.device)
    fast.begin(batch, torch.full((batch,), sessions.PROMPT, device=fast.device), new_tokens)
    try:
        sessions.fill_cache(fast, batch, max(sessions.PROMPT, cap - 2 * interval), cap - 2 * interval)
        start = time.perf_counter()
        steps = (2 + _INTERVALS) * interval
        for _ in range(steps):
            tokens = fast.decode(tokens, active).argmax(dim=-1)
        written = batch * steps if tokens.cpu().numel() else 0  # waits for the device
        seconds = time.perf_counter() - start
        stats, retained = fast.cache.stats(), float(fast.cache.lengths[:, : batch * heads].mean())
    finally:
        fast.end()
    return {
        "sequences": batch,
        "tokens": cap,
        "steps": steps,
        "retained": retained,  # no less than the cap but an interval, so none was pruned harder for want of pages
        "tokens_per_s": written / seconds,
        "kv_bytes": stats["bytes_peak"],
        "pool_bytes": stats["pool_bytes"],
        "within_budget": stats["pool_bytes"] <= fast.kv_memory,
    }


def largest_batch(fast: OptimizedModel, tokens: int) -> int:
    """The most sequences that may hold `tokens` in every layer, in whole pages, within `kv_memory` bytes.

    Lethe's is counted by its cap, not by the fewer tokens to which it would prune under pressure.
    """
    budget, shape = fast.kv_memory, (len(fast.caches), fast.cache.keep_sets.heads)
    assert isinstance(budget, int)
    one = fast.cache.bytes_for(np.full(shape, tokens, np.int64))  # every sequence takes whole pages of its own
    if one > budget:
        raise InputError(f"not even one sequence of {tokens} cached tokens, {one} bytes, fits into {budget} bytes")
    return budget // one

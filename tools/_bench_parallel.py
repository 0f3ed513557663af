"""Tensor parallelism: a decode step of one model on one GPU and on all ranks, and what reducing the scores costs.

    torchrun --nproc-per-node 2 -m lethe_compile bench --only tensor-parallel --shapes llama-70b --layers 16 --json FILE

Every rank makes its part of the weights at random, on its device; the whole model lies nowhere, but on rank 0 where
that measures alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lethe_compile.api import optimize
from lethe_compile.distributed import Ranks, init, started
from lethe_compile.errors import InputError
from lethe_compile.passes.placement import Placement
from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools import _bench_sessions as sessions
from lethe_compile.tools._bench_base import Bench, Clock, Row, release, roofline
from lethe_compile.tools._bench_sessions import FULL, LETHE, Session
from lethe_compile.tools._bench_shapes import load, without_weights
from lethe_compile.tools._bench_steps import Sample, lethe_config, measure, steps_needed

_REDUCTIONS = 20  # of the scores, timed
_NEW_TOKENS = 256  # generated for real
TIMEOUT = timedelta(minutes=6)  # for a rank whose row broke off to be missed; one alone compiles within it

Made = Callable[[], OptimizedModel]


def run(bench: Bench) -> list[Row]:
    """A row for each number of ranks (all, then one alone), length and contestant; every rank measures, rank 0 tells.

    Raises:
        InputError: there is one process only.
    """
    if not started():
        raise InputError(
            "needs several processes: torchrun --nproc-per-node 2 -m lethe_compile bench --only tensor-parallel"
        )
    ranks, rows = Ranks(init()), list[Row]()
    bench.say(f"tensor-parallel: {ranks.size} ranks, optimize")
    rows += _rows(bench, partial(_shared, bench), ranks.size, ranks, rows)
    release()
    torch.compiler.reset()
    if ranks.rank == 0:
        bench.say("tensor-parallel: one rank alone, optimize")
        rows += _rows(bench, partial(_alone, bench), 1, None, rows)
    dist.barrier()
    return rows


def _shared(bench: Bench) -> OptimizedModel:
    name, options = bench.options.shapes[0], bench.options
    model = without_weights(name, bench.device, options.layers)
    config = lethe_config(bench, options.max_tokens)
    return optimize(model, config, tp=init(), fetch=random_part, verified=False)


def _alone(bench: Bench) -> OptimizedModel:
    name, options = bench.options.shapes[0], bench.options
    subject = load(name, bench.device, options.layers)
    return optimize(subject.model, lethe_config(bench, options.max_tokens), verified=False)


def random_part(name: str, weight: Tensor, placement: Placement, rank: int) -> Tensor:
    """A rank's part of a weight that lies nowhere as a whole: from a normal distribution; norms are 1."""
    shape = list(weight.shape)
    shape[placement.dim] = placement.each
    part = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    seed = sum(map(ord, name)) + (rank << 20) * (placement.each < placement.size)  # what ranks share is alike
    generator = torch.Generator(weight.device).manual_seed(seed)
    return part.normal_(0.0, 0.02, generator=generator) if part.dim() > 1 else part.fill_(1.0)


def _rows(bench: Bench, make: Made, count: int, ranks: Ranks | None, before: list[Row]) -> list[Row]:
    options = bench.options
    facts = {"shape": options.shapes[0], "batch": max(options.batches), "ranks": count}
    made: list[OptimizedModel] = []
    first = bench.row(facts, partial(_made, make, made)) if _goes_on(bench, ranks) else {**facts, "error": "not run"}
    if not made:
        return [first]
    rows: list[Row] = []
    for length in options.lengths:
        for contestant in (FULL, LETHE):
            if contestant not in options.contestants:
                continue
            bench.say(f"tensor-parallel: {count} ranks, {contestant}, {length} tokens")
            row = {**facts, "length": length, "contestant": contestant, "layers": len(made[0].sites)}
            if _goes_on(bench, ranks):
                row = bench.row(row, partial(_measure, bench, made[0], length, contestant == LETHE))
            else:
                row["error"] = f"not run: the time limit of {options.time_limit:g} s was reached"
            rows.append(row)
            bench.keep([*before, *rows])
            release()
    if LETHE in options.contestants and _goes_on(bench, ranks):
        row = {**facts, "contestant": LETHE, "layers": len(made[0].sites), "new_tokens": _NEW_TOKENS}
        rows.append(bench.row(row, partial(_generated, bench, made[0])))
    return rows


def _made(make: Made, made: list[OptimizedModel]) -> Row:
    made.append(make())
    return {}


def _goes_on(bench: Bench, ranks: Ranks | None) -> bool:
    """Whether there is time left, for all ranks alike."""
    left = bench.seconds_left > 0
    return left if ranks is None else ranks.everywhere(left)


def _measure(bench: Bench, fast: OptimizedModel, length: int, pruned: bool) -> Row:
    batch, cuda = max(bench.options.batches), bench.device.type == "cuda"
    reductions: list[float] = []
    weights = weight_bytes(fast)

    def opened() -> AbstractContextManager[Session]:
        return sessions.ours(fast, batch, length, steps_needed(bench, fast), pruned=pruned)

    samples = [measure(bench, opened, batch) for _ in range(bench.options.repeats)]
    if fast.ranks is not None and pruned:
        with torch.no_grad(), opened():
            reductions = _time_reductions(bench, fast)
    step, amortised = (median(getattr(sample.times, name) for sample in samples) for name in ("step", "amortised"))
    kv_bytes = max(sample.kv_bytes for sample in samples)
    read = sum(site.numbers for site in fast.caches) * fast.dtype.itemsize * batch * _retained(samples)
    least = roofline(weights, read, bench.read_bandwidth)
    row: Row = {
        "ms": amortised * 1e3,
        "step_ms": step * 1e3,
        "tokens_per_s": batch / amortised,
        "roofline_ms": least * 1e3,
        "of_roofline": step / least,
        "round_ms": median(sample.times.round for sample in samples) * 1e3,
        "rounds_share": median(sample.times.share for sample in samples),
        "retained": _retained(samples),
        "weight_bytes": weights,
        "kv_bytes": kv_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "allocated_bytes": torch.cuda.memory_allocated() if cuda else None,
    }
    if reductions:
        seconds = median(reductions)
        row["reduce_ms"] = seconds * 1e3
        row["reduce_share"] = seconds / (amortised * fast.config.interval)
    return row


def _retained(samples: list[Sample]) -> float:
    return median(sample.retained for sample in samples)


def _time_reductions(bench: Bench, fast: OptimizedModel) -> list[float]:
    """Seconds of reducing the scores of all layers and rows over the ranks, as a round does."""
    mass, _, _ = fast.cache.scores()
    assert fast.ranks is not None
    clock = Clock(bench.device)
    for _ in range(3):
        fast.ranks.reduced(mass, peak=fast.policy.peak)
    for _ in range(_REDUCTIONS + 1):
        clock.mark()
        fast.ranks.reduced(mass, peak=fast.policy.peak)
    return clock.spans()


def _generated(bench: Bench, fast: OptimizedModel) -> Row:
    """Tokens per second of `generate`, prompts, the choice of tokens and rank 0's word on them included."""
    batch = max(bench.options.batches)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(fast.vocab_size, (batch, sessions.PROMPT), generator=generator).to(bench.device)
    fast.generate(prompts, max_new_tokens=4, do_sample=False)  # compiles what prompts of this size need
    clock = Clock(bench.device)
    clock.mark()
    fast.generate(prompts, max_new_tokens=_NEW_TOKENS, do_sample=False)
    clock.mark()
    seconds = clock.spans()[0]
    return {"seconds": seconds, "tokens_per_s": batch * _NEW_TOKENS / seconds, "kv_bytes": fast.cache.bytes_peak}


def weight_bytes(fast: OptimizedModel) -> int:
    """Weights that a decode step of this rank reads: all but an input embedding that is not the output's too."""
    held = {
        name: t
        for name, t in _tensors(fast.graph_module)
        if "embed" not in name or name.startswith("tp_") > name.startswith("tp_whole")
    }
    return sum(tensor.nbytes for tensor in held.values())


def _tensors(module: nn.Module) -> list[tuple[str, Any]]:
    return [*module.named_parameters(), *module.named_buffers()]

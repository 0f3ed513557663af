"""Random arrivals, lengths, cancellations and tiny pools: pages are owned once and all return, and tokens are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.cache import KVCache
from lethe_compile.executor import DecodeGraph
from lethe_compile.models.tiny import tiny
from lethe_compile.serving import batch as serving_batch
from lethe_compile.serving.job import Job, read_terms
from lethe_compile.serving.loop import Loop
from lethe_compile.serving.request import Request
from lethe_compile.serving.stats import Counters, Times

CONFIG = lethe.LetheConfig(sparse_ratio=5.0, prune_threshold=16, prune_interval=4, page_size=4)
POLICIES: dict[str, lethe.LetheConfig] = {
    "full": lethe.LetheConfig(policy="full", prune_interval=4, page_size=4),
    "lethe": CONFIG,
    "capped": lethe.LetheConfig(sparse_ratio=5.0, prune_threshold=16, prune_interval=4, page_size=4, max_tokens=24),
}
PROMPTS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 5, 11, 24)]
LONGEST = 40  # new tokens


@dataclass
class Alone:
    """A model, and what each prompt gives alone."""

    fast: lethe.OptimizedModel
    tokens: list[list[int]]


@pytest.fixture(scope="module")
def alone() -> Callable[[str], Alone]:
    known: dict[str, Alone] = {}

    def of(policy: str) -> Alone:
        if not known:
            known["model"] = Alone(lethe.optimize(tiny("llama"), CONFIG, verified=False), [])
        if policy not in known:
            fast = known["model"].fast
            fast.reconfigure(POLICIES[policy])
            options = {"max_new_tokens": LONGEST, "eos_token_id": None, "do_sample": False}
            out = [fast.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]
            known[policy] = Alone(fast, out)
        known["model"].fast.reconfigure(POLICIES[policy])
        return known[policy]

    return of


def check_pages(cache: KVCache, used: int) -> None:
    """No page has two owners, rows beyond those in use have none, and the device's lengths are within the bounds."""
    for pool in cache._pools:
        held = pool.layout.table[pool.layout.held()]
        assert len(set(held.tolist())) == held.size and held.max(initial=0) < max(1, pool.layout.capacity)
    assert not cache.pages_held()[:, used:].any()
    assert (cache.length.numpy() <= cache.lengths).all()
    assert (cache.pages_held() >= cache.pages_filled()).all()
    assert cache.max_bytes is None or cache.pool_bytes <= cache.max_bytes


def make_loop(fast: lethe.OptimizedModel, room: float, *, rows: int, chunk: int, prunes: bool) -> Loop:
    """An engine's loop with `room` times the memory that the largest request needs at the least."""
    largest = fast.policy.least_tokens(np.array([len(PROMPTS[-1])]), LONGEST, fast.windows)
    return Loop(
        fast,
        fast.compiled.executor,
        max_batch=rows,
        max_bytes=int(fast.new_cache().bytes_for(largest) * room),
        longest=8,
        prefill_chunk=chunk,
        prunes=prunes,
        counters=Counters(),
        times=Times(),
    )


def submit(loop: Loop, fast: lethe.OptimizedModel, order: int, prompt: list[int], new: int) -> Job:
    params = lethe.SamplingParams(max_new_tokens=new, do_sample=False, ignore_eos=True)
    request = Request(str(order), tuple(prompt), params, lambda _: None)
    job = Job(request, read_terms(params, request.prompt, fast, None), seed=0, order=order)
    job.claim = loop.scheduler.admission.claim(job.prompt, new)
    loop.scheduler.waiting.append(job)
    return job


def step(loop: Loop) -> None:
    loop.admit()
    loop.step()
    loop.tell()
    check_pages(loop.batch.cache, loop.batch.used)
    assert [job.row for job in loop.scheduler.rows] == list(range(loop.batch.used))


def check_end(job: Job, right: list[int]) -> None:
    """Whatever happened to it, it ended, and what it wrote is what it writes alone."""
    tokens, new = job.request.tokens, job.terms.new_tokens
    assert job.request.done and job.request.error is None
    if job.request.finish_reason == "length":
        assert len(tokens) == new
    else:
        assert job.cancelled and job.request.finish_reason == "cancelled"
    if not job.pressed:
        assert tokens == right[: len(tokens)], job.stats()


class Unrecorded(DecodeGraph):
    """Stands for a CUDA graph: the same step on the same tensors, each time anew."""

    def replay(self, state: Mapping[str, Tensor]) -> Tensor:
        return self._step(state)


def imitate_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages from anywhere, steps of bucketed sizes, and tokens that are read only behind the next step's launch."""
    monkeypatch.setattr(serving_batch, "DecodeGraph", Unrecorded)
    made, new_cache = Loop.__init__, lethe.OptimizedModel.new_cache

    def scattered(fast: lethe.OptimizedModel) -> KVCache:
        cache = new_cache(fast)
        return KVCache(
            fast.compiled.geometries,
            page_size=cache.page_size,
            dtype=fast.dtype,
            device="cpu",
            contiguous=False,
            keep_sets=fast.keep_sets,
        )

    def overlapping(loop: Loop, fast: lethe.OptimizedModel, *args: Any, **options: Any) -> None:
        made(loop, fast, *args, **options)
        monkeypatch.setattr(fast.compiled, "backend", ("cudagraphs", "for a test"))
        loop._overlap = True

    monkeypatch.setattr(lethe.OptimizedModel, "new_cache", scattered)
    monkeypatch.setattr(Loop, "__init__", overlapping)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate_a_gpu(monkeypatch)


@pytest.mark.parametrize(("policy", "prunes"), [("full", True), ("lethe", False)])
@pytest.mark.usefixtures("like_a_gpu")
def test_steps_that_overlap(policy: str, prunes: bool, alone: Callable[[str], Alone]) -> None:
    expected = alone(policy)
    loop = make_loop(expected.fast, 3.0, rows=6, chunk=8, prunes=prunes)
    order = [3, 0, 1, 2, 3, 1, 0, 2]
    jobs = [
        (submit(loop, expected.fast, at, PROMPTS[which], LONGEST - 3 * at), which) for at, which in enumerate(order)
    ]
    while not loop.idle:
        step(loop)
        if loop.counters.steps == 20:
            jobs[2][0].cancelled = True
    for job, which in jobs:
        check_end(job, expected.tokens[which])
    assert loop.counters.preemptions and loop.counters.cancelled == 1


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data(), policy=st.sampled_from(sorted(POLICIES)), prunes=st.booleans())
def test_every_request_ends_right(
    data: st.DataObject, policy: str, prunes: bool, alone: Callable[[str], Alone]
) -> None:
    """The engine's loop, step by step in this thread, so that what happens when is drawn too."""
    expected, draw = alone(policy), data.draw
    room = draw(st.sampled_from([1.0, 1.3, 2.5]))
    rows, chunk = draw(st.integers(1, 5)), draw(st.sampled_from([3, 8, 64]))
    loop = make_loop(expected.fast, room, rows=rows, chunk=chunk, prunes=prunes)
    jobs: list[tuple[Job, int]] = []
    steps = 0
    while len(jobs) < 7 or not loop.idle:
        if len(jobs) < 7 and (loop.idle or draw(st.integers(0, 3)) == 0):
            which, new = draw(st.integers(0, 3)), draw(st.integers(1, LONGEST))
            jobs.append((submit(loop, expected.fast, len(jobs), PROMPTS[which], new), which))
        if jobs and draw(st.integers(0, 19)) == 0:
            draw(st.sampled_from(jobs))[0].cancelled = True
        step(loop)
        steps += 1
        assert steps < 4000, "requests starve"
    assert loop.batch.cache.pages[0] == 0 and loop.batch.used == 0
    for job, which in jobs:
        check_end(job, expected.tokens[which])


@pytest.mark.parametrize(("policy", "prunes"), [("full", True), ("lethe", True), ("lethe", False), ("capped", False)])
def test_pressure_ends_no_request_wrong(policy: str, prunes: bool, alone: Callable[[str], Alone]) -> None:
    """In a pool with room for two long requests, eight of them."""
    expected = alone(policy)
    room = {"full": 1.6, "lethe": 3.0, "capped": 3.0}[policy]
    loop = make_loop(expected.fast, room, rows=5, chunk=8, prunes=prunes)
    jobs = [(submit(loop, expected.fast, order, PROMPTS[order % 4], LONGEST), order % 4) for order in range(8)]
    while not loop.idle:
        step(loop)
    for job, which in jobs:
        check_end(job, expected.tokens[which])
    counters = loop.counters
    assert counters.finished == 8 and loop.batch.cache.pages[0] == 0
    assert bool(counters.pressed) == (policy == "lethe" and prunes), counters
    assert bool(counters.preemptions) == (policy != "capped"), "claims see to it that capped rows find room"
    assert max(job.preemptions for job, _ in jobs) <= 8, "whoever is preempted waits until there is room for it"
    assert bool(counters.rounds) == (policy != "full")

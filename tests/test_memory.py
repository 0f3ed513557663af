"""A limit on the cache: what cannot fit is refused before work, and what was admitted never runs out of pages."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lethe_compile as lethe
from lethe_compile import pool
from lethe_compile.cache import KVCache
from lethe_compile.errors import OutOfPagesError
from lethe_compile.kernels.attention.reference import append
from lethe_compile.memory import allowance, available_bytes, check_kv_memory
from lethe_compile.models.tiny import tiny
from lethe_compile.policies import Policy, make_policy
from lethe_compile.policies.base import RoundState
from lethe_compile.states import States
from tests import per_head  # noqa: F401  (registers its policies)
from tests.oracle import Evictions, replay
from tests.passes.toy import Toy, causal

CONFIG = lethe.LetheConfig(sparse_ratio=1e9, prune_threshold=16, prune_interval=4, page_size=4)
FLOOR = CONFIG.cap_floor


@pytest.fixture(scope="module")
def fast() -> lethe.OptimizedModel:
    return lethe.optimize(tiny("llama"), CONFIG, verified=False)


@pytest.fixture(scope="module")
def headed() -> lethe.OptimizedModel:
    """Of two KV heads and one, each with tokens of its own."""
    model = Toy(causal, lambda toy, query, key, value: causal(toy, query, key[:, :1], value[:, :1]))
    return lethe.optimize(model, CONFIG, policy="lethe-heads", verified=False)


@pytest.fixture(scope="module")
def windowed() -> lethe.OptimizedModel:
    return lethe.optimize(tiny("gemma2"), CONFIG, verified=False)


def prompts(rows: int = 3, tokens: int = 12) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(5))


def least_bytes(fast: lethe.OptimizedModel, rows: int, prompt: int, new_tokens: int) -> int:
    least = fast.policy.least_tokens(np.full(rows, prompt), new_tokens, fast.windows)
    return fast.cache.bytes_for(least)


# --- the setting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -5, 0.0, 1.5, True, "1GiB", float("nan")])
def test_a_limit_that_means_nothing_is_refused(value: Any) -> None:
    with pytest.raises(lethe.ConfigError, match=r"kv_memory=.* is not allowed: must be None"):
        check_kv_memory(value)
    with pytest.raises(lethe.ConfigError, match="kv_memory"):
        lethe.optimize(object(), kv_memory=value)  # type: ignore[arg-type]


def test_a_fraction_is_of_what_is_free_and_stays_while_it_fits() -> None:
    cpu = torch.device("cpu")
    free = available_bytes(cpu)
    assert free > 0
    half = allowance(0.5, cpu, held=0, last=None)
    assert half is not None and 0.2 * free < half < 0.8 * free
    assert allowance(0.5, cpu, held=0, last=1000) == 1000
    assert allowance(0.5, cpu, held=0, last=1 << 60) != 1 << 60
    assert (allowance(7, cpu, 0, 5), allowance(None, cpu, 0, 5)) == (7, None)


def test_another_fraction_is_another_limit(fast: lethe.OptimizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe_compile.memory.available_bytes", lambda device: 1 << 30)
    seen = []
    for fast.kv_memory in (100_000_000, 0.25, 0.25, 0.5, None):
        fast.generate(prompts(), max_new_tokens=2, eos_token_id=None)
        seen.append(fast.cache.max_bytes)
    held = 1 << 24
    assert seen[0] == 100_000_000 and seen[1] == seen[2] and seen[4] is None
    assert 1 << 28 <= seen[1] < (1 << 28) + held and 1 << 29 <= seen[3] < (1 << 29) + held


# --- admission ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", "lethe"])
def test_what_cannot_fit_is_refused_before_work(policy: str) -> None:
    model = tiny("llama")
    fast = lethe.optimize(model, CONFIG, policy=policy, verified=False)
    need = least_bytes(fast, 3, 12, 60)
    fast.kv_memory = need - 1
    with pytest.raises(
        lethe.InputError, match=rf"12 prompt and 60 new .* {need} bytes .* {need - 1} bytes are allowed"
    ):
        fast.generate(prompts(), max_new_tokens=60, eos_token_id=None, do_sample=False)
    assert fast.cache_stats().seen == [], "nothing was begun"
    fast.kv_memory = need
    out = fast.generate(prompts(), max_new_tokens=60, eos_token_id=None, do_sample=False)
    assert out.shape == (3, 72)
    assert fast.cache.pool_bytes <= need
    if policy == "full":
        assert torch.equal(out, model.generate(prompts(), max_new_tokens=60, do_sample=False, eos_token_id=None))
        assert fast.cache_stats().pressed == 0


def test_rows_that_only_fill_a_bucket_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs serve a few batch sizes; admission is about the sequences that there are."""
    fast = lethe.optimize(tiny("llama"), CONFIG, policy="full", verified=False)
    monkeypatch.setattr(fast.compiled, "bucket", lambda rows: 8)
    fast.kv_memory = least_bytes(fast, 3, 12, 60)
    fast.begin(3, torch.full((3,), 12), 60)
    assert fast.cache.rows == 8 and fast.cache.pool_bytes <= fast.kv_memory
    fast.end()


def test_lethe_needs_the_prompt_or_its_floor_whatever_is_generated() -> None:
    policy = make_policy(CONFIG)
    few, many = (policy.least_tokens(np.array([3, 50]), new, (None, 7)) for new in (2, 10_000))
    assert few.tolist() == [[5, FLOOR if FLOOR > 52 else 50], [5, 50]]
    assert many.tolist() == [[FLOOR, 50], [7 - 1 + 4, 50]]
    full = make_policy(replace(CONFIG, policy="full")).least_tokens(np.array([3, 50]), 100, (None, 7))
    assert full.tolist() == [[103, 150], [10, 50]]


# --- pressure -------------------------------------------------------------------------------------


def test_a_generation_under_pressure_ends_and_the_original_agrees() -> None:
    """Pages for a third of the tokens: rounds prune harder, are counted, and evict what they say they evict."""
    model = tiny("llama")
    fast = lethe.optimize(model, replace(CONFIG, protect_prompt=False), verified=False, kv_memory=1)
    fast.kv_memory = least_bytes(fast, 3, 12, 60)
    evictions = Evictions()
    fast.on_round.append(evictions)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = fast.generate(prompts(), max_new_tokens=60, eos_token_id=None, **options)
    stats = fast.cache_stats()
    assert stats.pressed > 5 and stats.to_dict()["pressed"] == stats.pressed and "lack of pages" in str(stats)
    assert max(map(max, stats.retained)) <= FLOOR + fast.page_size
    assert fast.cache.stats()["pool_bytes"] <= fast.kv_memory
    logits = torch.stack(out.logits, dim=1)
    for row in range(3):
        expected, unpruned = (one[11:-1] for one in replay(model, out.sequences[row : row + 1], evictions, row))
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        assert (expected - unpruned).abs().max() > 1e-2


def test_room_enough_means_no_pressure(fast: lethe.OptimizedModel) -> None:
    fast.kv_memory = 1 << 24
    fast.generate(prompts(), max_new_tokens=30, eos_token_id=None, do_sample=False)
    assert fast.cache_stats().pressed == 0
    fast.kv_memory = None


def test_a_policy_that_ignores_limits_ends_in_an_error_and_frees_the_cache(fast: lethe.OptimizedModel) -> None:
    class Stubborn(Policy):
        name = "stubborn"

        def least_tokens(self, prompts: Any, new_tokens: int, windows: Any) -> Any:
            return np.tile(prompts, (len(windows), 1))  # less than it will hold

        def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
            return None

    pruning, fast.policy, fast.kv_memory = fast.policy, Stubborn(CONFIG), 3 * 3 * 20 * 1100
    try:
        with pytest.raises(OutOfPagesError, match="max_bytes is"):
            fast.generate(prompts(), max_new_tokens=300, eos_token_id=None, do_sample=False)
        assert fast.cache.bytes_in_use == 0
    finally:
        fast.policy, fast.kv_memory = pruning, None
    assert fast.generate(prompts(), max_new_tokens=5, eos_token_id=None).shape == (3, 17)


def test_a_device_without_memory_for_more_makes_rounds_prune_harder(
    fast: lethe.OptimizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No limit is set, but the third allocation of a larger pool fails: the generation goes on in what there is."""
    allocate, room = pool.Pool._allocate, 90

    def fail(self: pool.Pool, name: str, pages: int) -> Tensor:
        if pages > room:
            raise torch.OutOfMemoryError("no memory")
        return allocate(self, name, pages)

    monkeypatch.setattr(pool.Pool, "_allocate", fail)
    monkeypatch.setattr(fast, "cache", scattered(fast, CONFIG))
    out = fast.generate(prompts(), max_new_tokens=100, eos_token_id=None, do_sample=False)
    assert out.shape == (3, 112)
    assert fast.cache_stats().pressed > 0
    assert fast.cache.inputs()["k_pages_0"].shape[0] <= room


def scattered(fast: lethe.OptimizedModel, config: lethe.LetheConfig) -> KVCache:
    """A cache laid out as on a GPU."""
    options = {"page_size": config.page_size_on("cpu"), "dtype": torch.float32, "device": "cpu"}
    return KVCache(fast.compiled.geometries, **options, contiguous=False, keep_sets=fast.keep_sets)


class Driven:
    """A model whose steps only write positions and random scores into its cache, driven as a generation is."""

    def __init__(self, fast: lethe.OptimizedModel, config: lethe.LetheConfig, contiguous: bool, seed: int) -> None:
        self.fast, self.generator = fast, torch.Generator().manual_seed(seed)
        fast.config, fast.policy, fast.page_size = config, make_policy(config), config.page_size_on("cpu")
        fast.cache = fast.new_cache() if contiguous else scattered(fast, config)
        fast.compiled = copy.copy(fast.compiled)
        fast.compiled.run = self.run  # type: ignore[method-assign]

    def run(
        self,
        cache: KVCache,
        states: States,
        ids: Tensor,
        positions: Tensor,
        new_lengths: Tensor,
        furthest: int,
        last: Tensor | None = None,
    ) -> Tensor:
        assert int(positions.max()) < furthest
        state, sets = cache.inputs(), cache.keep_sets
        positions, new_lengths = sets.spread(positions), sets.spread(new_lengths)
        rows, steps = positions.shape
        for layer, geometry in enumerate(self.fast.compiled.geometries):
            g = cache.pool_of_layer[layer]
            k, v, position, mass = (
                state[f"{name}_{g}"] for name in ("k_pages", "v_pages", "slot_position", "slot_mass")
            )
            key = torch.zeros(rows, geometry.num_kv_heads, steps, geometry.k_dim)
            value = torch.zeros(rows, geometry.num_kv_heads, steps, geometry.v_dim)
            table, length = state["page_table"][layer], state["length"][layer]
            new = new_lengths * torch.from_numpy(sets.there(rows)[layer])
            append(key, value, k, v, position, mass, table, length, positions, new)
            mass.copy_(torch.rand(mass.shape, generator=self.generator) ** 4)
            length += new
        self.check(cache, state)
        return torch.zeros(len(ids), steps if last is None else 1, 1)

    def check(self, cache: KVCache, state: dict[str, Tensor]) -> None:
        """Each page has one owner, every token lies on a page its row holds, and the limit holds."""
        held = cache.pages_held()
        assert (-(-state["length"].numpy() // cache.page_size) <= held).all()
        owned: dict[int, list[int]] = {}
        for layer in range(len(held)):
            for row in range(cache.rows):
                table = state["page_table"][layer, row, : held[layer, row]].tolist()
                owned.setdefault(cache.pool_of_layer[layer], []).extend(table)
        assert all(len(pages) == len(set(pages)) for pages in owned.values())
        assert cache.max_bytes is None or cache.pool_bytes <= cache.max_bytes

    def generate(self, lengths: Tensor, new_tokens: int, last: list[int]) -> None:
        fast = self.fast
        fast.begin(len(lengths), lengths, new_tokens)
        try:
            fast.prefill(torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long), lengths)
            for step in range(1, new_tokens):
                active = torch.tensor(last) >= step
                if not active.any():
                    break
                fast.decode(torch.zeros_like(lengths), active)
                stats = fast.cache_stats()
                expected = [n + min(step, end) for n, end in zip(lengths.tolist(), last, strict=True)]
                assert stats.seen == expected
        finally:
            fast.end()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    new_tokens=st.integers(1, 50),
    slack=st.sampled_from([0, 1, 3000, 30_000]),
    page=st.sampled_from([1, 4, 16]),
    interval=st.sampled_from([1, 4, 9]),
    policy=st.sampled_from(["lethe", "full"]),
    literal=st.booleans(),
    contiguous=st.booleans(),
    data=st.data(),
)
def test_what_was_admitted_never_runs_out_of_pages(
    fast: lethe.OptimizedModel,
    windowed: lethe.OptimizedModel,
    headed: lethe.OptimizedModel,
    lengths: list[int],
    new_tokens: int,
    slack: int,
    page: int,
    interval: int,
    policy: str,
    literal: bool,
    contiguous: bool,
    data: st.DataObject,
) -> None:
    model = data.draw(st.sampled_from([fast, windowed, headed]))
    kind = policy if model is not headed else f"{policy}-heads"
    config = replace(CONFIG, page_size=page, prune_interval=interval, policy=kind, paper_literal=literal)
    last = data.draw(st.lists(st.integers(0, new_tokens), min_size=len(lengths), max_size=len(lengths)))
    saved = dict(vars(model))
    try:
        driven = Driven(model, config, contiguous, seed=len(lengths))
        assert model.cache.page_size == page
        rows = model.keep_sets.repeat(np.array(lengths))
        least = model.policy.least_tokens(rows, new_tokens, model.windows)
        model.kv_memory = model.cache.bytes_for(least) + slack
        driven.generate(torch.tensor(lengths), new_tokens, last)
        assert model.cache.bytes_in_use == 0
        assert policy == "lethe" or model.cache_stats().pressed == 0
    finally:
        vars(model).clear()
        vars(model).update(saved)

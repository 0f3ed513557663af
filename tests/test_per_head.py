"""Keep-sets per KV head: without eviction transformers' tokens, with eviction the original under a mask per head."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import lethe_compile as lethe
from lethe_compile.models.plain_decoder import PlainConfig, PlainDecoder, plain
from lethe_compile.models.tiny import tiny
from lethe_compile.past import Past
from lethe_compile.policies import make_policy
from tests.per_head import CONFIG, GREEDY, PROMPT, assert_replay_agrees, prompts

# GQA; MHA; window and softcap; ALiBi, whose slopes differ by head; sinks, and KV heads that differ by layer; no
# transformers; sinks again
LONGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bloom", "gpt_oss")]
NAMES = ("llama", "gemma2", "mimo_v2_flash", "plain", *LONGER)
NEW = 50


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, lethe.OptimizedModel]:
    """A model, and what `optimize` makes of it for a policy per head."""
    return of(request.param)


@cache
def of(name: str, policy: str = CONFIG.policy, backend: str = "auto") -> tuple[Any, lethe.OptimizedModel]:
    model = plain() if name == "plain" else tiny(name)
    return model, lethe.optimize(model, CONFIG, policy=policy, verified=name == "gpt2", backend=backend)


def test_without_eviction_tokens_are_those_of_the_original(pair: tuple[Any, lethe.OptimizedModel]) -> None:
    model, fast = pair
    with fast.unpruned():
        if isinstance(model, PlainDecoder):
            ids = prompts()["input_ids"]
            with torch.no_grad():
                torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-4)
            return
        out = fast.generate(**prompts(), **GREEDY, max_new_tokens=NEW)
        assert out.tolist() == model.generate(**prompts(), **GREEDY, max_new_tokens=NEW).tolist()
    assert fast.cache.bytes_in_use == 0


def test_pruned_logits_match_the_original_under_a_mask_per_head(pair: tuple[Any, lethe.OptimizedModel]) -> None:
    model, fast = pair
    evictions = assert_replay_agrees(model, fast)
    stats = fast.cache_stats()
    assert all(min(layer) >= 2 for layer in stats.rounds), "every layer and row must have been pruned repeatedly"
    assert stats.heads is not None
    for layer, site in enumerate(fast.sites):
        assert evictions.heads[layer] == site.kv_heads
        assert all(len(row) == site.kv_heads for row in stats.heads[layer])
        if site.mask is not None and site.mask.window is None:  # what a window hides, every head loses in the end
            gone = [set(evictions.first[layer, 1, head]) for head in range(site.kv_heads)]
            assert all(one != gone[0] for one in gone[1:]), "each head must lose tokens of its own"
    assert any(len(set(row)) > 1 for layer in stats.heads for row in layer), "heads keep different numbers, too"
    assert fast.cache.bytes_in_use == 0 and not fast.cache.pages_held().any()


def test_lethe_itself_per_head() -> None:
    model, fast = of("plain")
    before = fast.policy
    fast.policy = make_policy(replace(CONFIG, policy="lethe-heads", sparse_ratio=1.2, segments=8))
    evictions = assert_replay_agrees(model, fast)
    assert evictions.first[0, 1, 0] != evictions.first[0, 1, 1]
    assert fast.policy.thresholds.shape == (3, 3 * 2)
    fast.policy = before


def test_figures_are_means_over_heads_and_say_so() -> None:
    _, fast = of("mimo_v2_flash")
    ids = prompts()
    fast.begin(3, ids["attention_mask"].sum(1), 40)
    lengths = ids["attention_mask"].sum(1)
    fast.prefill(torch.randint(3, 90, (3, int(lengths.max()))), lengths)
    for _ in range(9):
        fast.decode(torch.full((3,), 7), torch.tensor([True, True, True]))
    stats, held = fast.cache_stats(), fast.cache.pages_held()
    assert stats.seen == (lengths + 9).tolist()
    kv_heads = [site.kv_heads for site in fast.caches]
    assert fast.cache.rows == 3 * 4 and sorted(set(kv_heads)) == [2, 4]
    for layer, heads in enumerate(kv_heads):
        for row in range(3):
            rows = slice(row * 4, row * 4 + heads)
            lengths_of_heads = fast.cache.lengths[layer, rows].tolist()
            assert stats.heads is not None and stats.heads[layer][row] == lengths_of_heads
            assert stats.retained[layer][row] == pytest.approx(np.mean(lengths_of_heads))
            page = fast.page_size * (fast.caches[layer].k_dim + fast.caches[layer].v_dim) * 4
            assert stats.bytes_held[layer][row] == int(held[layer, rows].sum()) * page
            assert not fast.cache.lengths[layer, row * 4 + heads : row * 4 + 4].any()
    assert not held[0, 2:4].any() or kv_heads[0] == 4, "rows that a layer lacks hold nothing"
    fast.end()
    assert "per head" in str(fast.report()) and "per head" in str(stats)
    assert [layer.keep_sets for layer in fast.report().layers] == kv_heads
    site = fast.sites[0]
    size = site.kv_heads * (site.k_dim + site.v_dim) * 4
    assert fast.report().layers[0].bytes_per_token == size
    assert stats.to_dict()["heads"] == stats.heads


def test_emptied_pages_of_one_head_serve_others_under_pressure() -> None:
    """Pages for a third of the tokens: rounds prune harder, and evict what they say they evict."""
    model, fast = of("llama")
    lengths = prompts()["attention_mask"].sum(1).numpy()
    least = fast.policy.least_tokens(np.repeat(lengths, 2), NEW, fast.windows)
    assert least.shape == (3, 6)
    fast.kv_memory = need = fast.cache.bytes_for(least)
    assert_replay_agrees(model, fast)
    stats = fast.cache_stats()
    assert stats.pressed > 0 and fast.cache.pool_bytes <= need and fast.cache.bytes_in_use == 0
    fast.kv_memory = need - 1
    with pytest.raises(lethe.InputError, match=f"3 sequences of .* need {need} bytes"):
        fast.generate(**prompts(), **GREEDY, max_new_tokens=NEW)
    fast.kv_memory = None


@pytest.mark.parametrize("name", ["llama", "mimo_v2_flash"])
@torch.no_grad()
def test_every_head_gets_what_another_cache_holds(name: str) -> None:
    from transformers import DynamicCache

    model, fast = of(name)
    ids, theirs = torch.randint(3, 90, (2, 19)), DynamicCache()
    model(ids[:, :12], past_key_values=theirs)
    lengths = torch.full((2,), 12)
    positions = torch.arange(12).repeat(2, 1)
    past = Past(
        [layer.keys for layer in theirs.layers],
        [layer.values for layer in theirs.layers],
        [positions] * len(theirs.layers),
        lengths,
    )
    expected = model(ids).logits[:, 12:]
    torch.testing.assert_close(fast.forward_after(past, ids[:, 12:]), expected, rtol=1e-4, atol=1e-4)
    fast.adopt(past)
    for column in range(12, 19):
        logits = fast.decode(ids[:, column], torch.ones(2, dtype=torch.bool))
        if column < 16:  # before the first round
            torch.testing.assert_close(logits, expected[:, column - 12], rtol=1e-4, atol=1e-4)
    fast.end()
    assert fast.cache.bytes_in_use == 0


def test_a_policy_of_the_other_kind_is_refused() -> None:
    _, heads = of("plain")
    before = heads.policy
    with pytest.raises(lethe.ConfigError, match=r"'lethe' keeps the same tokens .* compiled for one that keeps other"):
        heads.policy = make_policy(lethe.LetheConfig())
    assert heads.policy is before
    whole = lethe.optimize(plain(), verified=False)
    with pytest.raises(lethe.ConfigError, match=r"'picky-per-head' keeps other tokens .* optimize the model again"):
        whole.policy = make_policy(CONFIG)
    assert whole.policy.name == "lethe"


def test_of_one_kv_head_both_kinds_are_the_same() -> None:
    torch.manual_seed(0)
    only = lethe.optimize(PlainDecoder(PlainConfig(kv_heads=1)).eval(), verified=False)
    only.policy = make_policy(CONFIG)
    assert only.generate(prompts()["input_ids"], **GREEDY, max_new_tokens=NEW).shape == (3, PROMPT + NEW)
    assert min(map(min, only.cache_stats().rounds)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mimo_v2_flash"])
def test_inductor_compiles_what_lies_between(name: str) -> None:
    model, fast = of(name, backend="inductor")
    with fast.unpruned():
        out = fast.generate(**prompts(), **GREEDY, max_new_tokens=20)
    assert out.tolist() == model.generate(**prompts(), **GREEDY, max_new_tokens=20).tolist()
    assert_replay_agrees(model, fast)

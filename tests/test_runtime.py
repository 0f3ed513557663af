"""The optimized model as a user meets it: reports, statistics, memory, bad input, interruption."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.listeners import Round
from lethe_compile.models.tiny import tiny

CONFIG = lethe.LetheConfig(
    sparse_ratio=1.5, decay=0.9, prune_threshold=20, prune_interval=5, page_size=4, protect_prompt=False
)


@pytest.fixture(scope="module")
def fast() -> lethe.OptimizedModel:
    return lethe.optimize(tiny("llama"), CONFIG)


@pytest.fixture(scope="module")
def mixed() -> lethe.OptimizedModel:
    """Sliding and full layers."""
    return lethe.optimize(tiny("gemma2"), CONFIG)


def prompts(rows: int = 2, tokens: int = 12) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(5))


def run(model: lethe.OptimizedModel, new_tokens: int = 60, **options: Any) -> Tensor:
    out = model.generate(prompts(), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, **options)
    assert isinstance(out, Tensor)
    return out


def test_statistics_count_what_rounds_did(fast: lethe.OptimizedModel) -> None:
    evicted = torch.zeros(3, 2, dtype=torch.long)

    def count(event: Round) -> None:
        evicted[event.layer] += ((event.position >= 0) & ~event.keep).sum(1)

    fast.on_round.append(count)
    try:
        run(fast)
    finally:
        fast.on_round.clear()
    stats = fast.cache_stats()
    assert stats.seen == [71, 71], "the prompt and all new tokens but the last, which is never fed"
    assert (torch.tensor(stats.retained) + evicted).tolist() == [[71, 71]] * 3
    assert all(rounds > 0 for layer in stats.rounds for rounds in layer)
    assert all(0 < s < 1 for layer in stats.sparsity for s in layer)
    page = 4 * 2 * 2 * 16 * 4  # tokens · (K, V) · KV heads · head_dim · bytes
    held, retained = torch.tensor(stats.bytes_held), torch.tensor(stats.retained)
    assert not (held % page).any()
    assert (held >= retained * page // 4).all()
    assert sum(map(sum, stats.bytes_freed)) > 0


def test_pages_return_and_pruning_holds_less_memory(fast: lethe.OptimizedModel) -> None:
    with fast.unpruned():
        run(fast, 200)
    full = fast.cache.stats()
    run(fast, 200)
    pruned = fast.cache.stats()
    assert pruned["bytes_in_use"] == full["bytes_in_use"] == 0, "every page is back after a generation"
    assert pruned["bytes_peak"] < 0.5 * full["bytes_peak"]
    assert pruned["bytes_mean"] < 0.6 * full["bytes_mean"]


def test_pool_tensors_shrink_with_the_cache(fast: lethe.OptimizedModel) -> None:
    fresh = lethe.optimize(tiny("llama"), CONFIG, verified=False)
    run(fresh, 200)
    pruned = fresh.cache.stats()["pool_bytes_peak"]
    with fresh.unpruned():
        run(fresh, 200)
    assert pruned < 0.6 * fresh.cache.stats()["pool_bytes_peak"], "real tensors, not only their bookkeeping"


def test_unpruned_is_the_policy_full(fast: lethe.OptimizedModel) -> None:
    model = tiny("llama")
    with fast.unpruned():
        out = run(fast)
    expected = model.generate(prompts(), max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert torch.equal(out, expected)
    assert not torch.equal(run(fast), expected), "with pruning on, this random model writes something else"


def test_window_layers_trim_without_loss(mixed: lethe.OptimizedModel) -> None:
    with mixed.unpruned():
        run(mixed)
    stats = mixed.cache_stats()
    assert max(stats.retained[0]) <= 7 + CONFIG.interval, "sliding layers keep the window"
    assert stats.retained[1] == stats.seen, "full layers keep all"


def test_report_prints_and_dumps(mixed: lethe.OptimizedModel) -> None:
    report = mixed.report()
    text, data = str(report), json.loads(report.to_json())
    assert [layer["window"] for layer in data["layers"]] == [7, None, 7, None]
    assert [layer["softcap"] for layer in data["layers"]] == [2.0] * 4
    assert data["cache"]["bytes_per_token"] == 4 * 2 * 2 * 16 * 4
    assert {"normalize", "classify-masks", "insert-attention"} <= {p["name"] for p in data["passes"]}
    assert "sliding 7" in text and "interface" in text
    assert max(map(len, text.splitlines())) <= 120


def test_statistics_before_any_generation_print() -> None:
    fresh = lethe.optimize(tiny("llama"), CONFIG, verified=False)
    assert "cache" in str(fresh.cache_stats())
    assert json.loads(fresh.cache_stats().to_json())["seen"] == []


def test_statistics_dump_as_json(fast: lethe.OptimizedModel) -> None:
    run(fast)
    data = json.loads(fast.cache_stats().to_json())
    assert len(data["retained"]) == 3 and len(data["retained"][0]) == 2
    assert data["timeline"], "one entry a round"


def test_an_interruption_frees_the_cache_and_leaves_the_model_usable(fast: lethe.OptimizedModel) -> None:
    expected = run(fast, 20)

    def interrupt(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 20:
            raise KeyboardInterrupt
        return scores

    with pytest.raises(KeyboardInterrupt):
        run(fast, 20, logits_processor=[interrupt])
    assert fast.cache.bytes_in_use == 0
    assert torch.equal(run(fast, 20), expected)


def test_a_generation_inside_a_generation_is_refused(fast: lethe.OptimizedModel) -> None:
    def nested(ids: Tensor, scores: Tensor) -> Tensor:
        run(fast, 3)
        return scores

    with pytest.raises(lethe.InputError, match="generating already"):
        run(fast, 5, logits_processor=[nested])
    run(fast, 5)


def test_forward_does_not_disturb_a_generation(fast: lethe.OptimizedModel) -> None:
    expected = run(fast, 20)

    def peek(ids: Tensor, scores: Tensor) -> Tensor:
        fast(ids)
        return scores

    assert torch.equal(run(fast, 20, logits_processor=[peek]), expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.long), "at least one row"),
        (torch.zeros(2, 0, dtype=torch.long), "at least one row"),
        (torch.tensor([[1, 97]]), "vocabulary"),
        (torch.tensor([[-1, 3]]), "vocabulary"),
        (torch.ones(1, 513, dtype=torch.long), "positions"),
        (torch.ones(1, 4), "int64"),
    ],
)
def test_forward_and_generate_refuse_bad_ids(fast: lethe.OptimizedModel, ids: Tensor, message: str) -> None:
    with pytest.raises(lethe.InputError, match=message):
        fast(ids)
    with pytest.raises(lethe.InputError):
        fast.generate(ids, max_new_tokens=4)
    assert fast.cache.bytes_in_use == 0


def test_a_prompt_longer_than_the_positions_is_refused_before_work(fast: lethe.OptimizedModel) -> None:
    with pytest.raises(lethe.InputError, match="512"):
        fast.generate(torch.ones(1, 510, dtype=torch.long), max_new_tokens=10)


def test_nan_weights_and_several_devices_are_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(lethe.InputError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        lethe.optimize(model)
    split = tiny("llama")
    split.model.layers[2].to("meta")
    with pytest.raises(lethe.InputError, match="several devices"):
        lethe.optimize(split)


def test_an_unknown_policy_is_refused_before_any_work() -> None:
    with pytest.raises(lethe.ConfigError, match="full"):
        lethe.optimize(object(), policy="fulll")  # type: ignore[arg-type]


def test_half_precision_generates(fast: lethe.OptimizedModel) -> None:
    half = lethe.optimize(tiny("qwen3", dtype=torch.bfloat16), CONFIG)
    out = run(half, 40)
    assert out.shape == (2, 52)
    assert half.report().dtype == "bfloat16"
    assert half.report().bytes_per_token == 3 * 2 * 2 * 24 * 2


def test_weights_are_shared_with_the_original() -> None:
    model = tiny("qwen2")
    fast = lethe.optimize(model, verified=False)
    mine = {p.data_ptr() for p in fast.parameters()}
    assert {p.data_ptr() for p in model.parameters()} >= mine

"""Rotary embeddings whose frequencies follow the length: below it, at it, beyond it, and across it while generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lethe_compile as lethe
from lethe_compile.capture.rope import rope_captured
from lethe_compile.config import LetheConfig
from lethe_compile.models.architectures import build

LIMIT, NEW = 40, 25
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC},
    "hunyuan_v1_dense": {"max_position_embeddings": LIMIT, "rope_parameters": {**DYNAMIC, "alpha": 20.0}},
    "gemma3_text": {  # one embedding for two kinds of layers
        "max_position_embeddings": LIMIT,
        "rope_parameters": {
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "phi3": {
        "max_position_embeddings": 4 * LIMIT,
        "original_max_position_embeddings": LIMIT,
        "sliding_window": None,
        "rope_parameters": {**LONG, "partial_rotary_factor": 1.0},
    },
    "phimoe": {"rope_parameters": {**LONG, "long_mscale": 1.3, "short_mscale": 1.1}},
    "llama, longrope": {"rope_parameters": LONG},
}
RECOMPUTE = ("phi3", "phimoe")  # transformers drops their caches beyond the limit
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def made(name: str) -> Any:
    """A model that has seen no text: transformers' own keep the frequencies of the longest."""
    return build(name.partition(",")[0], **MODELS[name])


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in ("gemma3_text", "phimoe") else ()) for name in MODELS],
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def fast(name: str) -> lethe.OptimizedModel:
    return lethe.optimize(made(name), policy="full")


@torch.no_grad()
def test_logits_below_and_beyond_are_the_originals(name: str, fast: lethe.OptimizedModel) -> None:
    for tokens in (30, LIMIT, LIMIT + 1, 60, 25):
        ids = ids_of(2, tokens)
        torch.testing.assert_close(fast(ids), made(name)(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_capture_changes_what_the_length_decides_alone(name: str) -> None:
    model, ids = made(name), ids_of(1, LIMIT + 8)
    forwards = {module: module.forward for module in model.modules()}
    with rope_captured(model):
        beyond, below = model(ids, use_cache=False).logits, model(ids[:, :9], use_cache=False).logits
        changed = [type(module).__name__ for module in model.modules() if module.forward != forwards[module]]
    assert len(changed) == 1 and changed[0].endswith("RotaryEmbedding")
    assert all(module.forward == forward for module, forward in forwards.items())
    torch.testing.assert_close(beyond, made(name)(ids, use_cache=False).logits)
    torch.testing.assert_close(below, made(name)(ids[:, :9], use_cache=False).logits)


@pytest.mark.parametrize("prompt", [LIMIT - 10, LIMIT, LIMIT + 5])
def test_tokens_across_the_length_are_transformers_own(name: str, fast: lethe.OptimizedModel, prompt: int) -> None:
    ids = ids_of(1, prompt)
    assert (fast.restart_at == LIMIT) == (name in RECOMPUTE)
    expected = made(name).generate(ids, attention_mask=torch.ones_like(ids), use_cache=name not in RECOMPUTE, **GREEDY)
    assert torch.equal(fast.generate(ids, **GREEDY), expected)


def test_stretched_positions_are_the_limit() -> None:
    fast = lethe.optimize(made("llama"), policy="full")
    assert fast.max_positions == 4 * LIMIT


@pytest.fixture(scope="module")
def pruned() -> lethe.OptimizedModel:
    settings = LetheConfig(max_tokens=20, prune_threshold=16, prune_interval=4, page_size=4, protect_prompt=False)
    return lethe.optimize(made("phi3"), settings)


@torch.no_grad()
def test_a_cache_made_anew_is_whole_again_and_then_pruned_again(pruned: lethe.OptimizedModel) -> None:
    ids, prompt = ids_of(2, 34), 34
    ids[1, :7] = 0
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    out = pruned.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY)
    at = LIMIT + 1 - prompt  # the step after the first row's token of that number
    whole = out.sequences[:1, : LIMIT + 1]
    torch.testing.assert_close(
        out.logits[at][:1], made("phi3")(whole, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-4
    )
    stats = pruned.cache_stats()
    assert stats.seen == [prompt + NEW - 1, prompt - 7 + NEW - 1]
    assert all(tokens <= 24 for layer in stats.retained for tokens in layer)


def test_rows_that_ended_are_not_filled_again(pruned: lethe.OptimizedModel) -> None:
    ids, options = ids_of(2, 34), {**GREEDY, "pad_token_id": 96}
    with pruned.unpruned():
        free = pruned.generate(ids, **options)
        end = int(free[0, 36])
        stopped = pruned.generate(ids, **{**options, "eos_token_id": end})
    length = int((free[1, 34:] == end).nonzero()[0]) + 35 if (free[1, 34:] == end).any() else 34 + NEW
    assert torch.equal(stopped[1, :length], free[1, :length])
    assert stopped[0, 37:].eq(96).all() and pruned.cache_stats().seen[0] < LIMIT


def test_transformers_loop_makes_it_anew_too(pruned: lethe.OptimizedModel) -> None:
    ids = ids_of(1, 34)
    model = pruned.as_hf()
    with pruned.unpruned():
        looped = model.generate(ids, past_key_values=model.new_cache(), **GREEDY)
        assert torch.equal(looped, pruned.generate(ids, **GREEDY))


def test_an_embedding_of_another_kind_is_left_alone() -> None:
    class Own(nn.Module):
        rope_type = "longrope"

        def forward(self, x: Tensor) -> Tensor:
            return x

    own = Own()
    with rope_captured(own):
        assert "forward" not in vars(own)

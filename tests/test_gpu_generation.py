"""Whole generations on a GPU: identity without pruning, the eviction oracle with it, ends of rows, repeatability.

On a CPU the same bodies run under ``-m slow``. Compiling a model for CUDA graphs takes most of a minute, and what it
adds is the same for all: four architectures go that way, the others run the same kernels node by node.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.models.plain_decoder import plain
from lethe_compile.models.tiny import CONFIGS, tiny
from tests import per_head
from tests.oracle import PRUNING, assert_original_agrees

GREEDY = {"do_sample": False, "pad_token_id": 0}
GRAPHED = ("llama", "gemma2", "gemma3n_text", "deepseek_v3")  # the last caches latents


def backend(name: str) -> str:
    return "auto" if name in GRAPHED else "eager"


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """With float32 products in float32: TF32 would drown what these tests compare."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before)


def ragged(rows: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Prompts of unequal length, padded on the left."""
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(tokens) >= torch.arange(rows)[:, None] * tokens // (rows + 1)).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "gemma3n_text", "deepseek_v3"])
def test_tokens_are_those_of_transformers(name: str, device: torch.device) -> None:
    model = tiny(name).to(device)
    fast = lethe.optimize(model, lethe.LetheConfig(policy="full"), backend=backend(name))
    for rows in (1, 3):
        prompt = ragged(rows, 14, device)
        options = {**GREEDY, "max_new_tokens": 40, "eos_token_id": None}
        expected = model.generate(**prompt, **options)
        assert fast.generate(**prompt, **options).tolist() == expected.tolist()
    assert len(set(expected[:, 14:].flatten().tolist())) > 4, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("name", [*CONFIGS, "gemma3n_text", "deepseek_v3", "plain"])
def test_pruned_logits_match_the_oracle(name: str, pruning: str, device: torch.device) -> None:
    model: Any = (plain() if name == "plain" else tiny(name)).to(device)
    choice = backend(name) if pruning == "lethe" else "eager"
    shows = pruning != "literal" and name != "mistral"  # a windowed layer may lose only what it cannot see
    assert_original_agrees(model, PRUNING[pruning], tolerance=1e-3, evictions_show=shows, backend=choice)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bloom", "mimo_v2_flash"])
def test_kv_heads_with_tokens_of_their_own(name: str, device: torch.device) -> None:
    """Tokens of transformers without eviction, and the original under a mask per head with it; llama by CUDA graphs."""
    model = tiny(name).to(device)
    fast = lethe.optimize(model, per_head.CONFIG, backend="auto" if name == "llama" else "eager")
    with fast.unpruned():
        prompt, options = ragged(3, 14, device), {**GREEDY, "max_new_tokens": 40, "eos_token_id": None}
        assert fast.generate(**prompt, **options).tolist() == model.generate(**prompt, **options).tolist()
    evictions = per_head.assert_replay_agrees(model, fast, tolerance=1e-3)
    assert all(min(layer) >= 2 for layer in fast.cache_stats().rounds), "every layer and row, repeatedly"
    assert evictions.first[1, 1, 0] != evictions.first[1, 1, 1] and fast.cache.bytes_in_use == 0


def ended(rows: list[list[int]], ends: tuple[int, ...]) -> list[list[int]]:
    """Each row up to the first of the ids that end it."""
    return [row[: next((n for n, token in enumerate(row, 1) if token in ends), len(row))] for row in rows]


def ends_apart(rows: list[list[int]]) -> tuple[int, ...]:
    """Three ids that end three rows at steps far apart, all of them early."""
    for ends in combinations(sorted({token for row in rows for token in row}), 3):
        lengths = sorted(map(len, ended(rows, ends)))
        if lengths[2] < len(rows[0]) and min(lengths[1] - lengths[0], lengths[2] - lengths[1]) >= 5:
            return ends
    raise AssertionError("no ids end these rows at three steps: use another model")


@pytest.mark.parametrize("policy", ["full", "lethe"])
def test_rows_end_at_different_steps(policy: str, device: torch.device) -> None:
    """A row that ended changes nothing in the others, and its own cache takes no further token."""
    model = tiny("qwen3").to(device)
    config = lethe.LetheConfig(policy="full") if policy == "full" else PRUNING["lethe"]
    fast = lethe.optimize(model, config, backend="eager" if policy == "full" else "auto", verified=False)
    prompt, options = ragged(3, 14, device), {**GREEDY, "max_new_tokens": 60}
    free = fast.generate(**prompt, **options, eos_token_id=None)[:, 14:].tolist()
    ends = ends_apart(free)
    made = ended(free, ends)
    longest = max(map(len, made))
    out = fast.generate(**prompt, **options, eos_token_id=list(ends))
    assert out[:, 14:].tolist() == [row + [0] * (longest - len(row)) for row in made]
    if policy == "full":
        assert out.tolist() == model.generate(**prompt, **options, eos_token_id=list(ends)).tolist()
    prompts = prompt["attention_mask"].sum(1).tolist()
    seen = [length + len(row) - 1 for length, row in zip(prompts, made, strict=True)]  # an end is not decoded
    assert fast.cache_stats().seen == seen


def test_a_long_pruned_run_repeats_bit_for_bit(device: torch.device) -> None:
    model = tiny("llama", max_position_embeddings=1024).to(device)
    fast = lethe.optimize(model, PRUNING["lethe"], verified=False)
    prompt = ragged(3, 14, device)
    options = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    first, second = (fast.generate(**prompt, **options, max_new_tokens=600) for _ in range(2))
    assert min(map(min, fast.cache_stats().rounds)) >= 2, "every layer and row must have been pruned repeatedly"
    assert first.sequences.tolist() == second.sequences.tolist()
    assert torch.equal(torch.stack(first.logits), torch.stack(second.logits))

"""The eviction oracle: the original model, with a full cache and masks that hide what was evicted, agrees.

The rounds' keep-sets are recorded while the optimized model generates. The original then runs once over the whole
sequence, each layer under its own mask: query i sees key j unless a round before i's step evicted j from that layer.
Nothing of the compiler takes part in the replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

import lethe_compile as lethe
from lethe_compile.models.plain_decoder import PlainDecoder
from lethe_compile.models.static_decoder import StaticDecoder
from lethe_compile.tools._replay import Evictions

PRUNING = {
    "lethe": lethe.LetheConfig(
        sparse_ratio=1.2, segments=8, decay=0.9, prune_threshold=20, prune_interval=5, page_size=4, protect_prompt=False
    ),
    "capped": lethe.LetheConfig(
        sparse_ratio=1e9, decay=0.9, prune_threshold=16, prune_interval=4, max_tokens=24, page_size=8, recent_ratio=0.2
    ),
    "literal": lethe.LetheConfig(
        sparse_ratio=1.05, decay=0.8, score="sum", prune_threshold=18, prune_interval=3, paper_literal=True, page_size=2
    ),
}

_RANKED = ("streaming", "h2o", "tova", "snapkv", "pyramid", "morph", "rkv", "random")
POLICIES = {
    **{
        name: lethe.LetheConfig(
            policy=name, sink_tokens=2, prune_interval=4, max_tokens=24, page_size=4, protect_prompt=index % 2 == 0
        )
        for index, name in enumerate(_RANKED)
    },
    "lethe-budgets": replace(PRUNING["lethe"], policy="lethe-budgets"),
    "lethe-rasr": replace(PRUNING["capped"], policy="lethe-rasr", page_size=4),
    "lethe-uniform": replace(PRUNING["lethe"], policy="lethe-uniform", budget=0.6),
}
"""A config for each of the other policies."""


@contextmanager
def hidden_in_transformers(evictions: Evictions, row: int) -> Iterator[None]:
    """The n-th eager attention of a forward of transformers also hides what was evicted from layer n.

    Layers of another kind have no eager attention, and modules that several layers share have no number of their own.
    """
    calls = iter(range(10_000))

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **options: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(2, 3) * scaling
        if options.get("softcap"):
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        hidden = evictions.hidden(next(calls), row, query.shape[2], query.shape[1])
        scores = (scores + mask).masked_fill(hidden.to(query.device), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("eager", attention)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping["eager"]


@contextmanager
def hidden_in_sdpa(evictions: Evictions, row: int) -> Iterator[None]:
    """The n-th scaled_dot_product_attention of a forward hides what was evicted from layer n."""
    calls = iter(range(10_000))

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        tokens, mask = q.shape[2], attn_mask
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril() if mask is None else mask
        visible = causal & ~evictions.hidden(next(calls), row, tokens, q.shape[1]).to(q.device)
        return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf).softmax(-1) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield


def generate(
    model: Any, config: lethe.LetheConfig, new_tokens: int = 60, backend: str = "auto"
) -> tuple[Any, Any, Evictions, list[int]]:
    """Optimize and generate from three ragged prompts: (model, output, recorded evictions, prompt lengths)."""
    fast = lethe.optimize(model, config, verified=False, backend=backend)
    evictions = Evictions()
    fast.on_round.append(evictions)
    ids = torch.randint(3, 97, (3, 23), generator=torch.Generator().manual_seed(3)).to(fast.device)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[2, :15] = 0, 0
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, eos_token_id=None, **options)
    return fast, out, evictions, mask.sum(1).tolist()


@torch.no_grad()
def replay(model: Any, ids: Tensor, evictions: Evictions, row: int) -> tuple[Tensor, Tensor]:
    """Logits [T, vocab] of the original over one row's `ids` [1, T]: evicted tokens hidden, and nothing hidden."""
    if isinstance(model, (PlainDecoder, StaticDecoder)):
        with hidden_in_sdpa(evictions, row):
            replayed: Tensor = _whole(model, ids)
        return replayed, _whole(model, ids)
    with hidden_in_transformers(evictions, row):
        replayed = model(ids).logits[0]
    return replayed, model(ids).logits[0]


def _whole(model: PlainDecoder | StaticDecoder, ids: Tensor) -> Tensor:
    if isinstance(model, PlainDecoder):
        return model(ids)[0]  # type: ignore[no-any-return]
    model.setup_caches(1, ids.shape[1])  # as many slots as tokens: a mask of the tokens alone
    return model(ids, torch.arange(ids.shape[1], device=ids.device))[0]  # type: ignore[no-any-return]


def assert_original_agrees(
    model: Any,
    config: lethe.LetheConfig,
    *,
    tolerance: float,
    evictions_show: bool,
    backend: str = "auto",
    step: Any = None,
) -> None:
    """Generates from `model` pruned by `config`, and replays every row.

    With `evictions_show` the evictions must change the logits too: without that, agreement proves little. With `step`,
    a decode step of the model that was captured with a cache of its own, that is what is optimized.
    """
    fast, out, evictions, prompts = generate(model if step is None else step, config, backend=backend)
    rounds = fast.cache_stats().rounds
    assert all(min(layer) >= 2 for layer in rounds), "every layer and row must have been pruned repeatedly"
    logits = torch.stack(out.logits, dim=1)  # [rows, new, vocab]
    for row, prompt in enumerate(prompts):
        ids = out.sequences[row : row + 1, -prompt - logits.shape[1] :]
        expected, full = (one[prompt - 1 : -1] for one in replay(model, ids, evictions, row))
        torch.testing.assert_close(logits[row], expected, rtol=tolerance, atol=tolerance)
        if evictions_show:
            assert (full - expected).abs().max() > 1e-2, "evictions must change the logits to prove anything"

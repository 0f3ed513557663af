"""Policies for tests that keep other tokens for each KV head, and the eviction oracle for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.models.plain_decoder import PlainDecoder
from lethe_compile.policies import FullPolicy, Policy, RoundState, register
from lethe_compile.policies.base import Counts
from lethe_compile.tools._replay import Evictions
from lethe_compile.tools._replay import replay as replay_softmaxes
from tests.oracle import replay as replay_attention

CONFIG = lethe.LetheConfig(policy="picky-per-head", decay=0.9, prune_threshold=16, prune_interval=4, page_size=4)
PROMPT = 23
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@register
class PickyHeads(Policy):
    """Each row of each layer keeps the last 6 tokens, and of the others every 2nd, 3rd or 4th, from another one on."""

    name = "picky-per-head"
    per_head = True

    @property
    def decay(self) -> float | None:
        return self.config.decay

    def least_tokens(self, prompts: Counts, new_tokens: int, windows: Sequence[int | None]) -> Counts:
        everything = super().least_tokens(prompts, new_tokens, windows)
        return np.minimum(everything, np.maximum(prompts, self.config.cap_floor))

    def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        layers, rows, _ = state.mass.shape
        device = state.mass.device
        row = torch.arange(rows, device=device)[:, None]
        step = 2 + (torch.arange(layers, device=device)[:, None, None] + row) % 3  # [L, R, 1]
        seen = state.visible()
        recent = state.position >= state.next_position[:, None] - 6
        chosen = seen & (recent | ((state.position + row // 3) % step == 0))
        keep = torch.where((state.length >= self.config.prune_threshold)[:, :, None], chosen, seen)
        if limit is not None:
            keep &= keep.flip(2).cumsum(2).flip(2) <= limit[:, :, None]  # the newest
        return keep


@register
class FullHeads(FullPolicy):
    """Evicts nothing that a query could still see, with every KV head a row of the cache."""

    name = "full-heads"
    per_head = True


def prompts() -> dict[str, Tensor]:
    """Three of them, padded on the left."""
    ids = torch.randint(3, 90, (3, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :9], mask[2, :15] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_replay_agrees(
    model: Any, fast: lethe.OptimizedModel, *, new_tokens: int = 50, tolerance: float = 1e-4
) -> Evictions:
    """Generate, and compare with the original under masks that hide from each head what its KV head evicted."""
    evictions = Evictions()
    fast.on_round[:] = [evictions]
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    given = {name: value.to(fast.device) for name, value in prompts().items()}
    out = fast.generate(**given, **options, max_new_tokens=new_tokens)
    logits, shown = torch.stack(out.logits, dim=1), 0.0
    for row, prompt in enumerate(prompts()["attention_mask"].sum(1).tolist()):
        ids = out.sequences[row : row + 1, PROMPT - prompt :]
        if isinstance(model, PlainDecoder):
            expected, full = replay_attention(model, ids, evictions, row)
        else:
            expected = replay_softmaxes(lambda ids: model(ids).logits, ids, evictions, row)
            full = replay_softmaxes(lambda ids: model(ids).logits, ids, Evictions(), row)
        torch.testing.assert_close(logits[row], expected[prompt - 1 : -1], rtol=tolerance, atol=tolerance)
        shown = max(shown, float((full - expected).abs().max()))
    assert shown > 1e-2, "evictions must change the logits to prove anything"
    fast.on_round.clear()
    return evictions

"""Why a model is refused, where what was met first is not the reason: it is not causal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lethe_compile.errors import UnsupportedGraphError

_TOKENS, _KEPT = 13, 7  # of a sample, and those at its beginning whose logits must not change
_LEAST = {torch.float64: 1e-4, torch.float32: 1e-4}  # relative: experts that sort their tokens round otherwise


@contextmanager
def causality_told(original: Callable[[Mapping[str, Tensor]], Tensor], device: torch.device) -> Iterator[None]:
    """Let a refusal raised in this context say so if later tokens change what the model says of earlier ones.

    `original` computes logits from inputs by role.
    """
    try:
        yield
    except UnsupportedGraphError as refusal:
        if _is_causal(original, device):
            raise
        raise UnsupportedGraphError(
            f"the model is not causal: later tokens change the logits of earlier ones ({refusal.reason})",
            layer=refusal.layer,
            node=refusal.node,
            where=refusal.where,
            hint="it generates by reading the whole text anew at every step: there is no KV cache to prune",
        ) from refusal


@torch.no_grad()
def _is_causal(original: Callable[[Mapping[str, Tensor]], Tensor], device: torch.device) -> bool:
    ids = torch.ones(2, _TOKENS, dtype=torch.int64, device=device)
    ids[:, 1::3] = 2  # ids that every vocabulary has, and no padding, which often is 0
    ids[1, _KEPT:] = 3 - ids[1, _KEPT:]
    positions = torch.arange(_TOKENS, device=device).repeat(2, 1)
    try:
        logits = original({"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)})
    except Exception:  # a model that does not even run is refused for that
        return True
    one, other = logits[:, :_KEPT].double()
    return not bool((one - other).norm() > _LEAST.get(logits.dtype, 5e-2) * one.norm())

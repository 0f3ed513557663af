"""A training loss for sharp attention: the mean entropy of attention rows, on a sample of the queries.

A small model leaves idle heads spread over everything it has seen, which large models do not: their idle heads rest
on a sink. The spread drowns the attention mass of tokens that are really read, and with it every score-based rule
of cache pruning. Penalising entropy gives idle heads a resting place, and costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SAMPLED = 32  # query positions per batch and layer: the full matrix would not fit


class EntropyMeter:
    """Causal SDPA for transformers' attention interface that also collects the entropy of sampled rows, in nats."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """q [b, H, t, D] and k, v [b, Hkv, t, D] to [b, t, H, D]; `mask` must be None (whole sequences, causal)."""
        if mask is not None:
            raise ValueError("the entropy loss is for unmasked causal batches")
        dtype = v.dtype if not torch.is_autocast_enabled(q.device.type) else torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        self.terms.append(sampled_entropy(q, k, scaling))
        return out.transpose(1, 2).contiguous(), None

    def drain(self) -> Tensor:
        """Mean entropy over the layers since the last call."""
        mean = torch.stack(self.terms).mean()
        self.terms.clear()
        return mean


def sampled_entropy(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """Mean entropy of SAMPLED random causal rows of softmax(q·kᵀ): q [b, H, t, D], k [b, Hkv, t, D]."""
    batch, heads, length, dim = q.shape
    rows = torch.randint(length, (SAMPLED,), device=q.device)
    sample = q[:, :, rows].view(batch, k.shape[1], heads // k.shape[1] * SAMPLED, dim)
    logits = (sample @ k.transpose(2, 3)).float() * scaling
    hidden = torch.arange(length, device=q.device) > rows[:, None]
    logits = logits.view(batch, heads, SAMPLED, length).masked_fill(hidden, -1e9)
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


@contextmanager
def metered_attention() -> Iterator[EntropyMeter]:
    """Within the block, models with `sdpa` attention feed the meter."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    meter = EntropyMeter()
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = torch.compiler.disable(meter.attend)  # its list must not be traced
    try:
        yield meter
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original

"""Values of padding tokens go, where the condition is that a token is none; nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lethe_compile as lethe
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.models.tiny import tiny


class Padded(nn.Module):
    """A decoder whose embeddings of padding tokens are replaced."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.decoder, self.mode = tiny("llama", num_hidden_layers=1), mode

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask.bool() if self.mode != "reversed" else ~attention_mask.bool()
        if self.mode == "all but the first":
            kept = attention_mask.cumsum(1) > 1
        ids = torch.where(kept, input_ids, 5)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        logits: Tensor = self.decoder(
            ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits
        return logits


def test_tokens_keep_their_values() -> None:
    model, ids = Padded("tokens"), torch.randint(3, 90, (2, 9))
    fast = lethe.optimize(model, policy="full")
    torch.testing.assert_close(fast(ids), model(ids, torch.ones_like(ids)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["reversed", "all but the first"])
def test_other_conditions_are_refused(mode: str) -> None:
    with pytest.raises(UnsupportedGraphError, match="attention_mask is read by"):
        lethe.optimize(Padded(mode), policy="full")

"""Insertion: the cache's tensors become inputs, layers of one geometry share a pool, and no mask is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lethe_compile.capture import capture
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.models.tiny import tiny
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.insert_attention import InsertAttention
from lethe_compile.passes.program import CACHED_OP, SITE_OP, shape_of
from tests.passes.toy import Toy, causal, optimized, program_after


def narrow(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return causal(toy, query, key[:, :1], value[:, :1])


def test_inputs_are_the_cache_and_the_op_alone_writes() -> None:
    captured = capture(Toy(causal, narrow, causal))
    program = run_pipeline(captured.program, pipeline(0.9, peak=True)).program
    shapes = {str(n.target): shape_of(n) for n in program.placeholders()}
    pools = [f"{name}_{group}" for group in (0, 1) for name in ("k_pages", "v_pages", "slot_position", "slot_mass")]
    assert list(shapes) == ["input_ids", "positions", "new_lengths", *pools, "page_table", "length"]
    assert [s.cache_group for s in program.sites] == [0, 1, 0]
    assert shapes["k_pages_0"][1::2] == (2, 8) and shapes["k_pages_1"][1::2] == (1, 8)
    assert shapes["page_table"][0] == 3
    calls = [n for n in program.graph.nodes if n.target is CACHED_OP]
    assert [n.args[-3:] for n in calls] == [(layer, 0.9, True) for layer in range(3)]
    assert calls == [s.node for s in program.sites]
    assert not any(n.target is SITE_OP for n in program.graph.nodes)


def test_an_unproved_mask_is_refused() -> None:
    program = program_after(Toy(causal), "fold-repeat-kv")
    with pytest.raises(UnsupportedGraphError, match="its mask was not classified") as refused:
        InsertAttention().run(program)
    assert refused.value.layer == 0


class Padded(nn.Module):
    """Reads the padding mask outside of attention: its embeddings are multiplied by what `factor` makes of it."""

    def __init__(self, factor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decoder, self.factor = tiny("llama", num_hidden_layers=1), factor
        self.decoder.set_attn_implementation("sdpa")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.decoder.get_input_embeddings()(input_ids) * self.factor(attention_mask)
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        logits: Tensor = self.decoder(
            inputs_embeds=embedded, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits
        return logits


def test_what_else_reads_the_padding_mask_finds_real_tokens() -> None:
    model = Padded(lambda mask: mask[..., None])
    fast = optimized(model)
    ids = torch.randint(90, (2, 7))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), model(ids, torch.ones_like(ids)), rtol=1e-4, atol=1e-5)
        alone = model(ids[1:, 3:], torch.ones(1, 4, dtype=torch.int64))
    torch.testing.assert_close(fast(ids, attention_mask=mask)[1:, 3:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "factor",
    [lambda mask: mask.cumsum(1)[..., None], lambda mask: mask.sum(1)[:, None, None]],
    ids=["numbers", "counts"],
)
def test_what_counts_the_padding_mask_is_refused(factor: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedGraphError, match="depends on the number of tokens and is not their positions"):
        run_pipeline(capture(Padded(factor)).program, pipeline(None))

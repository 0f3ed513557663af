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
from tests.passes.toy import Toy, assert_computes_the_same, causal, masked, optimized, program_after


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
    assert [n.args[-4:] for n in calls] == [(layer, 0.9, True, False) for layer in range(3)]
    assert calls == [s.node for s in program.sites]
    assert not any(n.target is SITE_OP for n in program.graph.nodes)


def test_kv_heads_become_rows_of_one_pool() -> None:
    """Layers of two KV heads and of one: rows beyond the one get no token, and what repeats is made once a step."""
    captured = capture(Toy(causal, narrow, causal))
    program = run_pipeline(captured.program, pipeline(0.9, per_head=True)).program
    shapes = {str(n.target): shape_of(n) for n in program.placeholders()}
    rows = shape_of(program.input_ids)[0]
    assert [s.cache_group for s in program.sites] == [0, 0, 0] and "k_pages_1" not in shapes
    assert [s.keep_sets for s in program.sites] == [2, 1, 2]
    assert shapes["k_pages_0"][1::2] == (1, 8) and shapes["v_pages_0"][1::2] == (1, 8)
    assert shapes["page_table"][:2] == (3, 2 * rows) and shapes["length"] == (3, 2 * rows)
    calls = [n for n in program.graph.nodes if n.target is CACHED_OP]
    assert [shape_of(call.args[0])[:2] for call in calls] == [(2 * rows, 2), (2 * rows, 4), (2 * rows, 2)]
    assert len({call.args[9] for call in calls}) == 1, "positions are repeated once a step"
    assert calls[0].args[10] is calls[2].args[10] is not calls[1].args[10]
    assert calls == [s.node for s in program.sites]


def first(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    toy.now.key, toy.now.value = key, value
    return causal(toy, query, key, value)


def same(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return causal(toy, query, toy.now.key, toy.now.value)


def same_keys(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return causal(toy, query, toy.now.key, value)


def same_windowed(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    index = torch.arange(query.shape[2])
    age = index[:, None] - index
    return masked(lambda toy, tokens: (age >= 0) & (age < 5))(toy, query, toy.now.key, toy.now.value)


def test_layers_of_the_same_keys_and_values_share_a_cache() -> None:
    """Not where values are others, nor under another mask, which may drop what this layer still sees."""
    model = Toy(first, same, same_keys, same_windowed, same)
    fast = optimized(model)
    assert [(site.cache, site.shares) for site in fast.sites] == [
        (0, False),
        (0, True),
        (1, False),
        (2, False),
        (0, True),
    ]
    assert [layer.cache_of for layer in fast.report().layers] == [0, 0, 2, 3, 0]
    assert fast.report().bytes_per_token == 3 * fast.report().layers[0].bytes_per_token
    assert "layer 0's" in str(fast.report())
    assert_computes_the_same(model, fast)
    assert len(fast.cache_stats().retained) == 3


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

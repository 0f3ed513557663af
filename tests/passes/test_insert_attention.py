"""Insertion: the cache's tensors become inputs, layers of one geometry share a pool, and no mask is left."""

from __future__ import annotations

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
from tests.passes.toy import Toy, causal, program_after


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


class Pooling(nn.Module):
    """Reads the padding mask outside of attention: its embeddings are scaled by it."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = tiny("llama", num_hidden_layers=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.decoder.get_input_embeddings()(input_ids) * attention_mask[..., None]
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        logits: Tensor = self.decoder(
            inputs_embeds=embedded, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits
        return logits


def test_another_use_of_the_padding_mask_is_refused() -> None:
    model = Pooling()
    model.decoder.set_attn_implementation("sdpa")
    with pytest.raises(
        UnsupportedGraphError, match=r"attention_mask is read by 'unsqueeze.*, which is no attention mask"
    ):
        run_pipeline(capture(model).program, pipeline(None))

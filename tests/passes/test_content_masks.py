"""Masks that read the content: kept as operands over positions, cached for their keys, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lethe_compile.capture import capture
from lethe_compile.errors import InputError, UnsupportedGraphError
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.program import COLUMNS_OP, VISIBLE_OP, shape_of
from lethe_compile.past import Past
from tests.passes.toy import HEAD_DIM, WIDTH, Attend, Toy, assert_computes_the_same, causal, optimized, program_after

KEPT = 5


def placed(*attends: Attend) -> Toy:
    """Positions keep equal tokens from equal scores, of which any may be taken."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(40, WIDTH, generator=generator)
    return Toy(*attends, embed=lambda toy, x: x + toy.get_buffer("table")[: x.shape[1]], table=table)


def tril(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def top(scores: Tensor) -> Tensor:
    """[B, T, T] bool of the highest scores of each query, later tokens left out."""
    seen = tril(scores.shape[1])
    index = scores.masked_fill(~seen, -torch.inf).topk(torch.sym_min(KEPT, scores.shape[1])).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True) & seen


def indexed(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The keys that an index of 8 numbers a token ranks highest: `index`, kept for layers that share the choice."""
    index_query, index_key = query[:, 0], key[:, 0] * 2.0
    toy.now.mask = top(torch.relu(index_query @ index_key.mT) - index_query @ index_key.flip(-1).mT)[:, None]
    return attended(query, key, value, toy.now.mask)


def shared(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attended(query, key, value, toy.now.mask)


def by_value(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """An additive bias of each head from the key's value alone, in the kept places, and the lowest number elsewhere."""
    scores = value.sum(-1)[:, 0, None].expand(-1, query.shape[2], -1) + 0.0
    bias = value.mean(-1).repeat_interleave(2, dim=1)[:, :, None]
    return attended(query, key, value, bias.masked_fill(~top(scores)[:, None], torch.finfo(torch.float32).min))


def in_blocks(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The best two blocks of four keys: a number of blocks and a padding that follow from the number of tokens."""
    tokens = query.shape[2]
    blocks = -(-tokens // 4)
    scores = (query[:, 0] @ key[:, 0].mT).masked_fill(~tril(tokens), -torch.inf)
    padded = F.pad(scores, (0, blocks * 4 - tokens), value=-torch.inf)
    best = padded.view(*scores.shape[:2], blocks, 4).amax(-1).topk(torch.sym_min(2, blocks)).indices
    kept = torch.zeros(*scores.shape[:2], blocks, dtype=torch.bool).scatter(-1, best, True)
    mask = kept.repeat_interleave(4, dim=-1)[..., :tokens] & tril(tokens)
    return attended(query, key, value, mask[:, None])


def by_distance(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A bias by distance, from what the query says of each distance."""
    tokens = torch.arange(query.shape[2])
    distance = (tokens[:, None] - tokens[None, :])[None, None].clamp(0, HEAD_DIM - 1)
    bias = query.gather(-1, distance.expand(*query.shape[:2], -1, -1))
    return attended(query, key, value, bias.masked_fill(~tril(query.shape[2]), -torch.inf))


KEPT_MASKS: dict[str, tuple[Attend, ...]] = {
    "an index": (indexed, causal),
    "an index that layers share": (indexed, shared, indexed, shared),
    "values of keys": (by_value, by_value),
    "blocks of keys": (in_blocks, in_blocks),
    "distances": (by_distance, indexed),
}


@pytest.mark.parametrize("attends", KEPT_MASKS.values(), ids=KEPT_MASKS)
def test_masks_by_content_compute_the_same(attends: tuple[Attend, ...]) -> None:
    model = placed(*attends)
    assert_computes_the_same(model, optimized(model))


def test_what_masks_read_of_keys_is_cached_beside_them() -> None:
    program = program_after(Toy(indexed, causal, shared), "insert-attention")
    index, plain, follower = program.sites
    assert (index.content, plain.content, follower.content) == (True, False, True)
    assert index.columns * index.kv_heads >= HEAD_DIM and not plain.columns and not follower.columns
    assert index.geometry == (2, HEAD_DIM + index.columns, HEAD_DIM, False) and index.cache_group != plain.cache_group
    shapes = {str(n.target): shape_of(n) for n in program.placeholders()}
    assert shapes[f"k_pages_{index.cache_group}"][3] == HEAD_DIM + index.columns
    assert len(shapes["seen"]) == 1
    reads = [n.args[-1] for n in program.graph.nodes if n.target in (COLUMNS_OP, VISIBLE_OP)]
    assert reads.count(0) >= 2 and 1 not in reads, "what the first layer ranks is what it retains"
    assert all(site.mask is not None and site.mask.kind == "causal" for site in program.sites)


def scored(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    toy.now.scores = query[:, 0] @ key[:, 0].mT
    return attended(query, key, value, top(toy.now.scores)[:, None])


def ranked_again(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attended(query, key, value, top(-toy.now.scores)[:, None])


def test_a_layer_that_ranks_another_layers_keys_keeps_them_for_itself() -> None:
    """The other layer may have evicted what this one retains."""
    model = placed(scored, ranked_again)
    program = program_after(model, "insert-attention")
    assert [site.columns * site.kv_heads for site in program.sites] == [HEAD_DIM, HEAD_DIM]
    assert_computes_the_same(model, optimized(model))


def by_token(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    ids = toy.now.tokens
    return attended(query, key, value, ((ids[:, None] != ids[:, :, None]) & tril(ids.shape[1]))[:, None])


def two_sided(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attended(query, key, value, (query[:, :1] @ key[:, :1].mT) > 0)


def flattened(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows, tokens = query.shape[0], query.shape[2]
    every = (query[:, 0].flatten(0, 1) @ key[:, 0].flatten(0, 1).mT).view(rows, tokens, rows, tokens)
    return attended(query, key, value, ((every[:, :, 0] > 0) & tril(tokens))[:, None])


REFUSED: dict[str, tuple[Attend, str]] = {
    "a key of integers": (by_token, "of earlier tokens, torch.int64, which cannot be kept as torch.float32"),
    "no causal part": (two_sided, "nothing in it hides later tokens"),
    "rows in one with tokens": (flattened, "which does not tell queries from keys"),
}


@pytest.mark.parametrize(("attend", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_is_refused(attend: Attend, reason: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=reason) as refused:
        program_after(Toy(attend), "content-masks")
    assert refused.value.layer == 0


def test_positions_must_tell_tokens_apart() -> None:
    model, ids = Toy(indexed), torch.randint(29, (2, 9))
    fast = optimized(model)
    positions = torch.arange(9).repeat(2, 1)
    torch.testing.assert_close(fast(ids, position_ids=positions + 3), model(ids), rtol=1e-4, atol=1e-5)
    positions[1, 4] = 3
    with pytest.raises(InputError, match="position_ids must increase"):
        fast(ids, position_ids=positions)


def test_another_cache_does_not_hold_what_masks_read() -> None:
    fast = optimized(Toy(indexed))
    past = Past(
        [torch.zeros(1, 2, 4, HEAD_DIM)], [torch.zeros(1, 2, 4, HEAD_DIM)], [torch.arange(4)[None]], torch.tensor([4])
    )
    with pytest.raises(InputError, match=r"layers \[0\] read more of earlier tokens"):
        fast.forward_after(past, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="generate from the prompt"):
        fast.adopt(past)


def test_a_graph_without_such_masks_is_left_alone() -> None:
    program: Any = program_after(Toy(causal), "content-masks")
    assert not program.content and program.placeholder("seen") is None


def test_a_mask_by_content_is_refused_where_heads_keep_tokens_of_their_own() -> None:
    with pytest.raises(UnsupportedGraphError, match="what the layer retains, and a policy that keeps other") as refused:
        run_pipeline(capture(placed(causal, indexed)).program, pipeline(None, per_head=True))
    assert refused.value.layer == 1 and "lethe" in str(refused.value)

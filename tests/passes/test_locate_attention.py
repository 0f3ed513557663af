"""Attention is found in each spelling we know; whatever may be attention in another is refused, never left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lethe_compile.errors import UnsupportedGraphError
from tests.passes.toy import HEAD_DIM, Toy, assert_computes_the_same, causal, optimized, program_after

KNOWN = {
    "enable_gqa": causal,
    "by name": lambda toy, q, k, v: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=None, is_causal=True, enable_gqa=True
    ),
    "scaled": lambda toy, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True),
    "one KV head for all": lambda toy, q, k, v: F.scaled_dot_product_attention(
        q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True
    ),
    "narrow values": lambda toy, q, k, v: F.pad(
        F.scaled_dot_product_attention(q, k, v[..., :6], is_causal=True, enable_gqa=True), (0, 2)
    ),
    "ungrouped": lambda toy, q, k, v: torch.cat(
        [F.scaled_dot_product_attention(q[:, i::2], k, v, is_causal=True) for i in (0, 1)], dim=1
    ),
}


@pytest.fixture(scope="module")
def known() -> Toy:
    return Toy(*KNOWN.values())


def test_every_known_spelling_is_located(known: Toy) -> None:
    sites = program_after(known, "locate-attention").sites
    assert [(s.heads, s.kv_heads, s.v_dim) for s in sites] == [
        *((4, 2, 8), (4, 2, 8), (4, 2, 8), (4, 1, 8), (4, 2, 6)),
        *((2, 2, 8), (2, 2, 8)),  # two attentions of one layer
    ]
    assert [s.layer for s in sites] == list(range(7))
    assert sites[2].scale == 0.5 and sites[0].scale == pytest.approx(HEAD_DIM**-0.5)
    assert {(s.kv_heads, s.v_dim): s.cache_group for s in sites} == {(2, 8): 0, (1, 8): 1, (2, 6): 2}


def test_located_attention_computes_the_same(known: Toy) -> None:
    assert_computes_the_same(known, optimized(known))


def by_log_softmax(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.repeat_interleave(2, 1).mT
    hidden = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).log_softmax(-1).exp() @ value.repeat_interleave(2, 1)


def by_exponentials(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query @ key.repeat_interleave(2, 1).mT).exp().tril()
    return scores / scores.sum(-1, keepdim=True) @ value.repeat_interleave(2, 1)


def linear(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.repeat_interleave(2, 1).mT).tril() @ value.repeat_interleave(2, 1)


def checkpointed(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = checkpoint(causal, toy, query, key, value, use_reentrant=False)
    return out


def scaled_by_content(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale: Any = query.abs().amax().item()
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def shorter_keys(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key[:, :, 1:], value[:, :, 1:], is_causal=True, enable_gqa=True)


def shorter(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.pad(causal(toy, query[:, :, 1:], key[:, :, 1:], value[:, :, 1:]), (0, 0, 1, 0))


def flattened(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    flat = (x.flatten(0, 1) for x in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)))
    return F.scaled_dot_product_attention(*flat, is_causal=True).view_as(query)


def dropped(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True, enable_gqa=True)


OTHERS = {
    by_log_softmax: "attention in a form that is not recognised",
    scaled_by_content: "the scale is not a constant|cannot be exported",
    shorter_keys: "queries meet .* keys, where the input has",
    shorter: "queries meet .* keys, where the input has",
    flattened: "its query is .*, not \\[batch, heads, tokens, head_dim\\]",
    dropped: "it applies dropout",
}


@pytest.mark.parametrize("attend", OTHERS, ids=lambda attend: attend.__name__)
def test_another_attention_is_refused_by_layer_and_node(attend: Any) -> None:
    with pytest.raises(UnsupportedGraphError, match=OTHERS[attend]) as refused:
        program_after(Toy(causal, attend), "locate-attention")
    if "exported" not in refused.value.reason:
        assert refused.value.layer == 1 and refused.value.node is not None
        assert refused.value.where is not None and "toy.py" in refused.value.where


@pytest.mark.parametrize("attend", [by_exponentials, linear], ids=lambda attend: attend.__name__)
def test_attention_without_a_softmax_is_refused(attend: Any) -> None:
    with pytest.raises(UnsupportedGraphError, match="relates every token to every other") as refused:
        program_after(Toy(causal, attend), "insert-attention")
    assert refused.value.node is not None
    with pytest.raises(UnsupportedGraphError, match="no attention was found"):
        program_after(Toy(attend), "locate-attention")


def test_checkpointed_attention_is_located_or_refused() -> None:
    model = Toy(causal, checkpointed)
    try:
        fast = optimized(model)
    except UnsupportedGraphError as error:
        assert "attention inside the region of" in error.reason and error.layer == 1
    else:
        assert len(fast.sites) == 2
        assert_computes_the_same(model, fast)

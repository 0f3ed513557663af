"""Attention that is written out is read in every spelling we know, and proved; what resembles it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lethe_compile.errors import UnsupportedGraphError
from tests.passes.toy import HEAD_DIM, HEADS, Attend, Toy, assert_computes_the_same, causal, optimized, program_after

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
LOWEST = torch.finfo(torch.float32).min


def hidden(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


def age(tokens: int) -> Tensor:
    index = torch.arange(tokens)
    return index[:, None] - index


def written(score: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda p: p) -> Attend:
    """Attention of 4 heads whose scores are made by `score` from the products, and probabilities go through `after`."""

    def attend(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        return after(score(query @ key.mT).softmax(-1)) @ value

    return attend


def deny(x: Tensor) -> Tensor:
    return x.masked_fill(hidden(x.shape[-1]), -torch.inf)


def less_maximum(x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True)


def grouped(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query = query.unflatten(1, (2, 2))  # [B, KV heads, group, T, D]
    return (deny(query @ key[:, :, None].mT * 0.3).softmax(-1) @ value[:, :, None]).flatten(1, 2)


def batched(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Batch and heads as one dimension, ALiBi through `baddbmm`, as Bloom has it."""
    rows, tokens = query.shape[0], query.shape[2]
    q, k, v = (
        x.reshape(rows * HEADS, tokens, HEAD_DIM) for x in (query, *(x.repeat(1, 2, 1, 1) for x in (key, value)))
    )
    bias = (SLOPES[:, None, None] * torch.arange(tokens)).repeat(rows, 1, 1)
    scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.3).view(rows, HEADS, tokens, tokens)
    probability = (scores + torch.full((tokens, tokens), LOWEST).triu(1)).softmax(-1)
    return torch.bmm(probability.view(rows * HEADS, tokens, tokens), v).view_as(query)


def einsums(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(2, 1).transpose(1, 2) for x in (key, value))  # [B, T, H, D]
    scores = deny(torch.einsum("bqhd,bkhd->bhqk", query.transpose(1, 2), key))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).transpose(1, 2)


def in_float32(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = deny((query.double() @ key.double().mT) / 2.0)
    return scores.softmax(-1).to(value.dtype) @ value


def in_sdpa(mask: Callable[[int], Tensor]) -> Attend:
    return lambda toy, q, k, v: F.scaled_dot_product_attention(q, k, v, mask(q.shape[2]), enable_gqa=True)


KNOWN: dict[str, Attend] = {
    "mul, masked_fill": written(lambda x: deny(x * 0.3)),
    "div, add": written(lambda x: x / 3.0 + torch.full(x.shape[-2:], LOWEST).triu(1)),
    "add, div": written(lambda x: (x + torch.full(x.shape[-2:], -1e9).triu(1)) / 3.0),
    "where": written(lambda x: torch.where(hidden(x.shape[-1]), torch.full((), LOWEST), x)),
    "where, the other way round": written(lambda x: torch.where(~hidden(x.shape[-1]), x, LOWEST)),
    "zeros and minus ten thousand": written(
        lambda x: x * (~hidden(x.shape[-1])).float() + -1e4 * hidden(x.shape[-1]).float()
    ),
    "clamped": written(lambda x: torch.max(deny(x), torch.tensor(LOWEST))),
    "a stored scale": written(lambda x: deny(x / torch.sqrt(torch.tensor(HEAD_DIM)))),
    "less the maximum": written(lambda x: less_maximum(deny(x))),
    "softcap": written(lambda x: deny(torch.tanh(x * 0.4 / 2.0) * 2.0)),
    "masked where it is as large as the scores": written(
        lambda x: x.masked_fill(hidden(x.shape[-1])[None, None].expand_as(x), -torch.inf)
    ),
    "sliding window": written(lambda x: deny(x).masked_fill(age(x.shape[-1]) >= 5, -torch.inf)),
    "dropout that is off": written(deny, lambda p: F.dropout(p, 0.1, training=False)),
    "ALiBi": written(lambda x: deny(x - SLOPES[:, None, None] * age(x.shape[-1]))),
    "ALiBi of keys alone": written(lambda x: deny(x * 0.3 + SLOPES[:, None, None] * torch.arange(1 - x.shape[-1], 1))),
    "ALiBi in a mask": in_sdpa(lambda t: (-SLOPES[:, None, None] * age(t)).masked_fill(hidden(t), -torch.inf)),
    "ALiBi added to a mask": in_sdpa(lambda t: torch.full((t, t), -torch.inf).triu(1) - age(t) * 0.5),
    "grouped": grouped,
    "batched": batched,
    "einsums": einsums,
    "in another precision": in_float32,
    "by the interface": causal,
}


@pytest.fixture(scope="module")
def known() -> Toy:
    return Toy(*KNOWN.values())


def test_every_known_spelling_is_read(known: Toy) -> None:
    sites = dict(zip(KNOWN, program_after(known, "classify-masks").sites, strict=True))
    assert {name for name, site in sites.items() if site.found_by == "softmax"} == {
        name for name in KNOWN if "mask" not in name.split()[-1:] and name != "by the interface"
    }
    assert sites["mul, masked_fill"].scale == pytest.approx(0.3)
    assert sites["add, div"].scale == sites["div, add"].scale == pytest.approx(1 / 3)
    assert sites["a stored scale"].scale == pytest.approx(HEAD_DIM**-0.5)
    assert (sites["softcap"].softcap, sites["softcap"].scale) == (2.0, pytest.approx(0.4))
    assert sites["sliding window"].mask is not None and sites["sliding window"].mask.window == 5
    for name in ("ALiBi", "ALiBi of keys alone", "ALiBi in a mask"):
        assert sites[name].slopes == pytest.approx(SLOPES.tolist(), rel=1e-5)
    assert sites["batched"].slopes == pytest.approx((SLOPES / 2).tolist(), rel=1e-5)
    assert sites["ALiBi added to a mask"].slopes == pytest.approx([0.5] * 4, rel=1e-5)
    assert sites["grouped"].kv_heads == sites["mul, masked_fill"].kv_heads == 2
    assert sites["where"].slopes is None


@pytest.mark.slow
def test_what_was_read_computes_the_same(known: Toy) -> None:
    assert_computes_the_same(known, optimized(known))


def by_content(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return deny(query @ key.mT * query.abs().amax()).softmax(-1) @ value


def two_products(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return deny(query @ key.mT + query @ (key * 2).mT).softmax(-1) @ value


def used_twice(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    probability = deny(query @ key.mT).softmax(-1)
    return probability @ value + probability @ value.flip(-1)


OTHERS: dict[str, tuple[Attend, str]] = {
    "over queries": (
        lambda toy, q, k, v: deny(q @ k.repeat_interleave(2, 1).mT).softmax(-2) @ v.repeat_interleave(2, 1),
        "not over the last dimension",
    ),
    "scale by content": (by_content, "scaled by what is no constant"),
    "two products": (two_products, "two products meet"),
    "used twice": (used_twice, "2 uses"),
    "of no product": (
        lambda toy, q, k, v: deny(-torch.cdist(q, k.repeat_interleave(2, 1))).softmax(-1) @ v.repeat_interleave(2, 1),
        "no product of queries and keys",
    ),
    "half denied": (written(lambda x: x.masked_fill(hidden(x.shape[-1]), -3.0)), "does not deny"),
    "tanh alone": (written(lambda x: deny(torch.tanh(x))), "no softcap"),
    "capped after the mask": (written(lambda x: torch.tanh(deny(x)) * 2.0), "capped after"),
    "clamped from above": (written(lambda x: deny(x).clamp(max=3.0)), "clamped from above"),
    "probabilities changed": (written(deny, lambda p: p.sqrt()), "probabilities go through"),
    "gated without a mask": (
        written(lambda x: deny(x * (age(x.shape[-1]) != 2).float())),
        "computes something else",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_resembles_attention_is_refused(name: str) -> None:
    attend, reason = OTHERS[name]
    with pytest.raises(UnsupportedGraphError, match=reason) as refused:
        program_after(Toy(causal, attend), "locate-attention")
    assert refused.value.layer == 1 and refused.value.node is not None


BIASES: dict[str, tuple[Callable[[int], Tensor], str]] = {
    "square": (lambda t: -0.01 * age(t) ** 2, "not linear in the distance"),
    "clipped": (lambda t: -0.1 * age(t).clamp(max=64), "not linear|the length"),
    "by length": (lambda t: -age(t) / t, "the length of the sequence"),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_that_is_no_alibi_is_refused(name: str) -> None:
    bias, reason = BIASES[name]
    with pytest.raises(UnsupportedGraphError, match=reason) as refused:
        program_after(Toy(written(lambda x: deny(x + bias(x.shape[-1])))), "classify-masks")
    assert refused.value.layer == 0

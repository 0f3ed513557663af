"""Keys and values repeated over the query group are folded in every spelling that repeats in place, and in no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.fold_repeat_kv import FoldRepeatKV
from tests.passes.toy import Attend, Toy, assert_computes_the_same, optimized, program_after

Repeat = Callable[[Tensor], Tensor]


def repeating(key: Repeat, value: Repeat | None = None) -> Attend:
    def attend(toy: Toy, query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key(k), (value or key)(v), is_causal=True, enable_gqa=True)

    return attend


def expanded(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, 2, tokens, dim).reshape(batch, heads * 2, tokens, dim)


def expanded_before_transposing(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    batch, tokens, heads, dim = x.shape
    x = x[:, :, :, None, :].expand(batch, tokens, heads, 2, dim).reshape(batch, tokens, heads * 2, dim)
    return x.transpose(1, 2).contiguous()


FOLDED: dict[str, Repeat] = {
    "expand and reshape": expanded,
    "unsqueeze and expand": lambda x: x.unsqueeze(-3).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "repeat_interleave from behind": lambda x: x.repeat_interleave(2, dim=-3).contiguous(),
    "expand before transposing": expanded_before_transposing,
    "repeat_interleave before transposing": lambda x: x.transpose(1, 2).repeat_interleave(2, dim=2).transpose(1, 2),
    "one head of two, four times": lambda x: x[:, :1].repeat_interleave(4, dim=1),
    "enable_gqa": lambda x: x,
}

KEPT: dict[str, tuple[Attend, str | None]] = {
    "tiled": (repeating(lambda x: x.repeat(1, 2, 1, 1)), "KV heads are tiled, not grouped: left expanded"),
    "expanded in front": (repeating(lambda x: x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)), None),
    "keys alone": (
        repeating(expanded, lambda x: x.repeat(1, 2, 1, 1)),
        "keys and values are repeated differently: left so",
    ),
    "another number of keys": (
        repeating(expanded, lambda x: x[:, :1].repeat_interleave(4, dim=1)),
        "keys and values are repeated differently: left so",
    ),
}


@pytest.fixture(scope="module")
def model() -> Toy:
    return Toy(*map(repeating, FOLDED.values()), *(attend for attend, _ in KEPT.values()))


def test_copies_fold_and_tiles_stay(model: Toy) -> None:
    located = program_after(model, "locate-attention")
    (record,) = (result := run_pipeline(located, [FoldRepeatKV()])).records
    folded = dict(zip([*FOLDED, *KEPT], [site.kv_heads for site in result.program.sites], strict=True))
    assert folded == {name: 1 if name.startswith("one head") else 2 for name in FOLDED} | dict.fromkeys(KEPT, 4)
    assert {note.layer: note.text for note in record.refusals} == {
        len(FOLDED) + i: text for i, (_, text) in enumerate(KEPT.values()) if text
    }
    assert [note.layer for note in record.matches] == list(range(len(FOLDED) - 1)), "enable_gqa has nothing to fold"


def test_folded_or_not_the_numbers_stay(model: Toy) -> None:
    assert_computes_the_same(model, optimized(model))

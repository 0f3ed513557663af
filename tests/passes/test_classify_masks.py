"""Masks of many spellings are proved, with their windows; what only resembles a causal band is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.classify_masks import ClassifyMasks, prove
from lethe_compile.passes.mask_constants import NotABand
from lethe_compile.passes.program import Mask, Program
from tests.passes.toy import Toy, assert_computes_the_same, masked, optimized, program_after

MaskOf = Callable[[Toy, int], Tensor]


def age(tokens: int) -> Tensor:
    index = torch.arange(tokens)
    return index[:, None] - index


def same_chunk(tokens: int, size: int, shift: int = 0) -> Tensor:
    chunk = (torch.arange(tokens) + shift) // size
    return chunk[:, None] == chunk


def additive(allowed: Tensor, denied: float = -torch.inf) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, denied)


BANDS: dict[str, tuple[MaskOf, Mask]] = {
    "comparison": (lambda toy, t: age(t) >= 0, Mask()),
    "tril": (lambda toy, t: torch.ones(t, t, dtype=torch.bool).tril(), Mask()),
    "additive triu": (lambda toy, t: torch.full((t, t), -torch.inf).triu(1), Mask()),
    "lowest value": (lambda toy, t: additive(age(t) >= 0, torch.finfo(torch.float32).min), Mask()),
    "minus ten thousand": (lambda toy, t: (1.0 - (age(t) >= 0).float()) * -10000.0, Mask()),
    "minus a billion": (lambda toy, t: torch.where(age(t) >= 0, 0.0, -1e9), Mask()),
    "4-D": (lambda toy, t: (age(t) >= 0)[None, None].expand(toy.now.tokens.shape[0], 1, -1, -1), Mask()),
    "of the shape of the ids": (
        lambda toy, t: torch.ones_like(toy.now.tokens).bool()[:, None, None] & (age(t) >= 0),
        Mask(),
    ),
    "arange from one": (lambda toy, t: torch.arange(1, t + 1)[:, None] > torch.arange(t), Mask()),
    "stored": (lambda toy, t: toy.tril[:t, :t], Mask(longest=90)),
    "stored as nanoGPT does": (lambda toy, t: additive(toy.bias[:, :, :t, :t] != 0), Mask(longest=80)),
    "stored with a window": (lambda toy, t: toy.band[:t, :t], Mask(9, longest=64)),
    "cut from a table": (lambda toy, t: torch.ones(100, 100, dtype=torch.bool).tril()[:t, :t], Mask(longest=100)),
    "one token": (lambda toy, t: age(t) == 0, Mask(1)),
    "window": (lambda toy, t: (age(t) >= 0) & (age(t) < 7), Mask(7)),
    "window, inclusive": (lambda toy, t: (age(t) >= 0) & (age(t) <= 7), Mask(8)),
    "window, tril and triu": (lambda toy, t: torch.ones(t, t, dtype=torch.bool).tril().triu(-6), Mask(7)),
    "window, additive": (lambda toy, t: additive((age(t) >= 0) & (age(t) < 40)), Mask(40)),
    "window of blocks": (lambda toy, t: (age(t) >= 0) & (age(t) // 8 < 16), Mask(128)),
    "large window": (lambda toy, t: (age(t) >= 0) & (age(t) < 4096), Mask(4096)),
    "large window, inclusive": (lambda toy, t: (age(t) >= 0) & (age(t) <= 4096), Mask(4097)),
    "large window, shifted": (lambda toy, t: (age(t) >= 0) & (age(t) - 4096 < 0), Mask(4096)),
    "large window, tril and triu": (lambda toy, t: torch.ones(t, t, dtype=torch.bool).tril().triu(-4095), Mask(4096)),
    "large window, as a float": (lambda toy, t: (age(t) >= 0) & (age(t).float() < 4096.0), Mask(4096)),
    "large window, stored": (lambda toy, t: (age(t) >= 0) & (age(t) < toy.window), Mask(4096)),
    "chunks": (lambda toy, t: (age(t) >= 0) & same_chunk(t, 16), Mask(16, chunked=True)),
    "large chunks": (lambda toy, t: (age(t) >= 0) & same_chunk(t, 8192), Mask(8192, chunked=True)),
    "large window, beside another constant": (
        lambda toy, t: (age(t) > -2000) & (age(t) >= 0) & (age(t) < 4096),
        Mask(4096),
    ),
}

OTHERS: dict[str, tuple[MaskOf, str]] = {
    "bidirectional": (lambda toy, t: torch.ones(t, t, dtype=torch.bool), "not causal: a query sees later keys"),
    "one later key": (lambda toy, t: age(t) >= -1, "not causal: a query sees later keys"),
    "by head": (
        lambda toy, t: age(t) >= torch.tensor([0, 0, 1, 0])[:, None, None],
        "a stored table of|cannot be computed|head",
    ),
    "by content": (
        lambda toy, t: ((toy.now.tokens != 28)[:, None, None] & (age(t) >= 0)) | (age(t) == 0),
        "the content",
    ),
    "by what is computed": (lambda toy, t: (toy.embedding(toy.now.tokens).sum() > 0) & (age(t) >= 0), "the content"),
    "window with a hole": (lambda toy, t: (age(t) >= 0) & (age(t) < 7) & (age(t) != 3), "not a sliding window of 3"),
    "window off by one at the end": (
        lambda toy, t: ((age(t) >= 0) & (age(t) < 7)) | ((age(t) == 7) & (age(t)[:, :1] < 30)),
        "not a sliding window of 8",
    ),
    "sink and window": (
        lambda toy, t: (age(t) >= 0) & ((age(t) < 7) | (torch.arange(t) < 2)),
        "not a causal mask",
    ),
    "chunks that start late": (lambda toy, t: (age(t) >= 0) & same_chunk(t, 16, shift=3), "not a mask of chunks of 13"),
    "two chunks": (
        lambda toy, t: (age(t) >= 0) & (torch.arange(t)[:, None] // 16 - torch.arange(t) // 16 < 2),
        "not a sliding window of 32",
    ),
    "chunks by shifting": (
        lambda toy, t: (age(t) >= 0) & (torch.arange(t)[:, None] >> 12 == torch.arange(t) >> 12),
        "shifts",
    ),
    "window by a fraction": (lambda toy, t: (age(t) >= 0) & (age(t) * 0.001 < 1), "the fraction 0.001"),
    "half the sequence": (lambda toy, t: (age(t) >= 0) & (age(t) < t // 2), "the length of the sequence"),
    "twice a constant": (lambda toy, t: (age(t) >= 0) & (age(t) * 2 < 4096), "follows none of the constants"),
    "difference of constants": (lambda toy, t: (age(t) >= 0) & (age(t) + 900 < 4996), "follows none of the constants"),
    "blocks of blocks": (lambda toy, t: (age(t) >= 0) & (age(t) // 100 < 200), "follows none|too many constants"),
    "many constants": (lambda toy, t: (age(t) >= 0) & (age(t) // 40 // 40 < 40), "too many constants"),
    "stored, too long": (lambda toy, t: toy.long[None, :t] * (age(t) >= 0) > 0, "a stored table of 5000 tokens"),
    "stored, with a hole": (lambda toy, t: toy.hole[:t, :t], "not a causal mask: row 0, query 85, key 80"),
}

TABLES = {
    "tril": torch.ones(90, 90, dtype=torch.bool).tril(),
    "bias": torch.ones(80, 80).tril()[None, None],
    "band": torch.ones(64, 64, dtype=torch.bool).tril().triu(-8),
    "hole": torch.ones(91, 91, dtype=torch.bool).tril(),
    "long": torch.ones(5000),
    "window": torch.tensor(4096),
}
TABLES["hole"][85, 80] = False


@pytest.fixture(scope="module")
def located() -> Program:
    """One layer for each mask, so that one export serves them all."""
    masks = [*BANDS.values(), *OTHERS.values()]
    return program_after(Toy(*(masked(mask) for mask, _ in masks), **TABLES), "fold-repeat-kv")


@pytest.mark.parametrize("name", BANDS)
def test_a_band_is_proved(located: Program, name: str) -> None:
    site = located.sites[list(BANDS).index(name)]
    assert prove(located, site.node.args[3]) == BANDS[name][1]


@pytest.mark.parametrize("name", OTHERS)
def test_another_mask_is_refused(located: Program, name: str) -> None:
    site = located.sites[len(BANDS) + list(OTHERS).index(name)]
    with pytest.raises(NotABand, match=OTHERS[name][1]):
        prove(located, site.node.args[3])


def test_a_refusal_names_layer_and_node(located: Program) -> None:
    with pytest.raises(UnsupportedGraphError, match="a query sees later keys") as refused:
        ClassifyMasks().run(located)
    assert refused.value.layer == len(BANDS)
    assert refused.value.node == located.sites[len(BANDS)].node.name


def test_dropped_masks_leave_the_numbers_as_they_were() -> None:
    short = [mask for name, (mask, _) in BANDS.items() if "large" not in name]
    model = Toy(*map(masked, short), **TABLES)
    fast = optimized(model)
    assert fast.max_positions == 64, "the shortest stored mask limits the model"
    assert_computes_the_same(model, fast, lengths=(1, 8, 33))


def test_attention_without_a_mask_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match="not causal: it has no mask") as refused:
        program_after(
            Toy(lambda toy, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
            "classify-masks",
        )
    assert refused.value.layer == 0


def test_a_mask_of_another_layers_results_is_not_proved() -> None:
    """It depends on the content, which is another pass's business."""

    def first(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        toy.now.seen = masked(lambda toy, t: age(t) >= 0)(toy, query, key, value)
        return toy.now.seen

    model = Toy(first, masked(lambda toy, t: (age(t) >= 0) & (toy.now.seen[:, :1, :, :1] < 1e9)))
    with pytest.raises(UnsupportedGraphError, match="depends on what other layers compute") as refused:
        ClassifyMasks().run(program_after(model, "fold-repeat-kv"))
    assert refused.value.layer == 1

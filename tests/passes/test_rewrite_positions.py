"""Whatever counts the tokens of the input becomes the input `positions`; what cannot be told row by row is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lethe_compile.errors import UnsupportedGraphError
from tests.passes.toy import HEAD_DIM, WIDTH, Embed, Toy, assert_computes_the_same, causal, optimized, program_after

TABLE = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))


def sines(toy: Toy, x: Tensor) -> Tensor:
    """Sinusoidal positions whose frequencies are computed in the forward."""
    frequency = 100.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    angle = torch.outer(torch.arange(x.shape[1]).float(), frequency)
    return x + torch.cat([angle.sin(), angle.cos()], dim=-1)


def complex_rotation(toy: Toy, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2))
    rotation: Any = toy.rotation
    return torch.view_as_real(pairs * rotation[: x.shape[1]][None]).flatten(2)


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], x.shape[1])


COUNTED: dict[str, tuple[Embed, int | None]] = {  # the positions that the learned table has
    "arange": (lambda toy, x: x + F.embedding(torch.arange(x.shape[1]), toy.table), 40),
    "arange by dtype": (lambda toy, x: x + F.embedding(torch.arange(x.shape[1], dtype=torch.int32), toy.table), 40),
    "arange from one": (lambda toy, x: x + F.embedding(torch.arange(1, x.shape[1] + 1), toy.table), 39),
    "arange plus two": (lambda toy, x: x + F.embedding(torch.arange(x.shape[1]) + 2, toy.table), 38),
    "arange for every row": (lambda toy, x: x + F.embedding(rows(x), toy.table), 40),
    "arange repeated": (lambda toy, x: x + F.embedding(torch.arange(x.shape[1]).repeat(x.shape[0], 1), toy.table), 40),
    "arange expanded as": (
        lambda toy, x: x + F.embedding(torch.arange(x.shape[1]).expand_as(toy.now.tokens), toy.table),
        40,
    ),
    "first rows": (lambda toy, x: x + toy.table[: x.shape[1]], 40),
    "first rows, batched": (lambda toy, x: x + toy.table[None][:, : x.shape[1], :], 40),
    "rows from the third": (lambda toy, x: x + toy.table[2 : x.shape[1] + 2], 38),
    "times a table": (lambda toy, x: x * toy.table[: x.shape[1]].tanh(), 40),
    "sines": (sines, None),
    "complex rotation": (complex_rotation, 40),
    "a ramp": (lambda toy, x: x + torch.arange(x.shape[1])[None, :, None] * 0.1, None),
}


def buffers() -> dict[str, Tensor]:
    return {"table": TABLE, "rotation": torch.polar(torch.ones(40, WIDTH // 2), TABLE[:, : WIDTH // 2])}


@pytest.mark.parametrize("name", COUNTED)
def test_counted_positions_become_an_input(name: str) -> None:
    embed, limit = COUNTED[name]
    model = Toy(causal, embed=embed, **buffers())
    fast = optimized(model)
    assert fast.max_positions == limit
    assert_computes_the_same(model, fast)


def rotated(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Rotary positions of rank 4, and a learned temperature by position of rank 2."""
    angle = torch.arange(query.shape[2])[:, None] * 10.0 ** -torch.arange(HEAD_DIM // 2)
    cos, sin = angle.cos()[None, None], angle.sin()[None, None]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    return causal(toy, rotate(query), rotate(key), value) * toy.table[: query.shape[2], :1]


def test_positions_enter_at_any_rank() -> None:
    model = Toy(rotated, rotated, **buffers())
    assert_computes_the_same(model, optimized(model))


OTHERS: dict[str, tuple[Embed, str]] = {
    "joined to the features": (
        lambda toy, x: torch.cat([x[..., 1:], torch.arange(x.shape[1]).expand(x.shape[0], -1)[..., None]], -1),
        "enter 'cat.*does not broadcast",
    ),
    "an index": (lambda toy, x: x[:, torch.arange(x.shape[1])], "enter 'index.*does not broadcast"),
    "tokens first": (
        lambda toy, x: (x.transpose(0, 1) + toy.table[: x.shape[1], None]).transpose(0, 1),
        "enter 'add.*does not broadcast",
    ),
    "from behind": (lambda toy, x: x + toy.table[: x.shape[1]].flip(0), "mixes positions"),
    "summed": (lambda toy, x: x + toy.table[: x.shape[1]].cumsum(0), "mixes positions"),
    "relative to the middle": (
        lambda toy, x: x + (torch.arange(x.shape[1]) - x.shape[1] // 2)[:, None],
        "mixes positions",
    ),
    "the greatest": (lambda toy, x: x + torch.arange(x.shape[1]).max(), "is not one value a token"),
    "every pair": (
        lambda toy, x: x + (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).float() @ x,
        "is not one value a token",
    ),
    "the length": (lambda toy, x: x * x.shape[1], "depends on the number of tokens and is not their positions"),
    "summed ones": (
        lambda toy, x: x + torch.ones(x.shape[1], 1).cumsum(0),
        "depends on the number of tokens and is not their positions",
    ),
    "every second number": (
        lambda toy, x: x + torch.arange(0, 2 * x.shape[1], 2)[:, None],
        "depends on the number of tokens and is not their positions",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_use_of_the_count_is_refused(name: str) -> None:
    embed, reason = OTHERS[name]
    with pytest.raises(UnsupportedGraphError, match=reason) as refused:
        program_after(Toy(causal, embed=embed, **buffers()), "rewrite-positions")
    assert refused.value.node is not None
    assert refused.value.hint is not None and "position_ids" in refused.value.hint


def test_numbering_the_tokens_of_the_batch_is_left_alone() -> None:
    """A mixture of experts sorts the batch's tokens by their experts, and numbers them for it."""

    def sorted_and_back(toy: Toy, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        order = torch.arange(flat.shape[0]).sort(descending=True).indices
        return torch.zeros_like(flat).index_add(0, order, flat[order] * 2).view_as(x)

    model = Toy(causal, embed=sorted_and_back)
    assert_computes_the_same(model, optimized(model))

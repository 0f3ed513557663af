"""Attention and compaction over contiguous caches, as functions, against the kernels that write pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lethe_compile.kernels.attention import contiguous, reference
from lethe_compile.kernels.compact import contiguous as compaction
from lethe_compile.kernels.compact.reference import compact

HEADS, DIM, V_DIM = 2, 8, 12

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "groups": {"group": 3},
    "window": {"window": 4},
    "chunks": {"window": 4, "chunked": True},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True, "group": 2},
    "alibi": {"slopes": True, "group": 2},
    "sum": {"peak": False},
}


def caches(rows: int, capacity: int, old: list[int]) -> dict[str, Tensor]:
    """Filled caches whose positions have gaps; what lies behind a row's end is garbage, though finite."""
    position = torch.arange(capacity).repeat(rows, 1) * 2
    return {
        "k": torch.randn(rows, HEADS, capacity, DIM, dtype=torch.float64),
        "v": torch.randn(rows, HEADS, capacity, V_DIM, dtype=torch.float64),
        "position": position.int(),
        "mass": torch.rand(rows, capacity),
        "length": torch.tensor(old, dtype=torch.int32),
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("steps", [1, 5])
def test_attention_equals_the_reference(options: dict[str, Any], steps: int) -> None:
    options = {"group": 1, "peak": True, "window": None, "chunked": False, "softcap": None, **options}
    group = options.pop("group")
    heads = HEADS * group
    old, new = [0, 7, 12, 9], [steps, min(2, steps), steps, 0]
    rows, capacity = len(old), 20
    state, lengths = caches(rows, capacity, old), torch.tensor(new, dtype=torch.int32)
    query = torch.randn(rows, heads, steps, DIM, dtype=torch.float64)
    key = torch.randn(rows, HEADS, steps, DIM, dtype=torch.float64)
    value = torch.randn(rows, HEADS, steps, V_DIM, dtype=torch.float64)
    positions = 2 * state["length"].long()[:, None] + torch.arange(steps)
    sinks = torch.randn(heads, dtype=torch.float64) if options.pop("sinks", False) else None
    slopes = torch.rand(heads, dtype=torch.float64) if options.pop("slopes", False) else None

    k = contiguous.append(state["k"], key, state["length"])
    v = contiguous.append(state["v"], value, state["length"])
    position = contiguous.append_position(state["position"], positions, state["length"])
    bands = (options["window"], options["chunked"], options["softcap"], options["peak"])
    out, seen = contiguous.attend(
        query, k, v, position, state["length"], positions, lengths, sinks, slopes, 0.3, *bands
    )
    mass = contiguous.score(state["mass"], seen, state["length"], lengths, torch.tensor([0.9]), options["peak"], False)

    pages = {"k": state["k"].clone(), "v": state["v"].clone()}  # each row's cache is one page
    written = {name: state[name].clone() for name in ("position", "mass", "length")}
    expected = reference.attention(
        query, key, value, pages["k"], pages["v"], written["position"], written["mass"],
        torch.arange(rows, dtype=torch.int32)[:, None], written["length"], positions, lengths,
        scale=0.3, sinks=sinks, slopes=slopes, decay=0.9, **options,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for row, total in enumerate(written["length"].tolist()):
        assert k[row, :, :total].equal(pages["k"][row, :, :total])
        assert v[row, :, :total].equal(pages["v"][row, :, :total])
        assert position[row, :total].equal(written["position"][row, :total])
        torch.testing.assert_close(mass[row, :total], written["mass"][row, :total])


@pytest.mark.parametrize("peak", [True, False])
def test_a_layer_that_shares_adds_to_the_scores_of_this_step(peak: bool) -> None:
    mass, seen = torch.tensor([[0.5, 0.2, 9.0]]), torch.tensor([[0.1, 0.4, 0.0]])
    length, new = torch.tensor([1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    out = contiguous.score(mass, seen, length, new, torch.tensor([0.5]), peak, True)
    expected = torch.tensor([[0.5, 0.4, 9.0]]) if peak else torch.tensor([[0.6, 0.6, 9.0]])
    torch.testing.assert_close(out, expected)


def test_compaction_equals_the_reference() -> None:
    rows, capacity = 3, 11
    state = caches(rows, capacity, [11, 6, 0])
    keep = torch.rand(rows, capacity) < 0.5
    keep &= torch.arange(capacity) < state["length"][:, None]
    source = compaction.sources(keep)
    taken = {name: compaction.take(state[name], source) for name in ("k", "v", "position", "mass")}
    table = torch.arange(rows, dtype=torch.int32)[:, None]
    kept = compact(*(state[name] for name in ("k", "v", "position", "mass")), table, state["length"], keep)
    for row, count in enumerate(kept.tolist()):
        for name, tensor in taken.items():
            dim = 1 if name in "kv" else 0
            assert tensor[row].narrow(dim, 0, count).equal(state[name][row].narrow(dim, 0, count))


def test_a_row_that_keeps_nothing_or_everything() -> None:
    keep = torch.tensor([[False] * 4, [True] * 4])
    assert compaction.sources(keep).tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]

"""What masks read of earlier tokens, against its definition: dictionaries from positions to values."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

import lethe_compile.kernels.ops  # noqa: F401  (registers the operators)
from lethe_compile.kernels.by_position import reference

LAYERS, LAYER, HEADS, K_DIM, EXTRA, PAGE, OFFSET, WIDTH = 3, 1, 2, 5, 4, 4, 3, 4
ROWS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), min_size=1, max_size=4)


@given(
    rows=ROWS.filter(lambda rows: any(new for _, new in rows)),
    window=st.none() | st.integers(1, 9),
    chunked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_columns_and_visibility(rows: list[tuple[int, int]], window: int | None, chunked: bool, seed: int) -> None:
    """Rows of scattered pages hold tokens at positions with gaps; every other slot is NaN at a position of its own."""
    rng = torch.Generator().manual_seed(seed)
    old, new = (torch.tensor(each, dtype=torch.int32) for each in zip(*rows, strict=True))
    steps, width = int(new.max()), 6
    ids = torch.randperm(len(rows) * width, generator=rng, dtype=torch.int32).view(len(rows), width)
    table, length = (
        torch.zeros(LAYERS, *ids.shape, dtype=torch.int32),
        torch.zeros(LAYERS, len(rows), dtype=torch.int32),
    )
    table[LAYER], length[LAYER] = ids, old
    k_pages = torch.full((ids.numel(), HEADS, PAGE, K_DIM + EXTRA), math.nan)
    slot_position = torch.randint(99, (ids.numel(), PAGE), generator=rng, dtype=torch.int32)
    held: list[dict[int, torch.Tensor]] = [{} for _ in rows]
    positions = torch.zeros(len(rows), steps, dtype=torch.int64)
    given_new = torch.randn(len(rows), steps, WIDTH, generator=rng)
    for row, (before, fresh) in enumerate(rows):
        gaps = (torch.randint(1, 4, (before + 1,), generator=rng).cumsum(0) - 1).tolist()
        for slot in range(before):
            page, at = int(ids[row, slot // PAGE]), slot % PAGE
            k_pages[page, :, at] = torch.randn(HEADS, K_DIM + EXTRA, generator=rng)
            slot_position[page, at] = gaps[slot]
            held[row][gaps[slot]] = k_pages[page, :, at, K_DIM:].flatten()[OFFSET : OFFSET + WIDTH]
        positions[row] = gaps[-1] + torch.arange(steps)
        for step in range(fresh):
            held[row][gaps[-1] + step] = given_new[row, step]
    seen = torch.arange(int(positions.max()) + 2)
    rest = (slot_position, table, length, positions, new, seen)
    columns = torch.ops.lethe.columns(given_new, k_pages, *rest, K_DIM, OFFSET, LAYER)
    visible = torch.ops.lethe.visible(*rest, window, chunked and window is not None, LAYER)
    for row, (_, fresh) in enumerate(rows):
        for position in seen.tolist():
            assert torch.equal(columns[row, position], held[row].get(position, torch.zeros(WIDTH)))
            for step in range(fresh):
                now = int(positions[row, step])
                near = window is None or (now // window == position // window if chunked else now - position < window)
                assert bool(visible[row, step, position]) == (position in held[row] and position <= now and near)


def test_rows_without_tokens_see_nothing() -> None:
    empty = torch.zeros(2, dtype=torch.int32)
    state = (torch.zeros(1, PAGE, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32), empty)
    args = (*state, torch.zeros(2, 3, dtype=torch.int64), empty, torch.arange(4))
    assert not reference.visible(*args).any()
    pages = torch.full((1, HEADS, PAGE, K_DIM + EXTRA), math.nan)
    assert not reference.columns(torch.ones(2, 3, WIDTH), pages, *args, k_dim=K_DIM, offset=0).any()


def test_the_uncached_forms_are_those_of_whole_sequences() -> None:
    """What the graph computes with before the cache is in it."""
    new, seen = torch.randn(2, 5, WIDTH), torch.arange(5)
    state = (
        torch.zeros(1, PAGE, dtype=torch.int32),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    )
    args = (*state, torch.arange(5).repeat(2, 1), torch.full((2,), 5, dtype=torch.int32), seen)
    pages = torch.zeros(1, HEADS, PAGE, K_DIM + EXTRA)
    columns = reference.columns(new, pages, *args, k_dim=K_DIM, offset=0)
    assert torch.equal(torch.ops.lethe.columns_site(new, seen, 0, 0), columns)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    for window, chunked in ((None, False), (3, False), (2, True)):
        visible = reference.visible(*args, window=window, chunked=chunked)
        assert torch.equal(torch.ops.lethe.visible_site(ids, seen, window, chunked, 0), visible)

"""Page layouts: each page owned once, and moves that can be copied in any order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lethe_compile.allocator import Counts, Layout, extend_runs, extend_scattered, moves, pack

counts = st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 9), min_size=n, max_size=n)] * 3))


def array(values: list[int]) -> Counts:
    return np.array(values, np.int64)


def owned(layout: Layout) -> list[int]:
    """Ids held, checked: in range, and each by one sequence."""
    ids: list[int] = layout.table[layout.held()].tolist()
    assert len(ids) == len(set(ids)) == layout.used
    assert set(ids) <= set(range(layout.capacity))
    assert sorted(ids + layout.free().tolist()) == list(range(layout.capacity))
    return ids


def fragmented(first: list[int], second: list[int], spare: int) -> Layout:
    """A pool in which some sequences have shrunk."""
    packed = pack(max(1, sum(first) + spare), array(first))
    owned(packed)
    return packed.truncate(np.minimum(array(first), array(second)))


@given(counts, st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_runs_stay_runs_and_move_only_to_pages_that_were_free(
    sizes: tuple[list[int], list[int], list[int]], spare: int
) -> None:
    old = fragmented(sizes[0], sizes[1], spare)
    want = np.maximum(old.count, array(sizes[2]))
    new = extend_runs(old, want)
    if new is None:
        assert (want > old.count).any()
        return
    assert new.count.tolist() == want.tolist()
    owned(new)
    for count, ids in zip(want.tolist(), new.table.tolist(), strict=True):
        assert ids[:count] == list(range(ids[0], ids[0] + count))
    source, target = moves(old, new)
    moved = source != target
    assert set(target[moved].tolist()).isdisjoint(owned(old))
    assert len(source) == old.used


@given(counts, st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_scattered_pages_stay_where_they_are_and_run_out_only_when_all_are_taken(
    sizes: tuple[list[int], list[int], list[int]], spare: int
) -> None:
    old = fragmented(sizes[0], sizes[1], spare)
    want = np.maximum(old.count, array(sizes[2]))
    new = extend_scattered(old, want)
    assert (new is None) == (want.sum() > old.capacity)
    if new is not None:
        assert new.count.tolist() == want.tolist()
        owned(new)
        source, target = moves(old, new)
        assert source.tolist() == target.tolist() == owned(old)


def test_a_run_grows_in_place_when_the_pages_behind_it_are_free() -> None:
    layout = pack(8, array([2, 2]))
    assert layout.table[:, 0].tolist() == [0, 4]
    grown = extend_runs(layout, array([4, 3]))
    assert grown is not None
    assert grown.table[:, 0].tolist() == [0, 4]


def test_a_run_moves_when_its_neighbour_is_in_the_way() -> None:
    layout = pack(10, array([2, 2, 1])).truncate(array([2, 2, 0]))  # runs at 0 and 4, free from 6
    grown = extend_runs(layout, array([5, 2, 0]))
    assert grown is None
    grown = extend_runs(layout, array([2, 2, 4]))
    assert grown is not None
    assert grown.table[:, 0].tolist() == [0, 4, 6]

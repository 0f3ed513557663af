"""Selection against a slow per-row implementation in pure Python, and the invariants of the rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lethe_compile.kernels.select import bisection
from lethe_compile.kernels.select.reference import hoyer_sparsity, select, select_shared, summed_mass


@dataclass(frozen=True)
class Rule:
    sparse_ratio: float = 10.0
    segments: int = 4
    sink_tokens: int = 2
    recent_ratio: float = 0.25
    include_sinks: bool = False


@dataclass(frozen=True)
class Row:
    """One sequence's retained tokens; positions ascend and may have gaps."""

    mass: tuple[float, ...]
    position: tuple[int, ...]
    protected: int = 0
    cap: int | None = None


def oracle(
    row: Row, rule: Rule, sinks: set[int] | None = None, protected: set[int] | None = None
) -> tuple[set[int], bool]:
    """(kept slots, broke) of one row, from the rule's description; `sinks`, `protected` override what positions say."""
    n = len(row.mass)
    if sinks is None:
        sinks = {j for j in range(n) if row.position[j] < rule.sink_tokens}
    if protected is None:
        protected = {j for j in range(n) if row.position[j] < row.protected}

    def best_first(slots: Iterable[int]) -> list[int]:
        return sorted(slots, key=lambda j: (-row.mass[j], -j))

    def newest(ratio_of: int) -> list[int]:
        return list(range(n - 1, -1, -1))[: max(1, math.floor(rule.recent_ratio * ratio_of))]

    candidates = best_first(j for j in range(n) if rule.include_sinks or j not in sinks)
    boundaries = [math.ceil(i * len(candidates) / rule.segments) for i in range(1, rule.segments)]
    breaks = [
        k
        for k in boundaries
        if k < len(candidates) and row.mass[candidates[0]] > rule.sparse_ratio * row.mass[candidates[k]]
    ]
    keep = set(range(n))
    if breaks:
        keep = set(candidates[: breaks[0]]) | sinks | protected | set(newest(n))
    if row.cap is not None and len(keep) > row.cap:
        queue = best_first(sinks) + newest(row.cap) + best_first(protected) + newest(n) + best_first(keep)
        keep = set(list(dict.fromkeys(j for j in queue if j in keep))[: row.cap])
    return keep, bool(breaks)


def tensors(rows: Sequence[Row], extra: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged batch, padded with `extra` columns; what lies beyond a row's length is poison."""
    width = max(1, *(len(row.mass) for row in rows)) + extra
    mass = torch.full((len(rows), width), torch.nan)
    position = torch.full((len(rows), width), -1, dtype=torch.int32)
    for r, row in enumerate(rows):
        mass[r, : len(row.mass)] = torch.tensor(row.mass)
        position[r, : len(row.mass)] = torch.tensor(row.position, dtype=torch.int32)
    length = torch.tensor([len(row.mass) for row in rows])
    return mass, position, length, torch.tensor([row.protected for row in rows])


def run(rows: Sequence[Row], rule: Rule, extra: int = 0) -> tuple[Tensor, Tensor]:
    mass, position, length, protected = tensors(rows, extra)
    capped = any(row.cap is not None for row in rows)
    cap = torch.tensor([len(row.mass) + 1 if row.cap is None else row.cap for row in rows]) if capped else None
    return select(mass, position, length, protected_length=protected, cap=cap, **vars(rule))


def slots(keep: Tensor) -> set[int]:
    return set(keep.nonzero().flatten().tolist())


MASS = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 10.0, 20.0, 1e-30, 1e30]),  # ties, zeros, and exact ratios are likely
    st.floats(0.0, 100.0, width=32),
)


@st.composite
def a_row(draw: st.DrawFn, min_size: int = 0) -> Row:
    mass = draw(st.lists(MASS, min_size=min_size, max_size=24))
    if draw(st.integers(0, 5)) == 0:
        mass = [mass[0]] * len(mass) if mass else mass
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(mass), max_size=len(mass)))
    start = draw(st.integers(-1, 2))
    position = [start + sum(gaps[: j + 1]) for j in range(len(mass))]
    cap = draw(st.one_of(st.none(), st.integers(1, 26)))
    return Row(tuple(mass), tuple(position), draw(st.integers(0, 20)), cap)


RULES = st.builds(
    Rule,
    sparse_ratio=st.sampled_from([1.5, 2.0, 10.0, 400.0]),
    segments=st.integers(2, 30),
    sink_tokens=st.integers(0, 6),
    recent_ratio=st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]),
    include_sinks=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(rows=st.lists(a_row(), min_size=1, max_size=4), rule=RULES, extra=st.integers(0, 3))
@example(rows=[Row((3.0,), (0,))], rule=Rule(), extra=0)  # a single token, and it is a sink
@example(rows=[Row((3.0,), (9,))], rule=Rule(), extra=2)  # a single token
@example(rows=[Row((1.0, 0.0), (0, 1))], rule=Rule(sink_tokens=6), extra=0)  # fewer tokens than sinks
@example(rows=[Row((0.0,) * 12, tuple(range(12)), cap=5)], rule=Rule(), extra=0)
@example(rows=[Row((7.0,) * 12, tuple(range(12)), cap=5)], rule=Rule(), extra=0)
@example(rows=[Row((), ())], rule=Rule(), extra=0)
def test_matches_the_oracle(rows: list[Row], rule: Rule, extra: int) -> None:
    keep, broke = run(rows, rule, extra)
    for r, row in enumerate(rows):
        expected, expected_broke = oracle(row, rule)
        assert slots(keep[r]) == expected
        assert bool(broke[r]) == expected_broke


@settings(max_examples=150, deadline=None)
@given(row=a_row(min_size=1), rule=RULES)
def test_invariants(row: Row, rule: Rule) -> None:
    keep, broke = run([row], rule)
    kept, n = slots(keep[0]), len(row.mass)
    assert kept and kept <= set(range(n))
    assert n - 1 in kept or (row.cap or n) <= rule.sink_tokens  # the newest token goes only where sinks fill the cap
    if row.cap is not None:
        assert len(kept) <= row.cap
        return
    assert {j for j in range(n) if row.position[j] < max(rule.sink_tokens, row.protected)} <= kept
    assert set(range(n - math.floor(rule.recent_ratio * n), n)) <= kept
    assert bool(broke[0]) or len(kept) == n
    evicted = set(range(n)) - kept
    if evicted:  # whatever goes is below every score that stayed for its score, and τ times below the best
        best = max(row.mass[j] for j in range(n) if rule.include_sinks or row.position[j] >= rule.sink_tokens)
        assert all(best > rule.sparse_ratio * row.mass[j] for j in evicted)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(a_row(), min_size=2, max_size=4), rule=RULES)
def test_rows_do_not_affect_each_other(rows: list[Row], rule: Rule) -> None:
    together, _ = run(rows, rule)
    for r, row in enumerate(rows):
        alone, _ = run([row], rule)
        assert slots(together[r]) == slots(alone[0])


def test_tokens_dropped_beforehand_do_not_exist() -> None:
    """Position -1 inside a row's length means that the slot is no token, whatever its score."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(1, 20, generator=generator) ** 8
    position = torch.arange(20, dtype=torch.int32).unsqueeze(0)
    rule = vars(Rule(recent_ratio=0.3))
    none = torch.zeros(1, dtype=torch.int64)
    inner, _ = select(mass[:, 7:], position[:, 7:], torch.tensor([13]), protected_length=none, **rule)
    mass[0, :7], position[0, :7] = 1e9, -1
    outer, _ = select(mass, position, torch.tensor([20]), protected_length=none, **rule)
    assert not outer[0, :7].any()
    assert torch.equal(outer[0, 7:], inner[0])


def test_breakpoint_is_strict_and_cuts_at_the_boundary() -> None:
    """8 candidates, 4 segments: boundaries 2, 4, 6; v[0] = τ·v[2] does not break, v[0] > τ·v[4] does."""
    row = Row((10.0, 5.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0), tuple(range(100, 108)))
    keep, broke = run([row], Rule(recent_ratio=0.0))
    assert broke.tolist() == [True]
    assert slots(keep[0]) == {0, 1, 2, 3, 7}


def test_sink_does_not_set_the_scale_unless_included() -> None:
    row = Row((1e6, *[1.0] * 9), tuple(range(10)))
    assert run([row], Rule(sink_tokens=1))[1].tolist() == [False]
    keep, broke = run([row], Rule(sink_tokens=1, recent_ratio=0.0, include_sinks=True))
    assert broke.tolist() == [True]
    assert slots(keep[0]) == {0, 8, 9}  # the first segment: ceil(10 / 4) = 3 scores, ties to the newer


def test_ties_go_to_the_newer_slot() -> None:
    row = Row((9.0, *[0.0] * 7), tuple(range(100, 108)))
    keep, _ = run([row], Rule(segments=2, recent_ratio=0.0))
    assert slots(keep[0]) == {0, 5, 6, 7}


def test_cap_priority() -> None:
    """Sinks, then the recent share of the cap, then the prompt, then the rest of the recent window, then scores."""
    row = Row(tuple(float(j) for j in range(20)), tuple(range(20)), protected=8)
    rule = Rule(sink_tokens=2, recent_ratio=0.5, sparse_ratio=100.0)
    expected = {
        1: {1},
        2: {0, 1},
        4: {0, 1, 18, 19},
        6: {0, 1, 17, 18, 19, 7},
        11: {0, 1, 15, 16, 17, 18, 19, 4, 5, 6, 7},
        16: {0, 1, *range(12, 20), *range(2, 8)},
        19: {*range(0, 8), *range(9, 20)},
        20: set(range(20)),
    }
    for cap, kept in expected.items():
        keep, _ = run([Row(row.mass, row.position, row.protected, cap)], rule)
        assert slots(keep[0]) == kept, cap


def test_select_is_deterministic_and_leaves_its_inputs_alone() -> None:
    row = Row(tuple([1.0, 0.0] * 10), tuple(range(20)), cap=9)
    mass, position, length, protected = tensors([row])
    arguments = (mass, position, length, protected, torch.tensor([9]))
    before = [value.clone() for value in arguments]
    results = [
        select(mass, position, length, protected_length=protected, cap=arguments[4], **vars(Rule()))[0]
        for _ in range(3)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))


# --- one keep-set for the batch -------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=st.lists(a_row(min_size=1), min_size=1, max_size=4), rule=RULES, extra=st.integers(0, 3))
def test_shared_matches_the_oracle_on_summed_columns(
    data: st.DataObject, rows: list[Row], rule: Rule, extra: int
) -> None:
    active = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)).filter(any))
    cap = data.draw(st.one_of(st.none(), st.integers(1, 26)))
    mass, position, length, protected = tensors(rows, extra)
    keep, broke = select_shared(
        mass,
        position,
        length,
        torch.tensor(active),
        protected_length=protected,
        cap=None if cap is None else torch.tensor([cap]),
        **vars(rule),
    )

    live = [row for row, on in zip(rows, active, strict=True) if on]
    width = max(len(row.mass) for row in live)
    total = summed_mass(mass, position, length, torch.tensor(active))[0, -width:].tolist()
    sinks, guarded = set(), set()
    for row in live:
        for j in range(len(row.mass)):
            column = width - len(row.mass) + j
            if row.position[j] < rule.sink_tokens:
                sinks.add(column)
            if row.position[j] < row.protected:
                guarded.add(column)
    columns, expected_broke = oracle(Row(tuple(total), tuple(range(width)), cap=cap), rule, sinks, guarded)
    for r, row in enumerate(rows):
        n = len(row.mass)
        expected = {j for j in range(n) if width - n + j in columns} if active[r] else set(range(n))
        assert slots(keep[r]) == expected
        assert bool(broke[r]) == (expected_broke and active[r])


def test_shared_equals_select_for_one_row() -> None:
    row = Row(tuple(float(j % 7) ** 4 for j in range(30)), tuple(range(30)), protected=3)
    mass, position, length, protected = tensors([row])
    rule = vars(Rule(include_sinks=True))
    shared = select_shared(mass, position, length, torch.tensor([True]), protected_length=protected, **rule)
    own = select(mass, position, length, protected_length=protected, **rule)
    assert torch.equal(shared[0], own[0]) and torch.equal(shared[1], own[1])


def test_summed_mass_aligns_the_newest_tokens() -> None:
    mass, position, length, _ = tensors([Row((1.0, 2.0, 3.0), (0, 1, 2)), Row((10.0,), (0,)), Row((9.0, 9.0), (0, 1))])
    total = summed_mass(mass, position, length, torch.tensor([True, True, False]))
    assert total.tolist() == [[1.0, 2.0, 13.0]]


# --- Hoyer sparsity -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(0.0, 1e6, width=32), min_size=2, max_size=30), pad=st.integers(0, 3))
def test_hoyer_matches_the_formula(values: list[float], pad: int) -> None:
    n, l1, l2 = len(values), math.fsum(values), math.sqrt(math.fsum(v * v for v in values))
    expected = (math.sqrt(n) - l1 / l2) / (math.sqrt(n) - 1) if l2 > 0 else 0.0
    measured = hoyer_sparsity(torch.tensor([values + [0.0] * pad]), torch.tensor([n]))
    assert measured.dtype == torch.float32 and 0 <= measured.item() <= 1
    assert measured.item() == pytest.approx(expected, abs=1e-6)


def test_hoyer_extremes() -> None:
    mass = torch.tensor([[5.0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0], [1e-30, 0, 0, 0]])
    length = torch.tensor([4, 4, 4, 1, 0, 4])
    assert hoyer_sparsity(mass, length).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@settings(max_examples=400, deadline=None)
@given(rows=st.lists(a_row(), min_size=1, max_size=4), rule=RULES, extra=st.integers(0, 3))
def test_bisection_equals_the_reference(rows: list[Row], rule: Rule, extra: int) -> None:
    mass, position, length, protected = tensors(rows, extra)
    capped = any(row.cap is not None for row in rows)
    cap = torch.tensor([len(row.mass) + 1 if row.cap is None else row.cap for row in rows]) if capped else None
    options = {"protected_length": protected, "cap": cap, **vars(rule)}
    keep, broke = bisection.select(mass, position, length, **options)
    expected, found = select(mass, position, length, **options)
    assert keep.equal(expected) and broke.equal(found)


def test_bisection_tells_neighbouring_numbers_apart() -> None:
    """Down to the last bit, from the largest finite number to the smallest subnormal one."""
    scores = [3.4e38, 1.0, 1.17549435e-38, 1e-45, 0.0]
    near = [torch.nextafter(torch.tensor(x), torch.tensor(0.0)).item() for x in scores]
    mass = torch.tensor([[*scores, *near]])
    position = torch.arange(mass.shape[1], dtype=torch.int32)[None]
    length = torch.tensor([mass.shape[1]])
    rule = {"sparse_ratio": 1.5, "segments": 1024, "sink_tokens": 0, "recent_ratio": 0.0}
    for cap in range(1, mass.shape[1]):
        options = {**rule, "protected_length": torch.zeros(1), "cap": torch.tensor([cap])}
        assert bisection.select(mass, position, length, **options)[0].equal(
            select(mass, position, length, **options)[0]
        )

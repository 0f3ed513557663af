"""The ledger's closed forms against a count of every step."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lethe_compile.ledger import Ledger


@given(
    data=st.data(),
    prompts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    interval=st.integers(1, 6),
    steps=st.integers(0, 25),
)
@settings(max_examples=200)
def test_readings_now_and_then_equal_a_count_of_every_step(
    data: st.DataObject, prompts: list[int], interval: int, steps: int
) -> None:
    """Rows finish at any step; at a round they lose tokens, and finished ones all, as in a generation."""
    layers, rows = 2, len(prompts)
    last = np.array(data.draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows)))  # steps a row takes part
    ledger = Ledger(layers, rows)
    lengths, seen = np.tile(np.array(prompts), (layers, 1)), np.array(prompts)
    held = lengths + 3
    ledger.prefill(seen, held)
    total, retained, kept_held = lengths.copy(), lengths.copy(), held.copy()
    for step in range(1, steps + 1):
        if step % interval == 0:
            ledger.read(seen.copy(), lengths.copy(), held.copy())
            lengths = np.where(step <= last, np.maximum(1, lengths - data.draw(st.integers(0, 5))), 0)
            held = lengths + data.draw(st.integers(0, 5))
        elif data.draw(st.booleans()):
            ledger.read(seen.copy(), lengths.copy(), held.copy())  # somebody asks for the figures
        lengths, seen = lengths + (step <= last), seen + (step <= last)
        ledger.step()
        total += lengths * (step <= last.max())  # a step in which no row takes part is none
        retained, kept_held = np.where(step <= last, lengths, retained), np.where(step <= last, held, kept_held)
    ledger.read(seen.copy(), lengths.copy(), held.copy())
    assert ledger.steps == 1 + min(steps, int(last.max())) and ledger.decoded == steps
    assert ledger.seen.tolist() == seen.tolist()
    assert ledger.retained_sum.tolist() == total.tolist()
    assert ledger.retained.tolist() == retained.tolist()
    assert ledger.held.tolist() == kept_held.tolist()


def test_rounds_and_pages_are_counted_where_something_went() -> None:
    ledger = Ledger(1, 2)
    ledger.evicted(np.array([[5, 0]]), np.array([[2, 0]]))
    ledger.evicted(np.array([[1, 0]]), np.array([[0, 0]]))
    assert (ledger.rounds.tolist(), ledger.freed.tolist()) == ([[2, 0]], [[2, 0]])

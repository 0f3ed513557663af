"""The decode loop of artifacts, over a runner whose logits follow from what it was handed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lethe_compile.artifact import generate
from lethe_compile.artifact.manifest import CacheSpec, Device, Manifest, ProgramSpec
from lethe_compile.errors import InputError, LetheError

VOCAB = 11


class Counter:
    """The next token is one more than the last, modulo the vocabulary; a round drops all but 2 tokens of a row."""

    def __init__(self, interval: int = 3, max_positions: int | None = None) -> None:
        program = ProgramSpec("x", (), ())
        self.manifest = Manifest(
            kind="test",
            model={"vocab_size": VOCAB, "max_positions": max_positions},
            caches=(CacheSpec(1, 1, 1, None, (0,)),),
            policy={"decay": 0.5, "interval": interval},
            state=(),
            programs={"step": program, "prune": program},
            generation={"eos_token_id": [10], "pad_token_id": 0},
            device=Device("any"),
            versions={},
        )
        self.calls: list[tuple[str, Any]] = []

    def begin(self, rows: int) -> None:
        self.held = np.zeros((1, rows), np.int64)
        self.seen: list[list[int]] = [[] for _ in range(rows)]
        self.room = 0

    @property
    def lengths(self) -> Any:
        return self.held.copy()

    def reserve(self, tokens: int) -> None:
        self.room = int(self.held.max()) + tokens

    def step(self, ids: Any, positions: Any, new_lengths: Any, decay: float) -> Any:
        assert (self.held + ids.shape[1]).max() <= self.room, "a step writes behind what was reserved"
        self.calls.append(("step", (ids.shape[1], new_lengths.tolist(), decay)))
        for row, count in enumerate(new_lengths):
            assert positions[row, :count].tolist() == list(range(len(self.seen[row]), len(self.seen[row]) + count))
            self.seen[row] += ids[row, :count].tolist()
        self.held = self.held + new_lengths
        logits = np.full((len(ids), VOCAB), -1.0, np.float32)
        for row, seen in enumerate(self.seen):
            logits[row, (seen[-1] + 1) % VOCAB if seen else 0] = 1.0
        return logits

    def prune(self, active: Any, prompt_length: Any, next_position: Any) -> None:
        self.calls.append(("prune", (active.tolist(), prompt_length.tolist(), next_position.tolist())))
        self.held = np.where(active, np.minimum(self.held, 2), 0)


def test_rows_of_any_length_end_by_themselves() -> None:
    runner = Counter()
    result = generate(runner, [[1, 2, 3], [8]], max_new_tokens=9)
    assert result.new_ids == [[4, 5, 6, 7, 8, 9, 10], [9, 10]]
    assert result.ids[1] == [8, 9, 10]
    # One token of the row that ended is in the cache: its end token is not.
    assert result.retained == [[5, 2]]


def test_rounds_come_after_the_prompt_and_then_at_the_interval() -> None:
    runner = Counter(interval=3)
    generate(runner, [[1]], max_new_tokens=9, eos_token_id=[])
    steps = ["step"] * 3
    assert [name for name, _ in runner.calls] == ["step", "prune", *steps, "prune", *steps, "prune", *steps[:2]]
    assert runner.calls[5] == ("prune", ([True], [1], [4]))


def test_a_row_that_ended_takes_no_part_and_is_emptied() -> None:
    runner = Counter(interval=3)
    generate(runner, [[1], [8]], max_new_tokens=7)
    assert runner.calls[4] == ("step", (1, [1, 0], 0.5))
    assert runner.calls[5] == ("prune", ([True, False], [1, 1], [4, 2]))
    assert runner.held[0, 1] == 0


def test_a_long_prompt_is_one_step_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe_compile.artifact.loop.PREFILL", 4)
    runner = Counter()
    result = generate(runner, [[1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]], max_new_tokens=2)
    assert result.new_ids == [[4, 5], [9, 10]]
    parts = [call for name, call in runner.calls if name == "step"][:3]
    assert parts == [(4, [3, 4], 0.5), (4, [0, 4], 1.0), (1, [0, 1], 1.0)]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {"max_new_tokens": 2}, "prompt 1 is empty"),
        ([[1, VOCAB]], {}, "prompt 0 holds the id 11, outside the vocabulary of 11"),
        ([[-1]], {}, "the id -1"),
        ([[1]], {"max_new_tokens": 0}, r"max_new_tokens=\[0\]"),
        ([[1] * 5], {"max_new_tokens": 4}, "more than the model's 8 positions"),
    ],
)
def test_what_cannot_be_run_is_refused(prompts: Any, options: dict[str, int], message: str) -> None:
    runner = Counter(max_positions=8)
    with pytest.raises(InputError, match=message):
        generate(runner, prompts, **options)
    assert runner.calls == []


def test_logits_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Counter()
    monkeypatch.setattr(runner, "step", lambda *_: np.full((1, VOCAB), np.nan, np.float32))
    with pytest.raises(LetheError, match="row 0, step 1"):
        generate(runner, [[1]])

"""What the steps of a generation did to the cache, from what the host reads back at rounds.

A step only tells `step`. At the next reading a row's new tokens say in how many of the steps since it took part: a row
takes part in every step until it has finished, and in none after, so that what it held at each of them is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lethe_compile.recorder import Recorder

Counts = NDArray[np.int64]


class Ledger:
    """Figures of L layers and R rows: arrays are int64 ``[L, R]`` unless said otherwise.

    Attributes:
        seen: [R] tokens fed.
        retained, held: tokens, and pages with those reserved; of a finished row, as it was at its end.
        retained_sum: tokens after each of `steps` steps, added up.
        rounds, freed: rounds that evicted something, and pages so emptied.
        pressed: rounds that came for lack of pages.
        timeline: for each round, the layers' retained tokens after it, mean over active rows.

    A `recorder` hears of every reading.
    """

    def __init__(self, layers: int, rows: int, recorder: Recorder | None = None) -> None:
        shape = (layers, rows)
        self._recorder = recorder
        self.seen = np.zeros(rows, np.int64)
        self.retained, self.held, self.retained_sum, self.rounds, self.freed = (
            np.zeros(shape, np.int64) for _ in range(5)
        )
        self.steps = self.decoded = self.pressed = 0
        self.timeline: list[list[float]] = []
        self._pending = 0  # decode steps since the last reading

    def prefill(self, prompts: Counts, held: Counts, retained: Counts | None = None) -> None:
        """The first step has fed `prompts` [R] tokens; every layer retains them all, if not told otherwise."""
        self.seen, self.held = prompts.copy(), held
        self.retained = np.tile(prompts, (len(held), 1)) if retained is None else retained.copy()
        self.retained_sum += self.retained
        self.steps = 1
        if self._recorder is not None:
            self._recorder.begin(prompts, self.retained, held)

    def step(self) -> None:
        """A decode step has run."""
        self._pending += 1
        self.decoded += 1

    def read(self, seen: Counts, lengths: Counts, held: Counts) -> None:
        """What the device and the cache say since the last reading, before anything is evicted or given back."""
        if self._recorder is not None:
            self._recorder.read(seen, lengths, held)
        fed = seen - self.seen  # [R]
        steps = min(self._pending, int(fed.max(initial=0)))  # the last step may have found every row finished
        took_part = fed > 0
        self.retained = np.where(took_part, lengths, self.retained)
        self.held = np.where(took_part, held, self.held)
        # lengths - fed at first, one more after each step that fed the row: sum of min(s, fed) over s = 1..steps
        self.retained_sum += steps * (lengths - fed) + fed * (fed + 1) // 2 + (steps - fed) * fed
        self.seen, self.steps, self._pending = seen, self.steps + steps, 0

    def evicted(self, tokens: Counts, pages: Counts) -> None:
        """A round has dropped so many tokens, and emptied so many pages."""
        self.rounds += tokens > 0
        self.freed += pages

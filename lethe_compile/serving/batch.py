"""The rows of an engine: one cache, one policy, other state, and the steps that some or all of them take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.cache import Compaction, Rows
from lethe_compile.errors import OutOfPagesError
from lethe_compile.executor import DecodeGraph, Executor, bucket
from lethe_compile.ledger import Counts
from lethe_compile.rounds import round_state
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.lockstep import Alone
from lethe_compile.serving.row_policy import RowPolicy
from lethe_compile.states import States
from lethe_compile.transfers import sent

_WARM = 16  # tokens of a prompt that only warms up


@dataclass(frozen=True)
class Evicted:
    """What a round did to one sequence."""

    row: int
    tokens: int  # evicted, in all layers together


class Batch:
    """Up to `size` sequences of one model, in rows 0 to `used` - 1; each is prefilled, decoded and pruned for itself.

    A row that leaves is filled by the last one, so that steps run on few rows, and captured graphs of a few sizes do.
    Everything here is the engine's thread's alone. The device is waited for in rounds only.

    Attributes:
        used: rows taken.
        fed: [size] tokens fed to each row, as the host bounds them.
        until_round: [size] decode steps until the row's next round; 0: it comes before the next step.
        live: [size] rows that are decoded; the others among `used` are still prefilled.
        tokens, active, next_position: [size] on the device: the token that each row is fed next, whether it goes on,
            and where.
    """

    def __init__(
        self,
        fast: OptimizedModel,
        executor: Executor,
        size: int,
        max_bytes: int | None,
        longest: int,
        ranks: Alone | None = None,
    ) -> None:
        self.fast, self._executor, self.size, self.ranks = fast, executor, size, ranks or Alone()
        self.device, self._heads = fast.device, fast.keep_sets.heads
        self.cache = fast.new_cache()
        self.cache.max_bytes = max_bytes
        rows = size * self._heads
        hint = 0 if self.cache.contiguous or max_bytes is None else np.ones((len(fast.caches), rows), np.int64)
        self.cache.begin(rows, hint)
        self.cache.widen(longest)
        self.policy = RowPolicy(fast.policy, len(fast.caches), rows, self._heads, fast.token_bytes, self.device)
        self.states = States(fast.stateful, self.device)
        self.states.begin(size)
        self.interval, self._window = fast.config.interval, self.policy.policy.observation_window
        self.tokens = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.active = torch.zeros(size, dtype=torch.bool, device=self.device)
        self.next_position = torch.zeros(size, dtype=torch.int64, device=self.device)
        self._prompts = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.used = 0
        self.fed, self.until_round, self.left = (np.zeros(size, np.int64) for _ in range(3))
        self.live: NDArray[np.bool_] = np.zeros(size, np.bool_)
        self._graphs: dict[int, DecodeGraph] = {}
        self._before = 0  # captures of graphs that are forgotten
        self._recorded = self.cache.generation  # when ranks last looked whether tensors were replaced
        self._rounds: list[tuple[list[int], Compaction]] = []  # whose outcome is on its way

    def warm_up(self) -> None:
        """Compile and record what requests will need, with rows that hold nothing."""
        if self.fast.backend[0] == "eager":
            return
        for count in (1, min(2, self.size)):
            for _ in range(count):
                self.join(2 * _WARM)
            self.cache.reserve_rows(np.repeat(np.arange(self.size) < count, self._heads) * 2 * _WARM)
            for ends in (False, True):  # a prompt's first part, and one that goes on
                self.prefill(0, np.zeros((count, _WARM), np.int64), np.full(count, _WARM), ends)
            for row in reversed(range(count)):
                self.leave(row)
        self.states.has_previous_state = True
        for rows in range(1, self.size + 1):
            if self.fast.backend[0] != "cudagraphs":
                state = self.fast.graph_state(self.cache, self.states, rows, furthest=2 * _WARM)
                at, none = slice(0, rows), torch.zeros(rows, dtype=torch.int32, device=self.device)
                self._executor.run(self.tokens[at, None], self.next_position[at, None], none, state)
                if rows == 2:  # one row is a variant of its own, all others are another
                    break
            elif bucket(rows) == rows or rows == self.size:
                self.used = rows
                self._replay()
        self.used = 0

    # ------------------------------------------------------------------------------------------------- membership

    def join(self, prompt: int) -> int:
        """A row for a sequence whose first `prompt` tokens are its prompt. Pages come with `reserve`."""
        row = self.used
        self.used += 1
        self.policy.begin(self.rows_of(row))
        self._prompts[row] = prompt
        self.next_position[row] = 0
        self.fed[row] = self.until_round[row] = self.left[row] = 0
        return row

    def start(self, row: int, left: int) -> None:
        """Its prompt is in the cache, and its next token in `tokens`: it is decoded, `left` times at most."""
        self.live[row], self.left[row] = True, left
        self.active[row] = True

    def stop(self, row: int) -> None:
        """It has got its last token; what it holds stays until it leaves."""
        self.live[row] = False
        self.active[row] = False

    def leave(self, row: int) -> int:
        """Free a row; returns the row that has taken its place and is now `row`, or `row` itself if it was the last."""
        self.cache.free_rows(range(row * self._heads, (row + 1) * self._heads))
        self.used -= 1
        last = self.used
        if last != row:
            self.cache.move(self.rows_of(last), self.rows_of(row))
            self.policy.move(self.rows_of(last), self.rows_of(row))
            self.states.move(last, row)
            for tensor in (self.tokens, self.active, self.next_position, self._prompts):
                tensor[row] = tensor[last]
            for array in (self.fed, self.until_round, self.left, self.live):
                array[row] = array[last]
        self.active[last] = False
        self.live[last] = False
        return last

    def rows_of(self, row: int) -> slice:
        """The cache's rows of a sequence."""
        return slice(row * self._heads, (row + 1) * self._heads)

    def rows(self, sequences: list[int]) -> Rows:
        """Those of the cache."""
        index = np.asarray(sequences, np.int64)[:, None] * self._heads + np.arange(self._heads)
        return Rows.of(index.ravel(), self.device)

    # ------------------------------------------------------------------------------------------------------ steps

    def reserve(self, prompts: Counts) -> None:
        """Pages until each live row's next round, and for `prompts` [used] tokens of the others that are yet to come.

        Raises:
            OutOfPagesError: there are too few, on this rank or another; every row holds what it held.
        """
        if self.ranks.size == 1:
            self.cache.reserve_rows(self.needs(prompts))
            return
        held, failure = self.cache.pages_held(), None
        try:
            self.cache.reserve_rows(self.needs(prompts))
        except OutOfPagesError as error:
            failure = error
        # Whether pages were asked for is alike where lengths are. Whether the device had them may differ between ranks,
        # and with it whether tensors were replaced, for which a graph is recorded anew: on all ranks, or on none.
        grown = failure is not None or bool((self.cache.pages_held() != held).any())
        if not self.ranks.alike or grown:
            same = self.cache.generation == self._recorded
            granted, same = self.ranks.fewest(np.array([failure is None, same], np.int64)).tolist()
            if not same:
                self._before = self.captures
                self._graphs.clear()
            self._recorded = self.cache.generation
            if not granted:
                self.cache.give_back(held)
                raise failure or OutOfPagesError("another rank has no room for the next steps")

    def needs(self, prompts: Counts) -> Counts:
        """[cache's rows] tokens to come; see `reserve`."""
        need = np.zeros(self.size, np.int64)
        steps = np.where(self.until_round > 0, self.until_round, self.interval)
        need[: self.used] = np.where(self.live, np.minimum(steps, self.left), 0)[: self.used] + prompts
        return np.repeat(need, self._heads)

    def prefill(self, first: int, ids: NDArray[np.int64], lengths: NDArray[np.int64], ends: bool) -> Tensor | None:
        """Run more of the prompts of rows from the `first` on: right-padded ids ``[R, T]``, `lengths` [R] of them.

        All of these rows begin, or all go on. Logits ``[R, vocab]`` of each one's last token if it `ends` their
        prompts, else None.
        """
        count, width = ids.shape
        at = slice(first, first + count)
        begun = bool(self.fed[first])
        new = np.zeros(self.size, np.int64)
        new[at] = lengths
        self.cache.assume(np.repeat(new, self._heads))
        on_device, taken = sent(ids, self.device), sent(lengths, self.device)
        start = self.next_position[at].clone()
        positions = start[:, None] + torch.arange(width, device=self.device)
        self.states.has_previous_state = begun
        furthest = int(self.fed[at].max()) + width
        state = self.fast.graph_state(self.cache, self.states, count, first=first, furthest=furthest)
        logits = self._executor.run(on_device, positions, taken.to(torch.int32), state, last=taken - 1, same_step=begun)
        self.next_position[at] += taken
        self.fed[at] += lengths
        return logits[:, 0].float() if ends else None

    def observed_from(self, prompt: int) -> int:
        """The first token of a prompt whose query the policy wants to see; 0: all of them."""
        return 0 if self._window is None else max(1, prompt - self._window)

    def forget_scores(self, row: int) -> None:
        """What attention went to so far counts no more."""
        self.cache.clear_mass(self.rows([row]))

    def decode(self) -> Tensor:
        """One more token for every live row; logits ``[B, vocab]`` of the first B >= `used` rows, valid until the next.

        The caller has seen to rounds and pages.
        """
        self._clear_before_rounds()
        self.until_round -= self.live
        self.left -= self.live
        self.fed += self.live
        self.cache.assume(np.repeat(self.live.astype(np.int64), self._heads))
        self.states.has_previous_state = True
        if self.fast.backend[0] == "cudagraphs":
            return self._replay()
        if self.fast.needs_content:
            # What a mask by content makes of a row can depend on the longest one beside it, as in transformers: alone.
            return torch.cat([self._step(row, 1) for row in range(self.used)])
        return self._step(0, self.used)

    def _step(self, first: int, rows: int) -> Tensor:
        """Logits of one token of rows from the `first` on."""
        at = slice(first, first + rows)
        furthest = int(self.fed[at].max())
        state = self.fast.graph_state(self.cache, self.states, rows, first=first, furthest=furthest)
        active, positions = self.active[at], self.next_position[at].clone()
        ids = self.tokens[at].masked_fill(~active, 0)[:, None]
        logits = self._executor.run(ids, positions[:, None], active.to(torch.int32), state)
        self.next_position[at] += active
        return logits[:, 0].float()

    def _replay(self) -> Tensor:
        rows = min(bucket(self.used), self.size)
        if rows not in self._graphs:
            at = slice(0, rows)
            self._graphs[rows] = DecodeGraph(self._executor, self.tokens[at], self.active[at], self.next_position[at])
        return self._graphs[rows].replay(self.fast.graph_state(self.cache, self.states, rows))

    @property
    def captures(self) -> int:
        """How often a decode step was recorded as a CUDA graph."""
        return self._before + sum(graph.captures for graph in self._graphs.values())

    def _clear_before_rounds(self) -> None:
        if self._window is None:
            return
        window = min(self._window, self.interval)
        rows = np.flatnonzero(self.live & (self.until_round == window)).tolist()
        if rows:
            self.cache.clear_mass(self.rows(rows))

    # ------------------------------------------------------------------------------------------------------ rounds

    def due(self) -> list[int]:
        """Live rows whose round comes before the next step."""
        return np.flatnonzero(self.live[: self.used] & (self.until_round[: self.used] == 0)).tolist()

    def round(self, sequences: list[int], limit: int | None = None, *, wait: bool = True) -> list[Evicted]:
        """A round of these rows; with a `limit`, one for lack of pages, which changes no schedule.

        Without `wait`, what it did is told by `settle`.
        """
        rows = self.rows(sequences)
        which = sent(np.asarray(sequences, np.int64), self.device)
        of = (self._prompts[which], self.next_position[which], self.active[which])
        state = round_state(self.fast.compiled, self.policy.policy, self.cache, *of, rows)
        least = None if limit is None else torch.full_like(state.length, limit)
        self._rounds.append((sequences, self.cache.compact_later(self.policy.round(rows, state, least), rows)))
        if limit is None:
            self.until_round[sequences] = self.interval
        return self.settle() if wait else []

    @property
    def unsettled(self) -> bool:
        """Whether a round was not waited for yet."""
        return bool(self._rounds)

    def settle(self) -> list[Evicted]:
        """Wait for the rounds that nobody has waited for, and give back the pages that they emptied.

        Rows must neither leave nor move before that.
        """
        evicted: list[Evicted] = []
        for sequences, done in self._rounds:
            dropped = self.cache.settle(done, self.needs(np.zeros(self.used, np.int64)))  # [layers, rows]
            lost = dropped.sum(0).reshape(-1, self._heads).sum(1)  # [sequences]
            evicted += [Evicted(row, int(tokens)) for row, tokens in zip(sequences, lost.tolist(), strict=True)]
        self._rounds.clear()
        return evicted

    def retained(self) -> Counts:
        """[size] tokens that all layers of each row hold together, as the host bounds them."""
        tokens: Counts = self.cache.lengths.sum(0).reshape(-1, self._heads).sum(1)
        return tokens

    def longest(self) -> Counts:
        """[size] tokens that the longest layer of each row holds, as the host bounds them."""
        tokens: Counts = self.cache.lengths.max(0).reshape(-1, self._heads).max(1)
        return tokens

    def end(self) -> None:
        """Give everything back, memory included."""
        self._graphs.clear()
        limit = self.cache.max_bytes
        self.cache = self.fast.new_cache()
        self.cache.max_bytes = limit
        self.states = States((), self.device)

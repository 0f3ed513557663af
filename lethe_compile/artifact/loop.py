"""The decode loop of an artifact, in NumPy: prefill, rounds at the policy's interval, a token a step until the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lethe_compile.artifact.manifest import Manifest
from lethe_compile.artifact.sampling import Floats, Ints, Sampler
from lethe_compile.errors import InputError, LetheError

PREFILL = 1024
"""Most prompt tokens of a row that are handed over at once."""


class Runner(Protocol):
    """An artifact that is loaded: two programs and the caches between them, of C caches and R rows."""

    manifest: Manifest

    def begin(self, rows: int) -> None:
        """Empty caches for so many rows."""

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens in every row, and give back what is not needed."""

    def step(self, ids: Ints, positions: Ints, new_lengths: NDArray[np.int32], decay: float) -> Floats:
        """Append right-padded ids ``[R, T]``; logits ``[R, vocab]`` of each row's last token, if it has a new one."""

    def prune(self, active: NDArray[np.bool_], prompt_length: Ints, next_position: Ints) -> None:
        """One round; rows that are not active are emptied."""

    @property
    def lengths(self) -> Ints:
        """Retained tokens ``[C, R]``."""


@dataclass(frozen=True)
class Chosen:
    """Steps that were run ahead of the host: all ``[steps, rows]``."""

    tokens: Ints
    active: NDArray[np.bool_]  # rows whose token counts
    sound: NDArray[np.bool_]  # rows whose logits were finite where it matters


@runtime_checkable
class AheadRunner(Runner, Protocol):
    """A runner that can go on greedily without the host, which looks at many steps at once."""

    def choose_ahead(
        self, tokens: Ints, next_position: Ints, active: NDArray[np.bool_], ends: Ints, steps: int
    ) -> Iterator[Chosen]:
        """Feed `tokens` ``[R]`` of the `active` rows, choose the next, and so on, `steps` times in all.

        A row that has chosen one of `ends` is not active any more. There is room for the tokens. Who does not take all
        of what comes lets at most the steps under way run, which change nothing where no row is active.
        """


@dataclass(frozen=True)
class Generation:
    """What a generation came to."""

    ids: list[list[int]]  # of each row: prompt and new tokens, the end token included
    new_ids: list[list[int]]
    retained: list[list[int]]  # [caches][rows] tokens at a row's end
    rounds: int  # that dropped tokens

    @property
    def retained_per_layer(self) -> list[float]:
        """Tokens that each cache holds at the end, mean over rows."""
        return [float(np.mean(rows)) for rows in self.retained]


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 20,
    sampler: Sampler | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continue each of `prompts`, lists of token ids of any lengths; the tokens are those of the optimized model.

    `max_new_tokens` holds for all rows, or is a number for each. `eos_token_id` overrides the artifact's own; an empty
    sequence means that no token ends a row. `on_token` hears after each step how many rows got one.

    Raises:
        InputError: a prompt is empty, holds ids outside of the vocabulary, or is too long for the model.
        LetheError: the model computes NaN.
    """
    manifest, sampler = runner.manifest, sampler or Sampler()
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _check(manifest, prompts, limits)
    loop, longest = Loop(runner, prompts, sampler, _end_tokens(manifest, eos_token_id), limits), max(limits)
    told = on_token or (lambda count: None)
    alike = min(limits) == longest  # rows that run ahead of the host know no limits of their own
    ahead = runner if sampler.greedy and alike and isinstance(runner, AheadRunner) else None
    told(loop.choose(loop.prefill()))
    while loop.step < longest and loop.active.any():
        left = longest - loop.step
        if ahead is not None:
            for count in loop.run_ahead(ahead, left):
                told(count)
        else:
            told(loop.choose(loop.decode(left)))
    return loop.result()


class Loop:
    """One generation, step by step: `prefill`, then `choose` and `decode` in turn.

    Who feeds it from outside sets `tokens` [R] and `active` [R] instead of `choose`; rows never become active again.
    """

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        ends: Ints,
        limits: Sequence[int] | None = None,
    ) -> None:
        self.limits = np.asarray(limits if limits is not None else [np.iinfo(np.int64).max] * len(prompts))
        self.runner, self.prompts, self.sampler, self.ends = runner, prompts, sampler, ends
        self.prompt_length = np.array([len(prompt) for prompt in prompts], np.int64)
        self.next_position = self.prompt_length.copy()
        self.active = np.ones(len(prompts), np.bool_)
        self.new: list[list[int]] = [[] for _ in prompts]
        self.retained = np.zeros((len(runner.manifest.caches), len(prompts)), np.int64)
        self.until_round = self.rounds = self.step = 0
        self.decay: float = runner.manifest.policy["decay"] or 1.0

    def prefill(self) -> Floats:
        """Logits after the prompts, which are handed over in parts of `PREFILL` tokens and count as one step."""
        rows, longest = len(self.prompts), int(self.prompt_length.max())
        self.runner.begin(rows)
        self.runner.reserve(longest)
        ids = np.zeros((rows, longest), np.int64)
        for row, prompt in enumerate(self.prompts):
            ids[row, : len(prompt)] = prompt
        logits: Floats | None = None
        for start in range(0, longest, PREFILL):
            part = ids[:, start : start + PREFILL]
            new = np.clip(self.prompt_length - start, 0, part.shape[1]).astype(np.int32)
            positions = np.tile(np.arange(start, start + part.shape[1]), (rows, 1))
            after = self.runner.step(part, positions, new, self.decay if start == 0 else 1.0)
            logits = after if logits is None else np.where(new[:, None] > 0, after, logits)
        assert logits is not None
        self.round()
        return logits

    def round(self) -> None:
        self.until_round = int(self.runner.manifest.policy["interval"])
        self._note()
        if "prune" in self.runner.manifest.programs:
            before = self.runner.lengths
            self.runner.prune(self.active, self.prompt_length, self.next_position)
            self.rounds += bool((self.runner.lengths < before)[:, self.active].any())

    def _note(self) -> None:
        """Remember what rows hold; one that is done holds that until a round empties it."""
        lengths = self.runner.lengths
        self.retained = np.where(lengths > 0, lengths, self.retained)

    def choose(self, logits: Floats) -> int:
        """Add a token to every active row; how many there were."""
        return self._add(self.sampler.choose(logits), np.isfinite(logits.max(axis=1)))

    def _add(self, tokens: Ints, sound: NDArray[np.bool_]) -> int:
        self.step += 1
        broken = self.active & ~sound
        if broken.any():
            raise LetheError(f"row {int(broken.argmax())}, step {self.step}: the model's logits are not finite")
        self.tokens = tokens
        rows = np.flatnonzero(self.active)
        for row in rows:
            self.new[row].append(int(tokens[row]))
        self.active = self.active & ~np.isin(tokens, self.ends) & (self.step < self.limits)
        return len(rows)

    def decode(self, left: int) -> Floats:
        """Logits after the tokens that were chosen last; at most `left` more follow."""
        self._make_room(left)
        self.until_round -= 1
        ids = np.where(self.active, self.tokens, 0)[:, None]
        logits = self.runner.step(ids, self.next_position[:, None], self.active.astype(np.int32), self.decay)
        self.next_position = self.next_position + self.active
        return logits

    def run_ahead(self, runner: AheadRunner, left: int) -> Iterator[int]:
        """Add as many tokens to the active rows as there are steps until the next round; how many rows, each time."""
        self._make_room(left)
        steps = min(left, self.until_round)
        for chosen in runner.choose_ahead(self.tokens, self.next_position, self.active, self.ends, steps):
            for tokens, active, sound in zip(chosen.tokens, chosen.active, chosen.sound, strict=True):
                if not active.any():
                    return
                self.until_round -= 1
                self.next_position = self.next_position + active
                yield self._add(tokens, sound)

    def _make_room(self, left: int) -> None:
        """For the steps until the next round, which is run if it is due."""
        interval = int(self.runner.manifest.policy["interval"])
        if self.until_round == 0:
            self.round()
        if self.until_round == interval:
            self.runner.reserve(min(left, interval))

    def result(self) -> Generation:
        self._note()
        ids = [[*prompt, *new] for prompt, new in zip(self.prompts, self.new, strict=True)]
        return Generation(ids, self.new, self.retained.tolist(), self.rounds)


def _check(manifest: Manifest, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    if not prompts:
        raise InputError("there is no prompt")
    if len(limits) != len(prompts) or min(limits) < 1:
        raise InputError(f"max_new_tokens={limits} is not allowed: must be >= 1, one number or one for each prompt")
    vocab_size, room = manifest.model["vocab_size"], manifest.model["max_positions"]
    for row, (prompt, new) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            raise InputError(f"prompt {row} is empty")
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise InputError(
                f"prompt {row} holds the id {outside[0]}, outside the vocabulary of {vocab_size} ids: does the"
                " tokenizer belong to this model?"
            )
        if room is not None and len(prompt) + new > room:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens: with {new} new ones that is more than the model's"
                f" {room} positions"
            )


def _end_tokens(manifest: Manifest, given: int | Sequence[int] | None) -> Ints:
    ends = manifest.generation["eos_token_id"] if given is None else given
    return np.asarray(ends, np.int64).reshape(-1)

"""Retrieval from a long prompt, generated: needles in a haystack, and variables to be traced.

After RULER (Hsieh et al., arXiv 2404.06654), whose templates these follow: `single`, one key and value; `multi-key`,
one of many keys is asked for; `multi-value`, one key with several values, all asked for; `tracking`, variables
assigned from one another, all of one value asked for. Ours: filler comes from a few sentences of our own, and the
length is that of the whole prompt in the model's own tokens.

A policy with `protect_prompt` keeps the whole prompt however long it is, unless a cap forbids: evaluate with a budget
below it, or with `protect_prompt=false`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lethe_compile.errors import InputError
from lethe_compile.evaluation import Grade, Problem
from lethe_compile.tools._tasks.math_words import as_prompt

KINDS = ("single", "multi-key", "multi-value", "tracking")
_FILLER = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
    "The road goes on.", "A river runs to the sea.", "Winter comes after autumn.",
)  # fmt: skip
_ADJECTIVES = (
    "amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lucid", "mellow",
    "narrow", "oval", "plain", "quiet", "rustic", "silent", "tidy", "urban", "vivid", "wary", "young",
)  # fmt: skip
_NOUNS = (
    "anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
    "ladder", "meadow", "needle", "orchard", "pillow", "quarry", "ribbon", "saddle", "tunnel", "valley", "window",
)  # fmt: skip


@dataclass(frozen=True)
class _Draft:
    """A problem before its haystack: needles in order, the question, and all that a right answer names."""

    intro: str
    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Needle:
    """Score: the share of the expected values that the output names.

    Attributes:
        kind: one of `KINDS`.
        tokens: of the whole prompt, at most; no shorter than that by more than one sentence.
        needles: keys of multi-key, values of multi-value, chains of tracking; each chain has `hops` assignments.
        max_new_tokens: room for the answer.
    """

    name: str = "needle"
    kind: str = "single"
    tokens: int = 4096
    needles: int = 4
    hops: int = 4
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"task {self.name!r}: kind={self.kind!r} must be one of {', '.join(KINDS)}")
        for field in ("tokens", "needles", "hops", "max_new_tokens"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"task {self.name!r}: {field}={value!r} must be a whole number from 1 on")

    def problems(self, n: int, seed: int, tokenizer: Any) -> list[Problem]:
        if tokenizer is None:
            raise InputError(f"task {self.name!r} writes text, and this model has no tokenizer: give --tokenizer")
        return [self._problem(index, random.Random(f"{seed}/{index}"), tokenizer) for index in range(n)]

    def _problem(self, index: int, rng: random.Random, tokenizer: Any) -> Problem:
        draft = _DRAFTS[self.kind](rng, self.needles, self.hops)
        depths = sorted(rng.random() for _ in draft.needles)
        offset = rng.randrange(len(_FILLER))

        def ids(sentences: int) -> tuple[int, ...]:
            return as_prompt(tokenizer, _lay_out(draft, sentences, depths, offset))

        if len(ids(0)) > self.tokens:
            raise InputError(
                f"task {self.name!r}: tokens={self.tokens}, and needles and question alone take {len(ids(0))}"
            )
        low, high = 0, self.tokens  # sentences that fit, and that do not: each takes a token or more
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if len(ids(middle)) <= self.tokens else (low, middle)
        group = f"{self.kind} {self.tokens}"
        return Problem(f"{self.name}/{index}", ids(low), self.max_new_tokens, draft.answers, group)

    def grade(self, problem: Problem, tokens: list[int], tokenizer: Any) -> Grade:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        found = [answer for answer in problem.reference if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)]
        return Grade(len(found) / len(problem.reference), ", ".join(found))


def _lay_out(draft: _Draft, sentences: int, depths: list[float], offset: int) -> str:
    """The prompt: needles stand at their `depths` in 0..1, in order, between so many sentences of filler."""
    hay = [_FILLER[(offset + place) % len(_FILLER)] for place in range(sentences)]
    for needle, depth in reversed(list(zip(draft.needles, depths, strict=True))):
        hay.insert(round(depth * sentences), needle)
    return f"{draft.intro}\n\n{' '.join(hay)}\n\n{draft.question}"


def _keys(rng: random.Random, n: int) -> list[str]:
    names = [f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    if n > len(names):
        raise InputError(f"{n} needles are more than there are names for, {len(names)}")
    return rng.sample(names, n)


def _numbers(rng: random.Random, n: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), n)]


_INTRO = "Some special magic numbers are hidden within the following text. Memorize them: I will quiz you about them."


def _retrieval(rng: random.Random, keys: list[str], values: list[str], answers: int) -> _Draft:
    needles = [
        f"One of the special magic numbers for {key} is: {value}." for key, value in zip(keys, values, strict=True)
    ]
    asked, expected = keys[0], tuple(values[:answers])
    rng.shuffle(needles)
    words = "is the special magic number" if answers == 1 else "are all the special magic numbers"
    question = f"What {words} for {asked} mentioned in the text above?"
    return _Draft(_INTRO, tuple(needles), question, expected)


def _single(rng: random.Random, needles: int, hops: int) -> _Draft:
    return _retrieval(rng, _keys(rng, 1), _numbers(rng, 1), 1)


def _multi_key(rng: random.Random, needles: int, hops: int) -> _Draft:
    return _retrieval(rng, _keys(rng, needles), _numbers(rng, needles), 1)


def _multi_value(rng: random.Random, needles: int, hops: int) -> _Draft:
    return _retrieval(rng, _keys(rng, 1) * needles, _numbers(rng, needles), needles)


def _tracking(rng: random.Random, needles: int, hops: int) -> _Draft:
    """`needles` chains of a value and `hops` assignments from the variable before; all of the first are asked for."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < needles * (hops + 1):
        name = "".join(rng.choices(alphabet, k=5))
        names += [name] if name not in names else []
    chains = [names[first : first + hops + 1] for first in range(0, len(names), hops + 1)]
    values = [str(value) for value in rng.sample(range(10_000, 100_000), len(chains))]
    written = [_chain(names, value) for names, value in zip(chains, values, strict=True)]
    needles_in_order: list[str] = []
    while any(written):  # merged at random, each chain in its own order
        needles_in_order.append(rng.choice([chain for chain in written if chain]).pop(0))
    question = f"Find all variables that are assigned the value {values[0]} in the text above, and name them."
    intro = "Memorize and track the chains of variable assignments hidden in the following text."
    return _Draft(intro, tuple(needles_in_order), question, tuple(chains[0]))


def _chain(names: list[str], value: str) -> list[str]:
    return [f"VAR {names[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(names))]


_DRAFTS: dict[str, Callable[[random.Random, int, int], _Draft]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "tracking": _tracking,
}

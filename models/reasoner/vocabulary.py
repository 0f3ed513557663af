"""The reasoner's words: one token each, so that a rendered problem reads as text and costs one id a word."""

from __future__ import annotations

from collections.abc import Sequence

MODULUS = 16  # every value, weight and sum lives in 0..15
COUNTERS = 256  # `n0`..`n255`: iteration and lap counters, one token each
REGISTERS = tuple("abcdef")
CONSTANTS = ("k1", "k2", "k3", "k4")
LINES = ("L1", "L2", "L3", "L4", "L5")
NODES = ("O", *"ABCDEFG")  # `O` is the origin of a walk
PERIODS = (2, 3)  # a check line every so many iterations
THRESHOLDS = (1, 2, 3, 4)

_MARKS = ("loop", "walk", "let", "init", "print", "state", "sum", ":", "go", "halt", "check", "yes", "no", "at")
WORDS: tuple[str, ...] = (
    "<pad>", "<bos>", "<eos>", *_MARKS, "+", "-",
    *(str(value) for value in range(MODULUS)),
    *(f"+{value}" for value in range(MODULUS)),
    *(f"<{value}" for value in THRESHOLDS),
    *(f"e{period}" for period in PERIODS),
    *(f"n{count}" for count in range(COUNTERS)),
    *REGISTERS, *CONSTANTS, *LINES, *NODES,
    *(f"{node}{edge}" for node in NODES for edge in (0, 1)),
)  # fmt: skip
ID: dict[str, int] = {word: index for index, word in enumerate(WORDS)}

PAD, BOS, EOS = ID["<pad>"], ID["<bos>"], ID["<eos>"]
VALUE, INCREMENT, COUNTER = ID["0"], ID["+0"], ID["n0"]  # first id of a run: VALUE + v is the token of the value v
REGISTER, CONSTANT, LINE, NODE, EDGE = ID["a"], ID["k1"], ID["L1"], ID["O"], ID["O0"]  # EDGE + 2 * node + side
PERIOD, THRESHOLD = ID["e2"] - 2, ID["<1"] - 1


def render(ids: Sequence[int]) -> str:
    """Text of `ids`, one space between words; padding is left out."""
    return " ".join(WORDS[index] for index in ids if index != PAD)


def parse(text: str) -> list[int]:
    """Ids of whitespace-separated words; raises KeyError on a word outside the vocabulary."""
    return [ID[word] for word in text.split()]

"""Answers given as text: where they stand in an output, and when they are right.

Tasks of `lethe evaluate` grade by their own rules, mathematics with math-verify; this is for answers in a prompts file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lethe_compile.evaluation.problems import Grade, Problem


@dataclass(frozen=True)
class Answer:
    """Any of `texts` will do; `pattern` finds the answer in the output, None for `read_out`'s own rules."""

    texts: tuple[str, ...]
    pattern: str | None = None

    @classmethod
    def of(cls, value: Any, pattern: Any = None) -> Answer:
        """Raises `ValueError` for what is neither text, a number, nor a list of these, or a pattern that is none."""
        values = value if isinstance(value, list) else [value]
        texts = tuple(_normal(str(one)) for one in values if isinstance(one, (str, int, float)))
        if not values or len(texts) != len(values) or not all(texts):
            raise ValueError("'answer' must be text, a number, or a list of these, none of them empty")
        if pattern is not None:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"'answer_pattern' is no regular expression: {error}") from error
        return cls(texts, pattern)


@dataclass(frozen=True)
class TextAnswers:
    """Exact match, white space and a full stop at the end apart."""

    def grade(self, problem: Problem, tokens: list[int], tokenizer: Any) -> Grade:
        answer: Answer = problem.reference
        found, exact = read_out(tokenizer.decode(tokens, skip_special_tokens=True), answer.pattern)
        right = any(found == one if exact else _ends_with(found, one) for one in answer.texts)
        return Grade(float(right), found)


def read_out(text: str, pattern: str | None = None) -> tuple[str, bool]:
    """The answer in an output, and whether it is that and nothing more.

    With a `pattern`, its last match, or that one's first group. Else what stands in the last ``\\boxed{}``, or behind
    the last ``####`` of a line; else the last line, which is right if it ends with the answer. What a reasoning model
    writes before ``</think>`` does not count, if it closes it.
    """
    final = text.rpartition("</think>")[2]
    if pattern is not None:
        found = list(re.finditer(pattern, final))
        return (_normal(found[-1][1 if found[-1].re.groups else 0] or "") if found else ""), True
    boxed = _boxed(final)
    if boxed is not None:
        return _normal(boxed), True
    if "####" in final:
        return _normal(final.rpartition("####")[2].strip().partition("\n")[0]), True
    lines = final.strip().splitlines()
    return (_normal(lines[-1]) if lines else ""), False


def _boxed(text: str) -> str | None:
    """What the last ``\\boxed{…}`` holds, braces balanced; None where there is none, or it is not closed."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for place, char in enumerate(rest if found else ""):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[:place]
    return None


def _ends_with(line: str, answer: str) -> bool:
    """Whether `line` ends with `answer`, and not in the middle of a word or number."""
    before = line[: -len(answer)]
    return line.endswith(answer) and not re.search(r"[\w.,]$" if answer[0].isalnum() else r"$^", before)


def _normal(text: str) -> str:
    return " ".join(text.split()).rstrip(".").rstrip()

"""GSM8K and MATH-500 from a local JSON-lines file: prompts, and answers compared as mathematics by math-verify.

GSM8K: Cobbe et al., arXiv 2110.14168; lines with `question`, and `answer` that ends in ``#### 72``. MATH-500: Hendrycks
et al., arXiv 2103.03874, in the selection of Lightman et al., arXiv 2305.20050; lines with `problem`, `answer`, and
`subject` and `level`. https://github.com/huggingface/Math-Verify
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lethe_compile.errors import InputError
from lethe_compile.evaluation import Grade, Problem
from lethe_compile.files import read_lines

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class _MathFile:
    """Problems of a file, in the file's order, or with a seed other than 0 in an order drawn with it."""

    name: str
    file: str = ""
    max_new_tokens: int = 8192
    instruction: str = INSTRUCTION

    fields: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.file:
            raise InputError(f"task {self.name!r} reads its problems from a file: write {self.name}:file=PATH.jsonl")
        if not Path(self.file).is_file():
            raise InputError(f"task {self.name!r}: there is no file {self.file}")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise InputError(f"task {self.name!r}: max_new_tokens={self.max_new_tokens!r} must be at least 1")
        if importlib.util.find_spec("math_verify") is None:
            raise InputError(f"task {self.name!r} grades with math-verify: pip install 'lethe-compile[evaluate]'")

    def problems(self, n: int, seed: int, tokenizer: Any) -> list[Problem]:
        if tokenizer is None:
            raise InputError(f"task {self.name!r} writes text, and this model has no tokenizer: give --tokenizer")
        lines = self._lines()
        if n > len(lines):
            raise InputError(f"{self.file} has {len(lines)} problems, and {n} are asked for")
        if seed:
            random.Random(seed).shuffle(lines)
        return [self._problem(number, line, tokenizer) for number, line in lines[:n]]

    def _lines(self) -> list[tuple[int, Mapping[str, Any]]]:
        found = []
        for number, text in read_lines(self.file):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise InputError(f"{self.file}, line {number}: not JSON ({error})") from error
            for field in self.fields:
                if not isinstance(line, dict) or not isinstance(line.get(field), str):
                    raise InputError(f"{self.file}, line {number}: no text under {field!r}")
            self.gold(line, number)
            found.append((number, line))
        return found

    def _problem(self, number: int, line: Mapping[str, Any], tokenizer: Any) -> Problem:
        prompt = as_prompt(tokenizer, f"{line[self.fields[0]]}\n\n{self.instruction}".strip())
        group = self.group(line)
        return Problem(f"{self.name}/{number}", prompt, self.max_new_tokens, self.gold(line, number), group)

    def gold(self, line: Mapping[str, Any], number: int) -> str:
        """The right answer of a line, LaTeX or a number."""
        raise NotImplementedError

    def group(self, line: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def grade(self, problem: Problem, tokens: list[int], tokenizer: Any) -> Grade:
        return grade_math(problem.reference, tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True)
class Gsm8k(_MathFile):
    """Grade-school word problems; the answer is a number."""

    fields = ("question", "answer")

    def gold(self, line: Mapping[str, Any], number: int) -> str:
        match = re.search(r"####\s*(.+?)\s*$", line["answer"])
        if match is None:
            raise InputError(f"{self.file}, line {number}: the answer does not end in '#### NUMBER'")
        return match[1].replace(",", "")

    def group(self, line: Mapping[str, Any]) -> str:
        return "gsm8k"


@dataclass(frozen=True)
class Math500(_MathFile):
    """Competition problems; the answer is an expression in LaTeX."""

    fields = ("problem", "answer")

    def gold(self, line: Mapping[str, Any], number: int) -> str:
        return str(line["answer"])

    def group(self, line: Mapping[str, Any]) -> str:
        return f"math500 level {line['level']}" if "level" in line else "math500"


def grade_math(gold: str, text: str) -> Grade:
    """Whether the answer in `text` equals `gold`: what stands in its last box, else its last expression.

    What a reasoning model writes before ``</think>`` does not count, if it closes it.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    final = text.rpartition("</think>")[2]
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    found = parse(final, extraction_config=targets)
    right = bool(found) and verify(parse(f"\\boxed{{{gold}}}", extraction_config=targets), found)
    return Grade(float(right), str(found[-1]) if found else "")


def as_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of a user's turn by the tokenizer's chat template, where it has one, else of the text itself."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(tokenizer(text + "\n")["input_ids"])

"""Answers of the published files, which do not come with this project, read and graded; `LETHE_DATA` is their folder.

    gsm8k.jsonl, solutions.jsonl   openai/grade-school-math: grade_school_math/data/{test,example_model_solutions}.jsonl
math500.jsonl                  the 500 problems of MATH that Lightman et al. took, with `solution`s
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lethe_compile.evaluation import Problem
from lethe_compile.tools._tasks.math_words import Gsm8k, Math500, grade_math

pytestmark = pytest.mark.slow


@pytest.fixture
def data() -> Path:
    if "LETHE_DATA" not in os.environ:
        pytest.skip("set LETHE_DATA to the folder of the files that this module's docstring names")
    return Path(os.environ["LETHE_DATA"])


class Words:
    """A tokenizer as far as prompts need one."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def refused(problems: list[Problem], answers: list[str]) -> list[tuple[str, str]]:
    pairs = zip(problems, answers, strict=True)
    return [(one.reference, text) for one, text in pairs if grade_math(one.reference, text).score != 1]


def test_references_of_gsm8k(data: Path) -> None:
    problems = Gsm8k("gsm8k", str(data / "gsm8k.jsonl")).problems(1319, 0, Words())
    written = [line["answer"].split("####")[1].strip() for line in lines_of(data / "gsm8k.jsonl")]
    assert refused(problems, [f"So it is \\boxed{{{one}}}." for one in written]) == []
    assert refused(problems, [f"The answer is ${one}." for one in written]) == []


def test_model_answers_are_judged_as_their_authors_did(data: Path) -> None:
    judged = 0
    for line in lines_of(data / "solutions.jsonl")[:400]:
        gold = line["ground_truth"].rpartition("A:")[2].strip().replace(",", "")
        for model in ("6b_finetuning", "175b_verification"):
            work, _, answer = line[model]["solution"].rpartition("A: ")
            grade = grade_math(gold, f"{work}\\boxed{{{answer}}}")
            assert bool(grade.score) == line[model]["is_correct"], (gold, answer, grade)
            judged += 1
    assert judged == 800


def test_references_and_solutions_of_math500(data: Path) -> None:
    problems = Math500("math500", str(data / "math500.jsonl")).problems(500, 0, Words())
    lines = lines_of(data / "math500.jsonl")
    assert refused(problems, [f"So it is $\\boxed{{{line['answer']}}}$." for line in lines]) == []
    assert refused(problems, [line["solution"] for line in lines]) == []
    pairs = zip(problems, [*lines[1:], lines[0]], strict=True)
    other = [(one.reference, line["answer"]) for one, line in pairs if one.reference != line["answer"]]
    taken = [(gold, text) for gold, text in other if grade_math(gold, f"$\\boxed{{{text}}}$").score == 1]
    assert taken == [("5", "x=5")], "another problem's answer is wrong, unless they are equal"

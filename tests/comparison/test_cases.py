"""Prompts: what a file may say, and what is refused with file and line; answers as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lethe_compile.comparison.answers import Answer, TextAnswers, read_out
from lethe_compile.comparison.cases import Case, as_cases, check_cases, digest, read_prompts
from lethe_compile.errors import InputError
from lethe_compile.evaluation.problems import Problem


class Letters:
    """A tokenizer: one id a letter, 1 in front."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in ids if i > 1)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "|".join(f"{m['role']}:{m['content']}" for m in messages) + "|"


class Chat(Letters):
    chat_template = "yes"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_file_says_prompts_in_three_ways(tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl",
        '"ab"',
        "",
        {"prompt": "ab", "completion": "cd", "id": "mine", "meta": {"any": "thing"}},
        {"ids": [5, 6], "completion_ids": [7, 8, 9], "max_new_tokens": 20},
        {"messages": [{"role": "user", "content": "x"}], "answer": 3, "max_new_tokens": 4},
    )
    one, two, three, four = read_prompts(file, Chat(), 12)
    assert one.problem == Problem("p.jsonl:1", (1, 97, 98), 12, None, "prompts") and one.grader is None
    assert (two.problem.id, two.completion, two.where, two.text) == ("mine", (99, 100), f"{file}:3", "ab")
    assert two.problem.max_new_tokens == 2, "a completion is all that is asked for"
    assert (three.problem.prompt, three.completion, three.problem.max_new_tokens) == ((5, 6), (7, 8, 9), 20)
    assert Letters().decode(list(four.problem.prompt)) == "user:x|" and four.problem.reference == Answer(("3",))
    assert isinstance(four.grader, TextAnswers)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: not JSON"),
        ("[]", r":2: the prompt is empty"),
        ("7", r":2: a prompt is a string or an object with 'prompt', not int"),
        ("{}", r":2: must have one of 'prompt', 'messages' and 'ids', and has none"),
        ('{"prompt": "a", "ids": [1]}', r":2: must have one of .* has \['prompt', 'ids'\]"),
        ('{"prompt": "a", "anwser": "b"}', r":2: unknown key 'anwser': did you mean 'answer'\?"),
        ('{"prompt": 1}', r":2: 'prompt' must be text, not int"),
        ('{"ids": [1, "x"]}', r":2: 'ids' must be a list of token ids"),
        ('{"ids": []}', r":2: the prompt is empty"),
        ('{"prompt": "a", "max_new_tokens": 0}', r":2: max_new_tokens=0 is not allowed"),
        ('{"prompt": "a", "completion": "b", "completion_ids": [1]}', r":2: .* contradict each other"),
        ('{"prompt": "a", "answer": []}', r":2: 'answer' must be text"),
        ('{"prompt": "a", "answer_pattern": "x"}', r":2: .* no 'answer' is given"),
        ('{"prompt": "a", "answer": "b", "answer_pattern": "("}', r":2: 'answer_pattern' is no regular expression"),
        ('{"messages": [{"role": "user"}]}', r":2: 'messages' must be a list of objects"),
        ('{"messages": [{"role": "user", "content": "x"}]}', r":2: 'messages' need a tokenizer with a chat template"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "p.jsonl", '"good"', line)
    with pytest.raises(InputError, match=message) as refused:
        read_prompts(file, Letters())
    assert str(refused.value).startswith(f"{file}:2: ") and "\n" not in str(refused.value)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty\.jsonl has no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl", "", "  "))
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read: No such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"binary\.jsonl is not UTF-8"):
        read_prompts(tmp_path / "binary.jsonl")
    with pytest.raises(InputError, match=r":1: 'prompt' is text, and there is no tokenizer"):
        read_prompts(write(tmp_path / "text.jsonl", '"text"'))


def test_prompts_in_hand() -> None:
    case = Case(Problem("own", (1,), 2, None, "g"), where="here")
    cases = as_cases(["a", [1, 2], torch.tensor([[3, 4]]), {"ids": [9]}, case], Letters(), 5)
    assert [one.problem.prompt for one in cases] == [(1, 97), (1, 2), (3, 4), (9,), (1,)]
    assert [one.where for one in cases[:2]] == ["prompts[0]", "prompts[1]"] and cases[4] is case
    assert digest(cases) == digest(as_cases(cases)) != digest(cases[:4])
    for wrong, message in [
        ("text", "not one str"),
        (torch.tensor([1, 2]), "not one tensor"),
        ([], "no prompts"),
        ([case, case], "here: the id 'own' is that of here already"),
        ([3], r"prompts\[0\]: a prompt is a string"),
    ]:
        with pytest.raises(InputError, match=message):
            as_cases(wrong)


def test_what_a_model_cannot_run_is_refused() -> None:
    cases = as_cases([{"ids": [1] * 6, "max_new_tokens": 4}])
    check_cases(cases, 2, 10, 6)
    with pytest.raises(InputError, match=r"prompts\[0\]: the id 1 is outside the vocabulary of 1"):
        check_cases(cases, 1, None)
    with pytest.raises(InputError, match="6 tokens and up to 4 new ones need 10 positions, and the model has 9"):
        check_cases(cases, 2, 9)
    with pytest.raises(InputError, match="6 tokens, more than 5"):
        check_cases(cases, 2, None, 5)


@pytest.mark.parametrize(
    ("text", "answer", "pattern", "right"),
    [
        ("The answer is 42.", "42", None, True),
        ("The answer is 142", "42", None, False),
        ("It is 4.2", "2", None, False),
        ("first 42\nthen 7", "42", None, False),
        ("so \\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}", None, True),
        ("so \\boxed{42} or 7", "7", None, False),
        ("sum\n#### 72\n", "72", None, True),
        ("think 7 </think> 42", "42", None, True),
        ("42 </think> 7", "42", None, False),
        ("x=3, y=4, x=5", "5", r"x=(\d)", True),
        ("x=3, y=4", "4", r"x=(\d)", False),
        ("nothing", "4", r"x=(\d)", False),
        ("", "4", None, False),
        ("a  b", "a b", None, True),
    ],
)
def test_answers(text: str, answer: str, pattern: str | None, right: bool) -> None:
    problem = Problem("p", (1,), 9, Answer.of(answer, pattern), "g")
    grade = TextAnswers().grade(problem, [ord(letter) for letter in text], Letters())
    assert grade.score == float(right), read_out(text, pattern)


def test_any_of_several_answers_will_do() -> None:
    problem = Problem("p", (1,), 9, Answer.of(["4", "four"]), "g")
    assert TextAnswers().grade(problem, [ord(letter) for letter in "It is four."], Letters()).score == 1

"""The prompts of a comparison: a JSON-lines file, problems of a task, or what a caller has in hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from lethe_compile.comparison.answers import Answer, TextAnswers
from lethe_compile.errors import InputError
from lethe_compile.evaluation.problems import Grader, Problem, Task
from lethe_compile.files import read_lines

MAX_NEW_TOKENS = 256
_SHOWN = 60  # characters of a prompt in tables
_KEYS = {
    "id", "prompt", "messages", "ids", "completion", "completion_ids", "answer", "answer_pattern", "max_new_tokens",
    "meta",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One prompt: a `Problem`, what grades it if anything does, and what is fed in teacher forcing.

    `completion` is fed after the prompt; where it is empty, what the unpruned graph writes. `where` names the source in
    messages, and `text` is the beginning of the prompt for people.
    """

    problem: Problem
    grader: Grader | None = None
    completion: tuple[int, ...] = ()
    where: str = ""
    text: str = ""


def read_prompts(path: str | Path, tokenizer: Any = None, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Case]:
    """The cases of a file of JSON lines.

    A line is a string, the prompt, or an object with one of `prompt` (text), `messages` (a chat, for the tokenizer's
    template) and `ids` (token ids); and any of `id`, `max_new_tokens`, `answer` (text, or a list of which each will
    do), `answer_pattern` (a regular expression that finds the answer in the output; see `answers.read_out`),
    `completion` (text) or `completion_ids`, and `meta`, which is anything.

    Raises:
        InputError: the file cannot be read or is empty, or a line is not as described: names file and line.
    """
    cases = []
    for number, line in read_lines(path):
        where, name = f"{path}:{number}", f"{Path(path).name}:{number}"
        cases.append(make_case(_parse(line, where), where, tokenizer, max_new_tokens, name))
    if not cases:
        raise InputError(f'{path} has no prompts: one JSON object a line, such as {{"prompt": "2 + 2 ="}}')
    return cases


def task_cases(task: Task, n: int, seed: int, tokenizer: Any) -> list[Case]:
    """The first `n` problems of a task of `lethe evaluate`, graded by it."""
    problems = task.problems(n, seed, tokenizer)
    return [Case(one, task, where=one.id, text=_shown(one.prompt, tokenizer)) for one in problems]


def as_cases(prompts: Iterable[Any], tokenizer: Any = None, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Case]:
    """Cases of strings, token ids, 1-D tensors, mappings as a line of a prompts file, or cases as they are.

    Raises:
        InputError: there are none, two have the same id, or one is none of these; names it by its place.
    """
    if isinstance(prompts, (str, Mapping)):
        raise InputError(f"prompts must be a list of prompts, not one {type(prompts).__name__}: put it in a list")
    if isinstance(prompts, Tensor) and prompts.dim() == 1:
        raise InputError("prompts must be a list of prompts, not one tensor of ids: put it in a list")
    cases = []
    for index, one in enumerate(prompts):
        where = f"prompts[{index}]"
        if isinstance(one, Tensor):
            one = one.flatten().tolist()  # noqa: PLW2901  # a row of ids, however it is shaped
        cases.append(one if isinstance(one, Case) else make_case(one, where, tokenizer, max_new_tokens))
    if not cases:
        raise InputError("there are no prompts to compare on")
    seen: dict[str, str] = {}
    for case in cases:
        if case.problem.id in seen:
            raise InputError(f"{case.where}: the id {case.problem.id!r} is that of {seen[case.problem.id]} already")
        seen[case.problem.id] = case.where
    return cases


def make_case(given: Any, where: str, tokenizer: Any, max_new_tokens: int, name: str | None = None) -> Case:
    """One case, called `name` if it has no id. Raises `InputError` that begins with `where`."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = {"ids": list(given)}
    values = {"prompt": given} if isinstance(given, str) else given
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: a prompt is a string or an object with 'prompt', not {type(values).__name__}")
    _check_keys(values, where)
    ids = _prompt_ids(values, where, tokenizer)
    completion = _ids_of(values, "completion", where, tokenizer, special=False) or ()
    limit = values.get("max_new_tokens", len(completion) or max_new_tokens)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InputError(f"{where}: max_new_tokens={limit!r} is not allowed: must be a whole number from 1 on")
    answer = _answer(values, where, tokenizer)
    problem = Problem(str(values.get("id", name or where)), ids, limit, answer, "prompts")
    grader = None if answer is None else TextAnswers()
    return Case(problem, grader, completion, where, _text(values, ids, tokenizer))


def check_cases(
    cases: Sequence[Case], vocab_size: int, max_positions: int | None, max_prompt_tokens: int | None = None
) -> None:
    """Refuse what the model cannot run, before anything is run.

    Raises:
        InputError: ids outside the vocabulary, or a prompt that is too long, alone or with what follows it.
    """
    for case in cases:
        prompt, new = case.problem.prompt, max(case.problem.max_new_tokens, len(case.completion))
        outside = [token for token in (*prompt, *case.completion) if not 0 <= token < vocab_size]
        if outside:
            raise InputError(
                f"{case.where}: the id {outside[0]} is outside the vocabulary of {vocab_size} ids: does the tokenizer"
                " belong to this model?"
            )
        if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
            raise InputError(f"{case.where}: the prompt has {len(prompt)} tokens, more than {max_prompt_tokens}")
        if max_positions is not None and len(prompt) + new > max_positions:
            raise InputError(
                f"{case.where}: a prompt of {len(prompt)} tokens and up to {new} new ones need {len(prompt) + new}"
                f" positions, and the model has {max_positions}: shorten the prompt or lower max_new_tokens"
            )


def digest(cases: Sequence[Case]) -> str:
    """Tells whether two comparisons were made on the same prompts."""
    told = [(c.problem.id, c.problem.prompt, c.problem.max_new_tokens, c.completion) for c in cases]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ reading


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in _KEYS:
            close = get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(_KEYS))}"
            raise InputError(f"{where}: unknown key {key!r}: {hint}")
    given = [key for key in ("prompt", "messages", "ids") if key in values]
    if len(given) != 1:
        raise InputError(f"{where}: must have one of 'prompt', 'messages' and 'ids', and has {given or 'none'}")
    if "completion" in values and "completion_ids" in values:
        raise InputError(f"{where}: 'completion' and 'completion_ids' contradict each other: give one")


def _prompt_ids(values: Mapping[str, Any], where: str, tokenizer: Any) -> tuple[int, ...]:
    if "messages" in values:
        text = _chat(values["messages"], where, tokenizer)
        ids: tuple[int, ...] | None = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    elif "ids" in values:
        ids = _ids(values["ids"], "ids", where)
    else:
        ids = _ids_of(values, "prompt", where, tokenizer, special=True)
    if not ids:
        raise InputError(f"{where}: the prompt is empty")
    return ids


def _chat(messages: Any, where: str, tokenizer: Any) -> str:
    shaped = isinstance(messages, list) and all(
        isinstance(m, Mapping) and {"role", "content"} <= {*m} for m in messages
    )
    if not messages or not shaped:
        raise InputError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: 'messages' need a tokenizer with a chat template; write 'prompt' instead")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _ids_of(
    values: Mapping[str, Any], key: str, where: str, tokenizer: Any, *, special: bool
) -> tuple[int, ...] | None:
    """Token ids under `key`, as text, or under its `_ids`; None where there is neither."""
    if f"{key}_ids" in values:
        return _ids(values[f"{key}_ids"], f"{key}_ids", where)
    if key not in values:
        return None
    if not isinstance(values[key], str):
        raise InputError(f"{where}: {key!r} must be text, not {type(values[key]).__name__}")
    if tokenizer is None:
        raise InputError(f"{where}: {key!r} is text, and there is no tokenizer: give one, or write token ids")
    return tuple(tokenizer(values[key], add_special_tokens=special)["input_ids"])


def _ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        raise InputError(f"{where}: {key!r} must be a list of token ids")
    return tuple(value)


def _answer(values: Mapping[str, Any], where: str, tokenizer: Any) -> Answer | None:
    if "answer" not in values:
        if "answer_pattern" in values:
            raise InputError(f"{where}: 'answer_pattern' says where an answer stands, and no 'answer' is given")
        return None
    if tokenizer is None:
        raise InputError(f"{where}: an answer is compared as text, and there is no tokenizer: give one")
    try:
        return Answer.of(values["answer"], values.get("answer_pattern"))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _text(values: Mapping[str, Any], ids: Sequence[int], tokenizer: Any) -> str:
    if isinstance(values.get("prompt"), str):
        return _shorten(values["prompt"])
    if "messages" in values:
        return _shorten(str(values["messages"][-1]["content"]))
    return _shown(ids, tokenizer)


def _shown(ids: Sequence[int], tokenizer: Any) -> str:
    if tokenizer is None:
        return _shorten(" ".join(map(str, ids[:_SHOWN])))
    return _shorten(tokenizer.decode(list(ids[:_SHOWN]), skip_special_tokens=True))


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"

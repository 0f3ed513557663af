"""The reasoner's problems against interpreters that know only the prompt's text, and the trained model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lethe_compile.models import reasoner
from lethe_compile.models.reasoner import task
from lethe_compile.models.reasoner.sharpness import sampled_entropy
from lethe_compile.models.reasoner.vocabulary import WORDS

LETTERS = "abcdef"


def run_loop(words: list[str]) -> str:
    """The trace of a loop program, line by line from its prompt's words."""
    first, limit, period = int(words[2][1:]), int(words[3][1:]), int(words[4][1:])
    init, printing = words.index("init"), words.index("print")
    constants: dict[str, int] = {}
    trace: list[str] = []
    total = 0
    for name, step in zip(words[6:init:2], words[7:init:2], strict=True):
        total = (total + int(step)) % 16
        constants[name] = total
        trace += [name, str(total)]
    program = words.index("L1")
    initial = words[init + 1 : program]
    registers = {name: int(value) for name, value in zip(initial[::2], initial[1::2], strict=True)}
    lines: list[list[str]] = []
    for word in words[program:printing]:
        if word.startswith("L"):
            lines.append([])
        lines[-1].append(word)
    shown = words[printing + 1]
    for count in range(first, limit):
        trace += [f"n{count}", f"n{limit}", "go"]
        if count % period == 0:
            trace += ["check"] + [text for name in sorted(registers) for text in (name, str(registers[name]))]
        for line in lines:
            trace += run_line(line, registers, constants)
        trace += ["print", shown, str(registers[shown])]
    return " ".join([*trace, f"n{limit}", f"n{limit}", "halt", shown, str(registers[shown]), "<eos>"])


def run_line(line: list[str], registers: dict[str, int], constants: dict[str, int]) -> list[str]:
    """Executes one line in place, and returns what the trace says of it."""
    if len(line) == 3:
        label, name, constant = line
        old, registers[name] = registers[name], (registers[name] + constants[constant]) % 16
        return [label, name, str(old), constant, name, str(registers[name])]
    if line[2] in "+-":
        label, left, sign, right, name = line
        a, b = registers[left], registers[right]
        registers[name] = (a + b if sign == "+" else a - b) % 16
        return [label, left, str(a), sign, right, str(b), name, str(registers[name])]
    label, left, threshold, name, increment = line
    said = [label, left, str(registers[left]), name, increment]
    if registers[left] >= int(threshold[1:]):
        return [*said, "no"]
    old, registers[name] = registers[name], (registers[name] + int(increment)) % 16
    return [*said, "yes", name, str(old), name, str(registers[name])]


def run_walk(words: list[str]) -> str:
    """The trace of a rotor walk from its prompt's words."""
    first, limit, period = int(words[2][1:]), int(words[3][1:]), int(words[4][1:])
    table, state = words.index("O0"), words.index("state")
    constants: dict[str, int] = {}
    trace: list[str] = []
    total = 0
    for name, step in zip(words[6:table:2], words[7:table:2], strict=True):
        total = (total + int(step)) % 16
        constants[name] = total
        trace += [name, str(total)]
    edges = {words[i]: (words[i + 1], words[i + 2]) for i in range(table, state, 3)}
    rotors = {word[0]: word for word in words[state + 1 : words.index("sum")]}
    total, node = int(words[-2]), "O"
    count = first
    while True:
        if node == "O":
            if count == limit:
                return " ".join([*trace, f"n{limit}", f"n{limit}", "halt", str(total), "<eos>"])
            trace += [f"n{count}", f"n{limit}", "go"]
            trace += ["check", *rotors.values()] if count % period == 0 else []
            trace += ["at"]
            count += 1
        rotors[node] = node + ("0" if rotors[node][1] == "1" else "1")
        edge = rotors[node]
        node, constant = edges[edge]
        total = (total + constants[constant]) % 16
        trace += [edge, constant, node, str(total)]


INTERPRETERS = {"loop": run_loop, "walk": run_walk}


@pytest.fixture(scope="module", params=task.FAMILIES)
def problems(request: pytest.FixtureRequest) -> task.Problems:
    return task.generate_problems(request.param, 40, seed=3, min_tokens=150, max_tokens=900)


def test_an_independent_interpreter_derives_the_trace(problems: task.Problems) -> None:
    for row in range(len(problems)):
        prompt, trace = task.render(problems.prompt(row)).split(), task.render(problems.trace(row))
        assert INTERPRETERS[problems.family](prompt) == trace
        assert WORDS[problems.answer_ids[row]] == trace.split()[-2]


def test_lengths_stay_in_range_and_prompts_are_short(problems: task.Problems) -> None:
    assert problems.trace_lengths.min() >= 150
    assert problems.trace_lengths.max() <= 900
    assert problems.prompt_lengths.max() <= 80
    assert problems.trace_ids.shape[1] == problems.trace_lengths.max()


@pytest.mark.parametrize("family", task.FAMILIES)
def test_seeds_reproduce(family: str) -> None:
    def prompts(seed: int) -> torch.Tensor:
        return task.generate_problems(family, 8, seed=seed, min_tokens=150, max_tokens=400).trace_ids

    assert torch.equal(prompts(1), prompts(1))
    assert not torch.equal(prompts(1)[:, :100], prompts(2)[:, :100])


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown family"):
        task.generate_problems("chess", 1, seed=0, min_tokens=150, max_tokens=400)
    with pytest.raises(ValueError, match="fit in"):
        task.generate_problems("loop", 8, seed=0, min_tokens=10, max_tokens=12)


def test_the_checker_accepts_the_reference_and_rejects_spoilt_ones(problems: task.Problems) -> None:
    rows = torch.arange(len(problems))
    last = problems.trace_lengths - 1
    assert task.solved(problems, problems.trace_ids).all()
    assert task.solved(problems, torch.nn.functional.pad(problems.trace_ids, (0, 5), value=task.EOS)).all()

    wrong = problems.trace_ids.clone()
    wrong[rows, last - 1] = task.parse("0")[0] + (wrong[rows, last - 1] - task.parse("0")[0] + 1) % 16
    assert not task.solved(problems, wrong).any()

    endless = problems.trace_ids.clone()
    endless[rows, last] = task.PAD
    assert not task.solved(problems, endless).any()

    early = problems.trace_ids.clone()
    early[:, 40] = task.EOS
    assert not task.solved(problems, early).any()


def test_token_accuracy_counts_positions(problems: task.Problems) -> None:
    spoilt = problems.trace_ids.clone()
    spoilt[:, 10] = task.PAD
    expected = 1 - 1 / problems.trace_lengths
    torch.testing.assert_close(task.token_accuracy(problems, spoilt), expected)
    torch.testing.assert_close(task.token_accuracy(problems, spoilt[:, :11]), 10 / problems.trace_lengths)


def test_sequences_join_prompt_and_trace(problems: task.Problems) -> None:
    ids, mask = task.sequences(problems, 1024)
    for row in range(4):
        joined = problems.prompt(row) + problems.trace(row)
        assert ids[row, : len(joined)].tolist() == joined
        assert (ids[row, len(joined) :] == task.PAD).all()
        assert ids[row][mask[row]].tolist() == problems.trace(row)


def test_the_tokenizer_round_trips(problems: task.Problems) -> None:
    tokenizer = reasoner.load_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.get_vocab() == {word: index for index, word in enumerate(WORDS)}
    for row in range(4):
        prompt = problems.prompt(row)
        text = task.render(prompt[1:])
        assert tokenizer(text)["input_ids"] == prompt  # <bos> is put in front
        assert tokenizer.decode(prompt, skip_special_tokens=True) == text


def test_the_weights_are_small_files_of_a_stock_architecture() -> None:
    shards = list(reasoner.path().glob("*.safetensors"))
    assert shards
    assert max(shard.stat().st_size for shard in shards) < 16 << 20
    assert sum(shard.stat().st_size for shard in shards) < 40 << 20


@pytest.mark.slow
@pytest.mark.parametrize("family", task.FAMILIES)
def test_the_model_solves_short_problems_with_transformers_generate(family: str) -> None:
    model: Any = reasoner.load_model()
    fresh = task.generate_problems(family, 2, seed=11, min_tokens=300, max_tokens=400)
    for row in range(len(fresh)):
        prompt = torch.tensor([fresh.prompt(row)])
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=420)
        assert output[0, prompt.shape[1] :].tolist() == fresh.trace(row)


def test_sampled_entropy_of_flat_and_of_sharp_attention() -> None:
    keys = torch.eye(64).repeat(1, 2, 1, 1)[:, :, :48]
    flat = sampled_entropy(torch.zeros(1, 4, 48, 64), keys, 1.0)
    assert 1.0 < flat < torch.tensor(48.0).log()  # log(row + 1), averaged over random rows
    sharp = sampled_entropy(100 * torch.eye(64).repeat(1, 4, 1, 1)[:, :, :48], keys, 1.0)
    assert sharp < 1e-6

"""`lethe evaluate`: its tasks, what it refuses before any work, and a run from command line to plots."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lethe_compile import cli, policies
from lethe_compile.errors import InputError
from lethe_compile.evaluation import make_cells
from lethe_compile.evaluation.cells import check_layers, parse_spec
from lethe_compile.tools import _evaluate_run, evaluate
from lethe_compile.tools._tasks import TASKS, make_task
from lethe_compile.tools._tasks.math_words import grade_math
from lethe_compile.tools._tasks.needle import KINDS, Needle
from tests.evaluation.stub import Make

ROOT = Path(__file__).parents[2]


class Words:
    """A tokenizer of whole words, its vocabulary made as it meets them."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(word, len(self.ids)) for word in text.split()]}

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        names = {number: word for word, number in self.ids.items()}
        return " ".join(names[token] for token in tokens)


# -------------------------------------------------------------------------------------------------------------- tasks


def test_the_reasoners_problems_are_graded_as_the_reasoner_does() -> None:
    task = make_task("reasoner:min_tokens=400,max_tokens=600")
    problems = task.problems(5, 3, None)
    assert [problem.id.partition("/")[2] for problem in problems] == ["loop-0", "walk-0", "loop-1", "walk-1", "loop-2"]
    prompts = [problem.prompt for problem in problems]
    assert prompts == [problem.prompt for problem in task.problems(5, 3, None)]
    assert prompts != [problem.prompt for problem in task.problems(5, 4, None)]
    for problem in problems:
        trace = problem.reference.trace(0)
        assert 400 <= problem.expected_tokens == len(trace) <= 600
        assert len(trace) < problem.max_new_tokens
        assert task.grade(problem, trace, None).score == 1
        assert "halt" in task.grade(problem, trace, None).answer
        assert task.grade(problem, trace[:-1], None).score == 0, "it did not end"
        wrong = [*trace[:-2], trace[-2] + 1, trace[-1]]
        assert task.grade(problem, wrong, None).score == 0


@pytest.mark.parametrize("kind", KINDS)
def test_needles_are_in_the_prompt_and_their_answers_count(kind: str) -> None:
    words = Words()
    task = Needle(kind=kind, tokens=300, needles=3)
    first, second = task.problems(2, 0, words)
    assert first.prompt == task.problems(2, 0, words)[0].prompt != second.prompt
    assert 290 < len(first.prompt) <= 300
    text = words.decode(first.prompt)
    count = {"single": 1, "multi-key": 1, "multi-value": 3, "tracking": 5}[kind]
    assert len(set(first.reference)) == count and all(answer in text for answer in first.reference)
    right = words(" , ".join(first.reference))["input_ids"]
    assert task.grade(first, right, words).score == 1
    assert task.grade(first, right[:1], words).score == pytest.approx(1 / count)
    assert task.grade(first, words("none at all")["input_ids"], words).score == 0
    if kind == "multi-key":
        key = re.search(r"number for (\S+) mentioned", text)
        assert key is not None and f"for {key[1]} is: {first.reference[0]}." in text and text.count("is:") == 3


def test_tracked_variables_are_assigned_before_they_are_used() -> None:
    words = Words()
    (problem,) = Needle(kind="tracking", tokens=400, needles=2, hops=3).problems(1, 5, words)
    text, known = words.decode(problem.prompt), set()
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        assert value.isdigit() or value in known
        known.add(name)
    assert len(known) == 8 and set(problem.reference) < known


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("72", "The answer is \\boxed{72}.", 1),
        ("72", "so we get 72", 1),
        ("72", "<think> maybe \\boxed{3} </think> It is \\boxed{72.0}", 1),
        ("72", "\\boxed{71}", 0),
        ("72", "no idea", 0),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1),
        ("\\frac{\\pi}{4}", "$\\boxed{\\pi/4}$", 1),
        ("(3, \\frac{\\pi}{2})", "\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", 1),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", 1),
    ],
)
def test_mathematics_is_compared_as_such(gold: str, text: str, score: float) -> None:
    assert grade_math(gold, text).score == score


def test_gsm8k_and_math500_are_read_from_files(tmp_path: Path) -> None:
    words, file = Words(), tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {n} + 1,000?", "answer": f"Add.\n#### {n + 1000:,}"} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = make_task(f"gsm8k:file={file},max_new_tokens=50")
    problems = task.problems(3, 0, words)
    assert [problem.reference for problem in problems] == ["1000", "1001", "1002"]
    assert problems[1].max_new_tokens == 50 and "\\boxed{}." in words.decode(problems[1].prompt)
    assert task.grade(problems[1], words("\\boxed{1001}")["input_ids"], words).score == 1
    assert [p.id for p in task.problems(3, 1, words)] != [p.id for p in problems], "another seed, another order"
    with pytest.raises(InputError, match="has 3 problems, and 4"):
        task.problems(4, 0, words)
    file.write_text('{"problem": "1+1", "answer": "2", "level": 5}\n{"problem": "x"')
    with pytest.raises(InputError, match=r"jsonl, line 2: not JSON"):
        make_task(f"math500:file={file}").problems(1, 0, words)
    file.write_text('{"problem": "1+1", "answer": "2", "level": 5}\n\n{"problem": "x"}')
    with pytest.raises(InputError, match=r"jsonl, line 3: no text under 'answer'"):
        make_task(f"math500:file={file}").problems(1, 0, words)


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("reasoner --task lop", "there is no task 'lop'.*did you mean 'loop'"),
        ("reasoner --task loop:tokens=3", "no setting 'tokens'"),
        ("reasoner --task loop:min_tokens=30,max_tokens=20", "min_tokens=30 must be below"),
        ("reasoner --task gsm8k", "file=PATH"),
        ("reasoner --task math500:file=/no/such", "there is no file /no/such"),
        ("reasoner --task needle:kind=two", "kind='two' must be one of"),
        ("reasoner --policy leth", "did you mean 'lethe'"),
        ("reasoner --policy lethe:decay=7", "decay=7 is not allowed"),
        ("reasoner --budget 19", "max_tokens=19 is not allowed: must be None or an integer >= 20"),
        ("reasoner --policy lethe --budget total=100", "budget=100 is not allowed"),
        ("reasoner --problems 0", "problems=0 is not allowed"),
        ("reasoner --processes 0", "processes=0 is not allowed"),
        ("reasoner --batch-size 0", "0 is not a batch size"),
        ("reasoner --time-limit 0", "time_limit=0.0 is not allowed"),
        ("reasoner --device tpu9", "is not a device"),
        ("reasoner --sweep /no/such.toml", "/no/such.toml cannot be read"),
        ("--task loop", "name a MODEL"),
        ("lethe_compile.models.tiny:llama --task needle", "has no tokenizer|no tokenizer: give --tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_before_any_work(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_evaluate_run.MakeEngine, "__call__", lambda self: pytest.fail("no model should be loaded"))
    assert cli.main(["evaluate", *arguments.split(), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = \nseed = 1", "line 1"),
        ('modle = "reasoner"', "no 'modle'.*did you mean 'model'"),
        ("[[policies]]\nx = 1", "no 'x'"),
    ],
)
def test_a_broken_sweep_says_where(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    assert cli.main(["evaluate", "reasoner", "--sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs scipy and matplotlib: pip install 'lethe-compile\[evaluate\]'"):
        evaluate.main(["reasoner", "--out", str(tmp_path)])


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_evaluate_run, "MakeEngine", lambda *_: Make())
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("stubbed")
def test_from_command_line_to_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "reasoner --policy full --policy lethe --policy lethe:score=sum,label=sums --budget 128 --budget 256"
    line = ["evaluate", *arguments.split(), "--problems", "8", "--out", str(tmp_path), "--seed", "1"]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    assert "max_tokens=128" in out and "sums" in out
    assert max(map(len, out.partition(str(tmp_path))[0].splitlines())) <= 80
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "run.json",
        "results.jsonl",
        "summary.json",
        "summary.md",
        "pareto-policies.png",
        "pareto-policies.svg",
    }
    assert {"layers-full.png", "layers-lethe-max-tokens-256.svg"} <= names
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] and len(summary["cells"]) == 5 and summary["seed"] == 1
    assert {cell["problems"] for cell in summary["cells"]} == {8}
    assert cli.main([*line[:-1], "2"]) == 2, "another seed in the same directory"
    refusal = capsys.readouterr().err
    assert "holds a run with another seed (1, now 2)" in refusal and refusal.count("\n") == 1


@pytest.mark.usefixtures("stubbed")
def test_exit_status_tells_failed_and_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["evaluate", "reasoner", "--problems", "8", "--batch-size", "2", "--no-plots", "--out", str(tmp_path)]
    monkeypatch.setattr(_evaluate_run, "MakeEngine", lambda *_: Make(seconds=0.2))
    assert cli.main([*line, "--time-limit", "0.3"]) == evaluate.INCOMPLETE
    assert json.loads((tmp_path / "summary.json").read_text())["complete"] is False
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    other = "reasoner/loop-0" if first["problem"] != "reasoner/loop-0" else "reasoner/walk-0"
    monkeypatch.setattr(_evaluate_run, "MakeEngine", lambda *_: Make(broken=other))
    assert cli.main(line) == 1
    assert "no such token" in json.loads((tmp_path / "summary.json").read_text())["failures"][0]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "tools/sweeps").glob("*.toml")))
def test_the_sweeps_that_ship_can_be_read(name: str, tmp_path: Path) -> None:
    line = ["--sweep", str(ROOT / "tools/sweeps" / name), "--out", str(tmp_path), "--device", "cpu"]
    options = _evaluate_run.read_options(evaluate.parser().parse_args(line))
    assert options.model == "reasoner" and all(task.partition(":")[0] in TASKS for task in options.tasks)
    entries = [{"policy": entry} if isinstance(entry, str) else entry for entry in options.policies]
    known = [entry for entry in entries if parse_spec(entry["policy"])[0] in policies._registry]
    cells = make_cells(known, options.budgets, options.batches, options.pack)
    check_layers(cells, 6)
    assert cells[0].is_full and {cell.curve for cell in cells} >= {"full", "lethe"}


@pytest.mark.slow
def test_the_reasoner_for_real(tmp_path: Path) -> None:
    """Rows packed wide solve what they solve alone, and the command resumes to the same figures."""
    line = ["reasoner", "--task", "loop:min_tokens=400,max_tokens=500", "--problems", "2", "--budget", "128"]
    line += ["--batch-size", "1", "--batch-size", "2", "--no-plots", "--threads", "1", "--out", str(tmp_path)]
    assert evaluate.main(line) == 0
    cells = json.loads((tmp_path / "summary.json").read_text())["cells"]
    by_batch = {(cell["policy"], cell["batch"]): cell for cell in cells}
    for policy in ("full", "lethe"):
        alone, packed = by_batch[policy, 1], by_batch[policy, 2]
        for figure in ("score", "new_tokens", "terminated", "kv_mean", "kv_peak"):
            assert alone[figure] == packed[figure], figure
    assert by_batch["full", 2]["score"]["value"] == 1
    assert by_batch["lethe", 2]["kv_of_full"] < 0.6
    assert evaluate.main(line) == 0

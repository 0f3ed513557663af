"""`lethe compare` as a command: exit status, one-line errors, files, the baseline, and limits of pyproject.toml."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from lethe_compile import api, cli, viewer
from lethe_compile.models.tiny import tiny

MODEL = "lethe_compile.models.tiny:llama"
PRUNED = ["--set", "prune_interval=5", "--set", "protect_prompt=false", "--set", "page_size=4", "--max-tokens", "20"]
Lethe = Callable[..., int]


@pytest.fixture
def lethe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lethe:
    """`lethe compare MODEL …` in a folder with two prompts; 30 new tokens each."""
    (tmp_path / "prompts.jsonl").write_text('{"ids": [5, 6, 7, 8, 9, 10, 11]}\n{"ids": [3, 4, 5]}\n')
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, model: str = MODEL, prompts: str = "prompts.jsonl") -> int:
        return cli.main(["compare", model, "--prompts", prompts, "--max-new-tokens", "30", *argv])

    return run


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model, compiled once for all tests that ask for it: they are about what is made of it."""
    if not _MADE:
        _MADE.append(api.optimize(tiny("llama"), verified=False))

    def optimize(model: object, config: object, policy: str | None = None) -> object:
        _MADE[0].reconfigure(config)
        return _MADE[0]

    monkeypatch.setattr("lethe_compile.tools._compare_run.optimize", optimize)


_MADE: list[object] = []


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("lethe compare: error: "), err
    return err.removeprefix("lethe compare: error: ").rstrip()


@pytest.mark.usefixtures("compiled")
def test_limits_give_the_exit_status_and_files_the_figures(lethe: Lethe, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["--max-kl", "10", "--min-memory-saving", "0.1"]
    assert lethe(*PRUNED, *kept, "--json", "out.json", "--junit", "out.xml") == 0
    out = capsys.readouterr().out
    assert "passed: 2 limits kept" in out and "wrote out.json" in out
    values = json.loads(Path("out.json").read_text())
    assert values["passed"] and values["facts"]["config"]["max_tokens"] == 20 and values["facts"]["model"] == MODEL
    assert [one["id"] for one in values["prompts"]] == ["prompts.jsonl:1", "prompts.jsonl:2"]
    assert ET.parse("out.xml").getroot()[0].get("failures") == "0"

    assert lethe(*PRUNED, "--max-kl", "1e-6", "--quiet", "--junit", "out.xml", "--only", "forced") == 1
    out = capsys.readouterr().out
    assert out.startswith("FAILED\n  KL, mean per step: ") and out.count("\n") == 2
    assert ET.parse("out.xml").getroot()[0].get("failures") == "1"


@pytest.mark.usefixtures("compiled")
def test_limits_of_a_project_hold_and_flags_come_first(lethe: Lethe) -> None:
    Path("pyproject.toml").write_text("[tool.lethe.compare]\nmax_kl = 1e-6\n")
    assert lethe(*PRUNED, "--only", "forced", "--quiet") == 1
    assert lethe(*PRUNED, "--only", "forced", "--quiet", "--max-kl", "10") == 0


@pytest.mark.usefixtures("compiled")
def test_a_baseline_is_recorded_and_held_against(lethe: Lethe, capsys: pytest.CaptureFixture[str]) -> None:
    forced = ["--only", "forced", "--quiet", "--baseline", "base.json"]
    assert lethe("--policy", "full", *forced) == 2
    assert "there is no baseline base.json" in one_line(capsys)
    assert lethe("--policy", "full", *forced, "--update-baseline") == 0
    assert lethe("--policy", "full", *forced) == 0
    capsys.readouterr()
    assert lethe(*PRUNED, *forced) == 1
    out = capsys.readouterr().out
    assert re.search(r"KL, mean per step: \S+ in the baseline, \S+ now \(tolerance 0.1\)", out) and "top-1" in out
    assert lethe(*PRUNED, *forced, *(f"--tolerance={name}=9" for name in ("top1", "ppl_increase"))) == 1
    assert "top-1" not in capsys.readouterr().out
    assert lethe(*PRUNED, *forced, prompts="other.jsonl") == 2
    capsys.readouterr()
    Path("other.jsonl").write_text('{"ids": [5, 6]}\n')
    assert lethe(*PRUNED, *forced, prompts="other.jsonl") == 2
    assert "on other prompts" in one_line(capsys)


@pytest.mark.usefixtures("compiled")
def test_the_report_gets_the_worst_prompt(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[dict[str, Any]] = []
    write = viewer.write_report

    def write_report(path: Path, **parts: Any) -> Path:
        got.append(parts)
        return write(path, **parts)

    monkeypatch.setattr(viewer, "write_report", write_report)
    assert lethe(*PRUNED, "--html", "out.html", "--json", "out.json", "--quiet") == 0
    ((comparison, recording, graph),) = [one.values() for one in got]
    values = json.loads(Path("out.json").read_text())
    assert json.loads(json.dumps(comparison)) == values
    assert re.findall(r'<section id="([a-z]+)"', Path("out.html").read_text()) == [
        *("comparison", "cache", "rounds", "text", "graph")
    ]
    assert len(graph["layers"]) == graph["captured"]["summary"]["ops"]["lethe::attention_site"]
    worst = max(values["prompts"], key=lambda one: one["forced"]["kl"])
    assert recording["model"] == f"{MODEL}, {worst['id']}" and recording["format"] == "lethe-recording/1"
    assert len(recording["sequences"][0]["tokens"]) == worst["prompt_tokens"] + 30


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", "none.jsonl"], "none.jsonl cannot be read: No such file or directory"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:3: not JSON"),
        (["--prompts", "empty.jsonl"], "empty.jsonl has no prompts"),
        (["--prompts", "text.jsonl"], "text.jsonl:1: 'prompt' is text, and there is no tokenizer"),
        (["--max-kl", "0", "--min-memory-saving", "0.5"], "max_kl=0 and min_memory_saving=0.5 contradict each other"),
        (["--min-top1", "1.5"], "min_top1=1.5 is not allowed"),
        (["--max-kl", "1", "--only", "free"], "max_kl is a limit on the teacher-forced run, which is switched off"),
        (["--policy", "full", "--min-memory-saving", "0.5"], "min_memory_saving=0.5 contradicts policy 'full'"),
        (["--max-accuracy-drop", "0"], "max_accuracy_drop=0 needs answers"),
        (["--task", "reasoner"], "--prompts and --task contradict each other"),
        (["--update-baseline"], "--update-baseline records into --baseline FILE"),
        (["--junit", "no/where.xml"], "--junit no/where.xml: there is no directory"),
        (["--set", "max_tokens=40", "--max-tokens", "50"], "--set max_tokens and --max-tokens contradict"),
        (["--set", "max_tokns=40"], "'max_tokns' is no setting of policy 'lethe'; the nearest is 'max_tokens'"),
        (["--tolerance", "kl"], "--tolerance kl: must be METRIC=NUMBER"),
        (["--tolerance", "klx=1"], "--tolerance: 'klx' is no metric"),
        (["--device", "nowhere"], "'nowhere' is not a device"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--artifact", "none"], "none is no artifact: it has no manifest.json"),
    ],
)
def test_bad_input_is_one_line_and_2_before_the_model_is_compiled(
    lethe: Lethe, argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def optimize(*_: object, **__: object) -> None:
        raise AssertionError("nothing should be compiled")

    monkeypatch.setattr("lethe_compile.tools._compare_run.optimize", optimize)
    Path("bad.jsonl").write_text('{"ids": [1]}\n\n{"ids": \n')
    Path("empty.jsonl").write_text("\n")
    Path("text.jsonl").write_text('"some text"\n')
    assert lethe(*argv) == 2
    assert one_line(capsys).startswith(message)


def test_a_bad_pyproject_is_named(lethe: Lethe, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pyproject.toml").write_text("[tool.lethe.compare]\nmax_kll = 1\n")
    assert lethe() == 2
    assert "'max_kll' is not a setting of [tool.lethe.compare]" in one_line(capsys)


@pytest.mark.usefixtures("compiled")
def test_prompts_that_are_too_long_are_named(lethe: Lethe, capsys: pytest.CaptureFixture[str]) -> None:
    assert lethe("--max-prompt-tokens", "5", "--quiet") == 2
    assert "prompts.jsonl:1: the prompt has 7 tokens, more than 5" in capsys.readouterr().err
    assert lethe("--max-new-tokens", "100000", "--quiet") == 2
    assert "prompts.jsonl:1: a prompt of 7 tokens and up to 100000 new ones need" in capsys.readouterr().err


def test_a_model_that_does_not_load_is_2_also_in_junit(
    lethe: Lethe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"not weights")
    for model in ("no.such:factory", "lethe_compile.models.tiny:factory", str(folder)):
        assert lethe("--junit", "out.xml", model=model) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("lethe compare: error: no ") or "the factory" in message
        suite = ET.parse("out.xml").getroot()[0]
        assert suite.get("errors") == "1" and suite[0][0].get("message") in message


def test_a_bug_is_not_taken_for_a_limit(
    lethe: Lethe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lethe_compile.tools._compare_run.run", broken)
    assert lethe("--junit", "out.xml") == 2
    assert "RuntimeError: a bug" in capsys.readouterr().err
    assert ET.parse("out.xml").getroot()[0].get("errors") == "1"

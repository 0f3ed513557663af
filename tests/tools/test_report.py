"""`lethe report`: a report of what others wrote, or of a generation of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lethe_compile.cli import main as lethe
from lethe_compile.errors import InputError
from lethe_compile.recording import read_recording
from lethe_compile.tools import report
from tests.viewer.parts import comparison, sweep

TINY = "lethe_compile.models.tiny:llama"


def sections(page: Path) -> list[str]:
    return re.findall(r'<section id="([\w-]+)"', page.read_text())


@pytest.mark.slow
def test_a_generation_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, recorded = tmp_path / "report.html", tmp_path / "recording.json"
    arguments = [
        "--prompt",
        "loop n1 n9 e2 let k1 +6",
        "--prompt",
        "loop n2",
        "--max-new-tokens",
        "70",
        "--max-tokens",
        "48",
    ]
    assert lethe(["report", "reasoner", *arguments, "--save-recording", str(recorded), "--out", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert sections(page) == ["cache", "rounds", "text", "graph"]
    recording = read_recording(recorded)
    assert [one["prompt"] for one in recording["sequences"]] == [8, 3], "<bos> and the words"
    assert "".join(recording["sequences"][0]["tokens"]).startswith("<bos> loop n1 n9 e2 let k1 +6 ")
    assert recording["config"]["max_tokens"] == 48 and recording["model"] == "reasoner"
    again = tmp_path / "again.html"
    assert lethe(["report", "--recording", str(recorded), "--out", str(again)]) == 0
    assert sections(again) == ["cache", "rounds", "text"]


def test_what_others_wrote(tmp_path: Path) -> None:
    compared = tmp_path / "comparison.json"
    compared.write_text(json.dumps(comparison()))
    page = tmp_path / "report.html"
    arguments = ["--comparison", str(compared), "--sweep", str(sweep(tmp_path / "summary.json")), "--out", str(page)]
    assert report.main(arguments) == 0
    assert sections(page) == ["comparison", "frontier"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to report: name a MODEL"),
        (["--recording", "none.json"], "none.json cannot be read"),
        (["--comparison", "none.json"], "none.json cannot be read"),
        (["--comparison", "{list}"], "is not a comparison of lethe compare --json: it is a list"),
        (["--graph", "{empty}"], "is not an inspection of lethe inspect --json: it lacks passes, captured"),
        (["--graph", "{broken}"], "it is not JSON"),
        (["reasoner", "--recording", "any"], "MODEL makes its own: leave out --recording, or MODEL"),
        ([TINY], "needs a --prompt"),
        ([TINY, "--prompt", "a"], "has no tokenizer"),
        (["reasoner", "--prompt", "  "], "prompt 0 has no tokens"),
        (["reasoner", "--max-new-tokens", "0"], "--max-new-tokens 0: at least 1"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"list": "[]", "empty": "{}", "broken": "{"}.items():
        (tmp_path / name).write_text(content)
    given = [argument.strip("{}") if argument.startswith("{") else argument for argument in arguments]
    with pytest.raises(InputError) as refused:
        report.main(given)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "report.html").exists()

"""`lethe inspect`: the report of a model named on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lethe_compile.errors import InputError
from lethe_compile.models.tiny import tiny
from lethe_compile.tools import inspect_graph


def test_a_factory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    arguments = ["lethe_compile.models.tiny:mistral", "--print-after", "insert-attention", "--json", str(file)]
    assert inspect_graph.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "torch.ops.lethe.attention.default" in printed and "sliding 7" in printed
    assert [layer["window"] for layer in json.loads(file.read_text())["layers"]] == [7, 7, 7]


def test_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    tiny("qwen3").save_pretrained(tmp_path)
    assert inspect_graph.main([str(tmp_path)]) == 0
    assert "model.layers.2.self_attn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model"], "no model can be loaded from 'no/such/model'"),
        (["lethe_compile.models.tiny:none"], "no factory"),
        (["lethe_compile.models.tiny:llama", "--print-after", "fuse"], "no pass is called 'fuse'"),
        (["lethe_compile.models.tiny:llama", "--print-after", "locate-cache"], "'locate-cache' does not run on this"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect_graph.main(arguments)

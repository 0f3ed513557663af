"""`lethe inspect`: the report of a model named on the command line."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from lethe_compile.cli import main as lethe
from lethe_compile.errors import InputError
from lethe_compile.inspection import Inspection, inspect_model
from lethe_compile.models.tiny import tiny
from lethe_compile.passes.drawing import Drawing
from lethe_compile.tools import _models, inspect_graph

MISTRAL = "lethe_compile.models.tiny:mistral"


def backwards() -> object:
    """A decoder that sees later tokens."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    from tests.passes.toy import Toy

    def seeing(toy: Toy, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu()
        return attend(query, key, value, mask, enable_gqa=True)

    return Toy(seeing)


def test_a_factory(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file, graphs = tmp_path / "report.json", tmp_path / "graphs"
    arguments = [MISTRAL, "--print-after", "insert-attention", "--print-after", "captured", "--diff", "classify-masks"]
    assert inspect_graph.main([*arguments, "--json", str(file), "--dump", str(graphs)]) == 0
    printed = capsys.readouterr().out
    assert "graph after insert-attention" in printed and "= lethe.attention.default(" in printed
    assert "graph as it was captured" in printed and "graph after normalize" not in printed
    assert re.search(r"classify-masks: \d+ lines added, \d+ removed", printed) and "\n-%" in printed
    assert "sliding 7, evaluated element by element for" in printed, "the mask and its proof"
    assert "layers 0–2 found by interface: tier 1" in printed
    assert "✓ all 3 attentions rewritten; nothing was refused" in printed
    read = json.loads(file.read_text())
    assert [layer["window"] for layer in read["layers"]] == [7, 7, 7]
    assert "padded left and right" in read["layers"][0]["mask_proof"] and read["refusal"] is None
    assert read["captured"]["inputs"]["input_ids"] == "i64[B, T]" and read["captured"]["expected_attentions"] == 3
    before, after = (read[name]["summary"]["ops"] for name in ("captured", "result"))
    assert before["lethe::attention_site"] == after["lethe::attention"] == 3
    assert Drawing.from_dict(read["result"]["drawing"]).folded
    names = {path.name for path in graphs.iterdir()}
    assert {"00-captured.svg", "09-insert-attention.dot", "06-classify-masks.txt", "inspection.json"} <= names
    assert len(names) == 4 * 10 + 1


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Of a model in a directory."""
    folder = tmp_path_factory.mktemp("qwen3")
    tiny("qwen3").save_pretrained(folder)
    return inspect_model(_models.load_model(str(folder)), name="tiny qwen3")


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(found: Inspection, columns: int) -> None:
    console = Console(width=columns, file=io.StringIO())
    console.print(found)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, printed.splitlines())) <= columns
    assert "model.layers.2.self_attn" in printed, "names stay whole"


def test_a_step_with_a_cache_of_its_own_in_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert inspect_graph.main(["lethe_compile.models.static_decoder:factory", "--diff", "classify-masks"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[31m-%" in printed and "\x1b[32m+%" in printed, "removed in red, added in green"
    assert "\x1b[1;32m✓" in printed
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    assert "caches that the model carried itself, and lost" in plain
    assert "'layers.0.attention.kv_cache.k_cache' and" in plain and "numbers of tokens before" in plain


def test_json_in_place_of_tables(
    found: Inspection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_graph._models, "load_model", lambda name: None)
    monkeypatch.setattr(inspect_graph, "inspect_model", lambda *_, **__: found)
    assert inspect_graph.main(["any", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(found.to_json())


def test_a_refusal_shows_how_far_it_came(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(inspect_graph._models, "load_model", lambda name: backwards())
    file = tmp_path / "report.json"
    assert lethe(["inspect", "backwards", "--json", str(file)]) == 2
    printed = capsys.readouterr().out
    assert "locate-attention" in printed and "✗ refused during pass classify-masks: " in printed
    assert "not causal" in printed and "layer 0" in printed
    refusal = json.loads(file.read_text())["refusal"]
    assert refusal["layer"] == 0 and refusal["during"] == "pass classify-masks" and refusal["node"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model"], "no model can be loaded from 'no/such/model'"),
        (["lethe_compile.models.tiny:none"], "no factory"),
        ([MISTRAL, "--print-after", "fuse"], "no pass is called 'fuse'; there are captured, locate-cache, normalize"),
        ([MISTRAL, "--diff", "fuse"], "no pass is called 'fuse'; there are locate-cache, .*, all"),
        ([MISTRAL, "--print-after", "locate-cache"], "'locate-cache' does not run on this"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect_graph.main(arguments)

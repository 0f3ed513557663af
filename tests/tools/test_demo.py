"""`lethe demo` on the trained reasoner: the figures it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lethe_compile.errors import InputError
from lethe_compile.tools import demo


@pytest.mark.slow
def test_the_reasoner_solves_with_less_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "demo.json"
    assert demo.main(["--problems", "2", "--shortest", "1000", "--longest", "1100", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    full, lethe = result["full"], result["lethe"]
    assert set(full) >= {"solved", "kv_bytes_peak", "kv_bytes_mean", "tokens_per_s", "new_tokens"}
    assert set(lethe) == set(full) | {"retained_per_layer"}
    assert result["problems"] == full["solved"] == 2
    assert lethe["kv_bytes_mean"] < 0.6 * full["kv_bytes_mean"]
    assert lethe["kv_bytes_peak"] < 0.5 * full["kv_bytes_peak"]
    assert len(lethe["retained_per_layer"]) == 6 and min(lethe["retained_per_layer"]) > 50
    assert len(set(map(round, lethe["retained_per_layer"]))) > 1, "budgets differ from layer to layer"
    printed = capsys.readouterr().out
    assert "solved" in printed and "tokens retained per layer" in printed


@pytest.mark.parametrize("arguments", [["--problems", "1"], ["--shortest", "10"], ["--longest", "9000"]])
def test_what_cannot_be_run_is_refused(arguments: list[str]) -> None:
    with pytest.raises(InputError):
        demo.main(arguments)

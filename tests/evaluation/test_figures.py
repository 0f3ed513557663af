from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lethe_compile.evaluation import Figures, make_cells, summarize
from lethe_compile.evaluation.figures import estimate, mcnemar
from lethe_compile.evaluation.tables import human_bytes, markdown, terminal

CELLS = make_cells(
    ["full", "lethe", {"policy": "lethe:score=sum", "label": "sums"}], budgets=[128, 256, 512], batches=[4]
)


def record(cell: Any, problem: int, score: float, kv: float) -> dict[str, Any]:
    sizes = {"kv_mean": kv, "kv_peak": 2 * kv, "pool_mean": kv, "pool_peak": kv}
    facts = {"cell": cell.id, "problem": f"t/{problem}", "group": "ab"[problem % 2], "score": score}
    return {**facts, **sizes, "new_tokens": 100, "terminated": problem > 0, "seconds": 2.0}


def records(problems: int = 40) -> list[dict[str, Any]]:
    found = []
    for cell in CELLS:
        size = cell.config.max_tokens or 4096
        kv = size * (1.0 if cell.curve != "sums" else 1.5)
        right = problems if cell.is_full else problems - 4096 // size // (1 if cell.curve == "sums" else 4)
        found += [record(cell, i, float(i < right), kv) for i in range(problems)]
    return found


FIGURES: Figures = summarize(CELLS, records())


def test_a_cell_by_hand() -> None:
    full, small, *_ = FIGURES.cells
    assert (full.score.value, full.versus_full, full.kv_of_full) == (1.0, None, 1.0)
    assert full.score.high == 1.0 and full.score.low == pytest.approx(0.9119, abs=1e-3), "Clopper-Pearson of 40"
    assert small.score.value == pytest.approx(32 / 40) and small.kv_of_full == pytest.approx(128 / 4096)
    assert small.versus_full is not None and small.versus_full.value == pytest.approx(-0.2)
    assert small.versus_full.low < -0.2 < small.versus_full.high < 0
    assert small.p_value == pytest.approx(2 * 0.5**8)
    assert small.terminated == pytest.approx(39 / 40) and small.tokens_per_s == pytest.approx(50)
    assert small.groups == {"a": pytest.approx(16 / 20), "b": pytest.approx(16 / 20)}


def test_mcnemar_counts_only_what_differs() -> None:
    ours, theirs = np.array([1.0, 1, 1, 0, 0]), np.array([1.0, 0, 0, 0, 1])
    assert mcnemar(ours, theirs) == pytest.approx(1.0)
    assert mcnemar(ours, ours) == 1.0
    assert mcnemar(ours, np.array([0.5, 0, 0, 0, 1])) is None


def test_intervals_cover() -> None:
    rng = np.random.default_rng(0)
    draws = [estimate((rng.random(100) < 0.8).astype(float), 0) for _ in range(40)]
    assert sum(one.low <= 0.8 <= one.high for one in draws) >= 34
    alike = estimate(np.zeros(10), 0, -1.0)
    assert alike.low == -alike.high < 0


def test_equal_bytes_interpolates_between_neighbours() -> None:
    """Lethe at 256: sums lie at 192 and 384 bytes, and solve 8 and 24 of 40 there."""
    found = {(one.kv_mean, one.curve): one.difference for one in FIGURES.equal_bytes}
    assert found[128.0, "sums"] is None, "sums were not measured with so few bytes"
    weight = np.log(256 / 192) / np.log(2)
    difference = found[256.0, "sums"]
    assert difference is not None
    assert difference.value == pytest.approx(36 / 40 - (1 - weight) * 8 / 40 - weight * 24 / 40)
    assert difference.low < difference.value < difference.high


def test_equal_bytes_takes_an_end_that_is_near() -> None:
    near = [{**one, "kv_mean": one["kv_mean"] * (0.97 / 1.5 if "sum" in one["cell"] else 1)} for one in records()]
    found = {(one.kv_mean, one.curve): one.difference for one in summarize(CELLS, near).equal_bytes}
    difference = found[512.0, "sums"]
    assert difference is not None and difference.value == pytest.approx(38 / 40 - 32 / 40)


def test_cells_are_compared_on_what_both_have() -> None:
    some = [one for one in records() if CELLS[0].id != one["cell"] or int(one["problem"][2:]) < 10]
    small = summarize(CELLS, some).cells[1]
    assert small.problems == 40 and small.versus_full is not None and small.versus_full.value == 0


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(terminal(FIGURES, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    for words in ("100.0", "[91.2, 100.0]", "tok/s", "max_tokens=128", "−20.0", "sums"):
        assert words in text
    assert "…" not in text


def test_markdown_is_a_table() -> None:
    lines = markdown(FIGURES, "head").splitlines()
    rows = [line for line in lines if line.startswith("| lethe, max_tokens=128 |")]
    assert len(rows) == 1 and rows[0].count("|") == lines[4].count("|")


def test_bytes_in_words() -> None:
    assert [human_bytes(n) for n in (12, 999, 2048, 3 << 19, 5 << 40)] == [
        "12 B",
        "999 B",
        "2 KiB",
        "1.5 MiB",
        "5.12e+03 GiB",
    ]


def test_plots_are_written(tmp_path: Path) -> None:
    from lethe_compile.evaluation import plots

    files = plots.pareto(FIGURES, "policies", "title", tmp_path / "pareto")
    timeline = {"steps": [0, 32], "retained": [[40.0, 40.0], [60.0, 50.5]], "sparsity": [[None, None], [0.2, 0.4]]}
    files += plots.heat_map(timeline, "title", tmp_path / "layers")
    assert [file.suffix for file in files] == [".png", ".svg"] * 2
    for file in files:
        start = file.read_bytes()[:400]
        assert start.startswith(b"\x89PNG") if file.suffix == ".png" else b"<svg" in start
    assert "Hoyer sparsity" in _texts(files[3])
    unscored = plots.heat_map({**timeline, "sparsity": [[None, None]] * 2}, "title", tmp_path / "none")
    assert "Hoyer sparsity" not in _texts(unscored[1]) and "keeps no scores" in _texts(unscored[1])


def _texts(svg: Path) -> str:
    return svg.read_text()

from __future__ import annotations

from typing import Any

import pytest

from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError, InputError
from lethe_compile.evaluation import make_cells
from lethe_compile.evaluation.cells import check_layers, describe, parse_budget, parse_spec


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("lethe", "lethe", {}),
        ("lethe:sparse_ratio=100,recent_ratio=0.3", "lethe", {"sparse_ratio": 100, "recent_ratio": 0.3}),
        ("lethe:paper_literal=true,max_tokens=none", "lethe", {"paper_literal": True, "max_tokens": None}),
        ("mine:sizes=[1,2],name=a b", "mine", {"sizes": [1, 2], "name": "a b"}),
    ],
)  # fmt: skip
def test_specs(text: str, name: str, settings: dict[str, Any]) -> None:
    assert parse_spec(text) == (name, settings)


@pytest.mark.parametrize("text", ["", ":", "lethe:", "lethe:decay", "lethe:=1"])
def test_broken_specs(text: str) -> None:
    with pytest.raises(InputError, match="KEY=VALUE"):
        parse_spec(text)


def test_budgets() -> None:
    assert parse_budget("256") == parse_budget(256) == {"max_tokens": 256}
    assert parse_budget("total=1536") == {"budget": 1536}
    assert parse_budget("0.125") == parse_budget(0.125) == {"budget": 0.125}
    assert parse_budget("64MiB") == {"budget": "64MiB"}
    with pytest.raises(InputError):
        parse_budget(" ")


def test_every_policy_meets_every_budget_and_full_none() -> None:
    cells = make_cells(["full", "lethe", "lethe:score=sum"], budgets=[128, 256], batches=[1, 16])
    assert [cell.id for cell in cells[:2]] == ["full batch=1", "full batch=16"]
    assert len(cells) == 2 + 2 * 2 * 2
    assert {cell.curve for cell in cells} == {"full", "lethe", "lethe score=sum"}
    assert cells[2].config == LetheConfig(max_tokens=128) and cells[2].budget == "max_tokens=128"


def test_packing_runs_independent_rows_once() -> None:
    entries = [
        {"policy": "lethe"},
        {"policy": "lethe:paper_literal=true"},
        {"policy": "lethe", "pack": 0, "problems": 2},
    ]
    cells = make_cells(entries, batches=[1, 16], pack=256)
    assert [cell.batch for cell in cells] == [256, 1, 16, 1, 16]
    assert [cell.coupled for cell in cells] == [False, True, True, False, False]
    assert len({cell.id for cell in cells}) == len(cells)


def test_varied_settings_are_curves() -> None:
    entry = {"policy": "lethe", "label": "τ", "group": "tau", "vary": {"sparse_ratio": [10, 20], "segments": 8}}
    cells = make_cells([entry], budgets=[128])
    assert [cell.curve for cell in cells] == ["τ sparse_ratio=10 segments=8", "τ sparse_ratio=20 segments=8"]
    assert {cell.group for cell in cells} == {"tau"}
    assert describe(cells[0].config) == "lethe sparse_ratio=10 segments=8 max_tokens=128"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("leth", "did you mean 'lethe'"),
        ("lethe:sparse=3", "sparse_ratio"),
        ("lethe:decay=2", "decay=2 is not allowed"),
        ({"policy": "lethe", "budgets": [19]}, "max_tokens=19 is not allowed"),
        ({"policy": "lethe", "budget": [20]}, "has no 'budget'"),
        ({"label": "x"}, "does not name its policy"),
        ({"policy": "lethe", "batches": [0]}, "0 is not a batch size"),
    ],
)
def test_what_cannot_run_is_refused(entry: Any, message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        make_cells([entry])


def test_a_budget_below_the_floor_of_all_layers_is_refused() -> None:
    cells = make_cells(["lethe"], budgets=["total=200"])
    check_layers(cells, None)
    with pytest.raises(ConfigError, match="budget=200 is not allowed"):
        check_layers(cells, 6)

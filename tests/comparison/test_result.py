"""From prompts to metrics, verdict, JSON, JUnit XML, tables, and the baseline of an earlier run."""

from __future__ import annotations

import importlib.util
import io
import json
from math import exp, inf, nan
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.cells import cell_len
from rich.console import Console

from lethe_compile.comparison.baseline import TOLERANCE, check_baseline, read_baseline, write_baseline
from lethe_compile.comparison.junit import write_junit, write_junit_error
from lethe_compile.comparison.metrics import METRICS
from lethe_compile.comparison.plain import BUCKETS
from lethe_compile.comparison.result import Comparison, Forced, PromptResult
from lethe_compile.errors import InputError
from lethe_compile.passes.summary import Unexpected
from lethe_compile.testing import failure_message

spec = importlib.util.spec_from_file_location("made", Path(__file__).with_name("made.py"))
assert spec is not None and spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)

ALIEN = Unexpected("alien::op", 3, "of a library that the captured graph did not call")


def test_metrics_are_over_all_steps_and_prompts() -> None:
    one = made.comparison()
    assert set(METRICS) == {measured.metric.name for measured in one.metrics}
    expected = {
        "kl": 1.4 / 6, "kl_p99": 0.6, "kl_max": 0.6, "top1": 4 / 6,
        "ppl_increase": exp((2 * 1.1 + 4 * 2.5) / 6 - (2 * 1.0 + 4 * 2.0) / 6) - 1,
        "accuracy_drop": 0.5, "same_outputs": 0.5, "first_divergence": 1.0, "length_ratio": 6 / 5,
        "terminated_drop": 0.5, "memory_saving": 0.6, "kv_mean_ratio": 0.4, "kv_peak_ratio": 0.4,
        "speedup": (6 / 1) / (5 / 2),
    }  # fmt: skip
    assert {name: one[name] for name in expected} == pytest.approx(expected)
    worst = {m.metric.name: m.worst.where for m in one.metrics if m.worst is not None}
    assert worst["kl"] == worst["top1"] == worst["accuracy_drop"] == worst["length_ratio"] == "p.jsonl:2"
    assert one.passed and [prompt.id for prompt in one.worst_first()] == ["second", "first"]
    with pytest.raises(KeyError, match="'klx' was not measured"):
        one["klx"]


def test_what_was_not_measured_is_left_out() -> None:
    first = made.PROMPTS[0]
    one = made.comparison(prompts=(PromptResult("a", "a", 1, "", first.forced),))
    assert [m.metric.name for m in one.metrics] == ["kl", "kl_p99", "kl_max", "top1", "ppl_increase"]
    two = made.comparison(prompts=(PromptResult("a", "a", 1, "", None, made.free([5], [5], (None, None))),))
    assert {"accuracy_drop", "first_divergence"} & {m.metric.name for m in two.metrics} == set()


def test_limits_say_what_fails() -> None:
    kept = {"kl": 0.24, "top1": 0.66, "memory_saving": 0.6, "speedup": 2.4}
    assert made.comparison(kept).passed
    one = made.comparison({"kl": 0.2, "top1": 0.7, "memory_saving": 0.5}, graph=made.graph(ALIEN))
    assert one.failures == [
        "KL, mean per step: 0.233, limit ≤ 0.2",
        "top-1 agreement: 66.67%, limit ≥ 70.00%",
        f"unexpected op: alien::op (3 ×): {ALIEN.reason}",
    ]
    bad = (PromptResult("a", "a", 1, "", made.forced([inf], [True], (1.0, inf))),)
    assert not made.comparison({"kl": 1e9, "ppl_increase": 1e9}, prompts=bad).passed
    bad = (PromptResult("a", "a", 1, "", made.forced([nan], [True], (1.0, 1.0))),)
    assert not made.comparison({"kl": 1e9}, prompts=bad).passed


def test_plain_form_is_json_and_bounded() -> None:
    values = json.loads(made.comparison({"kl": 0.2}).to_json())
    assert values["format"] == "lethe-comparison/1" and values["passed"] is False and len(values["failures"]) == 1
    assert values["metrics"][0]["worst"] == {"id": "second", "where": "p.jsonl:2", "value": 0.3}
    assert values["by_step"] == {
        "step": [0, 1, 2, 3], "kl": pytest.approx([0.05, 0.35, 0.6, 0]), "top1": [1, 0.5, 0, 1],
        "prompts": [2, 2, 1, 1],
    }  # fmt: skip
    assert values["prompts"][1]["free"]["first_divergence"] == 1
    assert values["prompts"][1]["free"]["pruned"]["new_tokens"] == 4
    steps = 10 * BUCKETS + 1
    long = Forced(steps, 0.5, 1.0, 0, 1.0, (1.0, inf), (1.0, 0.0) * (steps // 2) + (1.0,), (True,) * steps)
    values = json.loads(made.comparison(prompts=(PromptResult("a", "a", 1, "", long),)).to_json())
    assert len(values["by_step"]["step"]) <= BUCKETS and values["by_step"]["step"][1] == 11
    assert values["prompts"][0]["forced"]["kl_by_step"]["kl"][0] == pytest.approx(6 / 11)
    assert values["prompts"][0]["forced"]["nll"] == [1.0, None], "JSON has no infinity"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit(width: int) -> None:
    file = io.StringIO()
    one = made.comparison({"kl": 0.2, "accuracy_drop": 0.6}, graph=made.graph(ALIEN))
    Console(file=file, width=width).print(one)
    lines = file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    text = file.getvalue()
    assert "0.233" in text and "≤ 0.2" in text and "✗" in text and "✓" in text and "alien::op" in text
    assert ("unpruned  " in text) == (width == 120) and ("[bold]two" in text) == (width == 120)


def test_junit(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    write_junit(path, made.comparison({"kl": 0.2, "top1": 0.5}, graph=made.graph(ALIEN)))
    (suite,) = ET.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "0")
    failures = {case.get("name"): case[0].get("message") for case in suite if len(case)}
    assert failures == {
        "tiny: KL, mean per step": "0.233, limit ≤ 0.2; worst: p.jsonl:2, 0.3",
        "tiny: no unexpected ops": str(ALIEN),
    }
    write_junit_error(path, 'it <broke> & "so"')
    (suite,) = ET.parse(path).getroot()
    assert suite.get("errors") == "1" and suite[0][0].get("message") == 'it <broke> & "so"'
    with pytest.raises(InputError, match="cannot be written"):
        write_junit(tmp_path / "no" / "file.xml", made.comparison())


def test_failure_message_names_limit_value_and_prompt() -> None:
    text = failure_message(made.comparison({"kl": 0.2, "top1": 0.5}))
    row = next(line for line in text.splitlines() if line.lstrip().startswith("KL"))
    assert row.split() == ["KL,", "mean", "per", "step", "≤", "0.2", "0.233", "FAILED", "0.3", "at", "p.jsonl:2"]
    assert text.startswith("pruning changes tiny by more than is allowed (1 failed)\n")
    assert "- KL, mean per step: 0.233, limit ≤ 0.2" in text


# ------------------------------------------------------------------------------------------------------------ baseline


def against(tmp_path: Path, now: Comparison, tolerance: dict[str, float] | None = None) -> Any:
    write_baseline(made.comparison(), tmp_path / "base.json")
    return check_baseline(now, read_baseline(tmp_path / "base.json", "abc"), tolerance or {})


def test_the_same_is_no_regression(tmp_path: Path) -> None:
    check = against(tmp_path, made.comparison())
    assert check.regressions == () and check.notes == () and set(check.values) == set(METRICS) == set(TOLERANCE)
    assert made.comparison().with_baseline(check).passed


def test_what_became_worse_is_named(tmp_path: Path) -> None:
    first, second = made.PROMPTS
    worse = made.forced([0.1, 0.5, 0.85, 0.0], [True, False, False, False], (2.0, 2.5))
    now = made.comparison(prompts=(first, PromptResult("second", "p.jsonl:2", 4, "two", worse, second.free)))
    check = against(tmp_path, now)
    assert [one.name for one in check.regressions] == ["kl", "kl_p99", "top1"], "kl_max rose by just half"
    assert str(check.regressions[0]) == "KL, mean per step: 0.2333 in the baseline, 0.275 now (tolerance 0.1)"
    assert against(tmp_path, now, {"kl": 1.0, "kl_p99": 1.0, "top1": 0.2}).regressions == ()
    compared = now.with_baseline(check)
    assert not compared.passed and compared.failures == [str(one) for one in check.regressions]
    path = tmp_path / "junit.xml"
    write_junit(path, compared)
    failed = [case.get("name") for case in ET.parse(path).getroot()[0] if len(case)]
    assert failed[0] == "tiny: KL, mean per step, against the baseline" and len(failed) == 3
    better = made.forced([0.0] * 4, [True] * 4, (2.0, 2.0))
    now = made.comparison(prompts=(first, PromptResult("second", "p.jsonl:2", 4, "two", better, second.free)))
    assert against(tmp_path, now).regressions == ()


def test_a_changed_graph_or_machine_is_told(tmp_path: Path) -> None:
    graph = made.graph(ops={"aten::mm": 8, "lethe::attention": 2}, inputs=("ids", "more"))
    config = {"policy": "lethe", "max_tokens": 30}
    check = against(tmp_path, made.comparison(graph=graph, facts={**made.FACTS, "config": config, "torch": "2.14"}))
    assert [str(one) for one in check.regressions] == [
        "inputs of the graph: ['ids'] in the baseline, ['ids', 'more'] now",
        "outputs of the graph: 1 in the baseline, 2 now",
    ]
    assert check.notes == (
        "config differs: max_tokens 20 → 30", "torch differs: 2.13 → 2.14", "op counts changed: aten::mm 7 → 8",
    )  # fmt: skip


def test_baselines_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    with pytest.raises(InputError, match=r"there is no baseline .*--update-baseline"):
        read_baseline(path, "abc")
    write_baseline(made.comparison(), path)
    with pytest.raises(InputError, match="on other prompts"):
        read_baseline(path, "other")
    for text, message in [("{", "is not JSON"), ("[]", "is no baseline"), ('{"format": "x"}', "is no baseline")]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_baseline(path, "abc")

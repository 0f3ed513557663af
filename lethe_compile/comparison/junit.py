"""A comparison as JUnit XML, which every CI system shows: one test case a check."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from lethe_compile.comparison.result import Comparison
from lethe_compile.errors import InputError

_SUITE = "lethe compare"


def write_junit(path: str | Path, comparison: Comparison) -> None:
    """Limits, unexpected ops, and metrics against the baseline, each a case; failures say limit, value, worst prompt.

    Raises:
        InputError: the file cannot be written.
    """
    cases = [*_limits(comparison), *_graph(comparison), *_baseline(comparison)]
    cases = cases or [(_name(comparison, "ran"), None)]
    _write(Path(path), [_case(*case) for case in cases], float(comparison.facts["seconds"]))


def write_junit_error(path: str | Path, message: str) -> None:
    """The suite of a comparison that could not run."""
    case = ET.Element("testcase", classname=_SUITE, name="could run")
    ET.SubElement(case, "error", message=message).text = message
    _write(Path(path), [case], 0.0)


def _name(comparison: Comparison, check: str) -> str:
    return f"{comparison.facts['model']}: {check}"


def _limits(comparison: Comparison) -> list[tuple[str, str | None]]:
    cases: list[tuple[str, str | None]] = []
    for one in comparison.metrics:
        if one.passed is None:
            continue
        text = f"{one.metric.show(one.value)}, limit {one.metric.show_limit(one.limit)}"
        if one.worst is not None:
            text += f"; worst: {one.worst.where}, {one.metric.show(one.worst.value)}"
        cases.append((_name(comparison, one.metric.title), None if one.passed else text))
    return cases


def _graph(comparison: Comparison) -> list[tuple[str, str | None]]:
    if comparison.graph is None:
        return []
    found = comparison.graph.unexpected
    return [(_name(comparison, "no unexpected ops"), "\n".join(map(str, found)) if found else None)]


def _baseline(comparison: Comparison) -> list[tuple[str, str | None]]:
    if comparison.baseline is None:
        return []
    worse = {one.name: str(one) for one in comparison.baseline.regressions}
    titles = {one.metric.name: one.metric.title for one in comparison.metrics}
    names = dict.fromkeys([*(name for name in comparison.baseline.values if name in titles), *worse])
    return [(_name(comparison, f"{titles.get(name, name)}, against the baseline"), worse.get(name)) for name in names]


def _case(name: str, failure: str | None) -> ET.Element:
    case = ET.Element("testcase", classname=_SUITE, name=name)
    if failure is not None:
        ET.SubElement(case, "failure", message=failure.partition("\n")[0]).text = failure
    return case


def _write(path: Path, cases: list[ET.Element], seconds: float) -> None:
    counts = {f"{kind}s": str(sum(case.find(kind) is not None for case in cases)) for kind in ("failure", "error")}
    suite = ET.Element("testsuite", {"name": _SUITE, "tests": str(len(cases)), "time": f"{seconds:.3f}", **counts})
    suite.extend(cases)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    try:
        ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error

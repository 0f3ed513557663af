"""Limits from callers and from pyproject.toml: unknown keys, values, and contradictions are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lethe_compile.comparison import Thresholds, read_pyproject
from lethe_compile.errors import ConfigError, InputError


def pyproject(folder: Path, text: str) -> Path:
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_limits_of_a_project(tmp_path: Path) -> None:
    assert read_pyproject(tmp_path) == (Thresholds(), {}), "no file, no limits"
    assert read_pyproject(pyproject(tmp_path, "[tool.other]\nx = 1\n")) == (Thresholds(), {})
    text = "[tool.lethe.compare]\nmax_kl = 0.02\nmin_speedup = 1\ntolerance = { kl = 0.5 }\n"
    limits, tolerance = read_pyproject(pyproject(tmp_path, text))
    assert limits == Thresholds(max_kl=0.02, min_speedup=1) and tolerance == {"kl": 0.5}
    flags = Thresholds(max_kl=0.1, min_top1=0.9)
    assert flags.or_else(limits) == Thresholds(max_kl=0.1, min_top1=0.9, min_speedup=1), "flags come first"
    assert flags.limits() == {"kl": 0.1, "top1": 0.9}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("max_kll = 1", ConfigError, "'max_kll' is not a setting of .*; the nearest is 'max_kl'"),
        ("min_top1 = 98", ConfigError, r"min_top1=98 is not allowed: must be None or a number in \[0, 1\]"),
        ("max_kl = '1'", ConfigError, "max_kl='1' is not allowed"),
        ("max_kl = true", ConfigError, "max_kl=True is not allowed"),
        ("min_memory_saving = 1", ConfigError, "min_memory_saving=1 is not allowed"),
        ("max_kl = 0\nmin_memory_saving = 0.5", ConfigError, "max_kl=0 and min_memory_saving=0.5 contradict"),
        ("tolerance = { klx = 1 }", ConfigError, "'klx' is no metric"),
        ("tolerance = { kl = -1 }", ConfigError, "kl=-1 is not allowed"),
        ("tolerance = 3", ConfigError, "must say METRIC = NUMBER"),
        ("max_kl = ", InputError, "line 2"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        read_pyproject(pyproject(tmp_path, f"[tool.lethe.compare]\n{text}\n"))
    assert str(tmp_path / "pyproject.toml") in str(refused.value)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a table"):
        read_pyproject(pyproject(tmp_path, "[tool.lethe]\ncompare = 3\n"))


@pytest.mark.parametrize(
    ("limits", "off", "message"),
    [
        ({"max_kl": 1.0}, {"forced"}, "max_kl is a limit on the teacher-forced run"),
        ({"min_speedup": 1.0}, {"free"}, "min_speedup is a limit on the free-running"),
        ({"max_accuracy_drop": 0.0}, {"graded"}, "needs answers to compare with"),
        ({"min_memory_saving": 0.5}, {"evicts"}, "contradicts policy 'full'"),
    ],
)
def test_limits_on_what_is_not_measured_are_refused(limits: dict[str, Any], off: set[str], message: str) -> None:
    everything = {name: name not in off for name in ("forced", "free", "graded", "evicts")}
    with pytest.raises(ConfigError, match=message):
        Thresholds(**limits).check(**everything)
    Thresholds(**limits).check(**dict.fromkeys(everything, True))

"""The pytest plugin and `assert_close_to_unpruned`, in a pytest of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lethe_compile.settings import read_toml

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest
from lethe_compile.errors import ConfigError
from lethe_compile.models.tiny import tiny
from lethe_compile.testing import assert_close_to_unpruned
import lethe_compile as lethe

CONFIG = lethe.LetheConfig(max_tokens=20, prune_interval=5, page_size=4, protect_prompt=False)
PROMPTS = [{"ids": [5, 6, 7, 8, 9]}, {"ids": [3, 4]}]


@pytest.fixture(scope="module")
def fast():
    return lethe.optimize(tiny("llama"), CONFIG, verified=False)


def test_fixture(fast, lethe_compare):
    comparison = lethe_compare(fast, PROMPTS, max_new_tokens=30, min_top1=0.0)
    assert comparison["kl"] > 0 and comparison.passed
    limits = {one.metric.name: one.limit for one in comparison.metrics if one.limit is not None}
    assert limits == {"top1": 0.0, "memory_saving": 0.1}, "of pyproject.toml, too"


def test_close(fast):
    assert assert_close_to_unpruned(fast, "prompts.jsonl", max_new_tokens=30, max_kl=9.0)["kl"] > 0


def test_not_close(fast):
    assert_close_to_unpruned(fast, PROMPTS, max_new_tokens=30, max_kl=1e-6)


def test_without_a_limit(fast, tmp_path):
    with pytest.raises(ConfigError, match="cannot fail"):
        assert_close_to_unpruned(fast, PROMPTS, max_new_tokens=2, pyproject=tmp_path)
"""


def pytest_run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """pytest in a new process that finds the plugin as an installed one, by its entry point."""
    info = folder / "site" / "lethe_plugin_test-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    ((name, target),) = read_toml(ROOT / "pyproject.toml")["project"]["entry-points"]["pytest11"].items()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lethe-plugin-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pytest11]\n{name} = {target}\n")
    path = os.pathsep.join([str(ROOT), str(folder / "site")])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *argv]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def test_a_suite_with_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "prompts.jsonl").write_text('{"ids": [5, 6, 7, 8, 9]}\n')
    (tmp_path / "pyproject.toml").write_text(
        "[tool.lethe.compare]\nmin_memory_saving = 0.1\n[tool.pytest.ini_options]\n"
    )
    ran = pytest_run(tmp_path, "-q")
    out = ran.stdout
    assert ran.returncode == 1 and "1 failed, 3 passed" in out, out + ran.stderr
    assert "E       AssertionError: pruning changes Llama by more than is allowed (1 failed)" in out, out
    lines = [line for line in out.splitlines() if line.startswith("E ")]  # with CI set, the summary repeats them whole
    (row,) = [line for line in lines if "KL, mean per step" in line and "FAILED" in line]
    assert "≤ 1e-06" in row and "prompts[" in row
    assert "def assert_close_to_unpruned" not in out, "the traceback ends in the test"


def test_pytest_starts_as_fast_as_without(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'rich.console', 'numpy', 'lethe_compile.comparison', 'lethe_compile.testing'}"
    (tmp_path / "test_it.py").write_text(
        "import sys\n\ndef test_light(pytestconfig):\n"
        "    assert 'lethe_compile.pytest_plugin' in sys.modules and pytestconfig.pluginmanager.has_plugin('lethe')\n"
        f"    assert sorted({heavy} & sys.modules.keys()) == []\n"
    )
    ran = pytest_run(tmp_path, "-q", "-p", "no:hypothesispytest")
    assert ran.returncode == 0, ran.stdout + ran.stderr

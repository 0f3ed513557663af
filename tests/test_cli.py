from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import lethe_compile
from lethe_compile import cli
from lethe_compile.errors import LetheError

ROOT = Path(__file__).parents[1]

Tool = Callable[[Sequence[str]], int | None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tool], None]:
    """Make a function the tool behind `lethe demo`."""

    def put(tool: Tool) -> None:
        monkeypatch.setitem(sys.modules, "lethe_compile.tools.demo", SimpleNamespace(main=tool))

    return put


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert any(line.split() == [name, *command.help.split()] for line in lines)


def test_every_tool_is_a_command_and_every_command_a_tool() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py") if not path.stem.startswith("_")}
    assert {command.module for command in cli.COMMANDS.values()} == tools


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lethe {lethe_compile.__version__}\n"


@pytest.mark.parametrize(("typo", "hint"), [("demos", "Did you mean 'demo'?"), ("xyzzy", "Commands: demo, ")])
def test_unknown_command_exits_2_and_suggests(typo: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typo]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lethe: error: no command '{typo}'. {hint}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_a_tool_gets_the_rest_of_the_line(returned: int | None, status: int, install: Callable[[Tool], None]) -> None:
    seen: list[str] = []

    def tool(argv: Sequence[str]) -> int | None:
        seen.extend(argv)
        return returned

    install(tool)
    assert cli.main(["demo", "--json", "out.json", "--help"]) == status
    assert seen == ["--json", "out.json", "--help"]


def test_lethe_error_is_one_line_and_exit_2(
    install: Callable[[Tool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def tool(argv: Sequence[str]) -> int | None:
        raise LetheError("layer 3 has no mask.\n  Pass one.")

    install(tool)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "lethe demo: error: layer 3 has no mask. Pass one.\n"


def test_other_errors_keep_their_traceback(install: Callable[[Tool], None]) -> None:
    def tool(argv: Sequence[str]) -> int | None:
        raise ValueError("a bug")

    install(tool)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["demo"])


def test_interrupt_exits_130(install: Callable[[Tool], None]) -> None:
    def tool(argv: Sequence[str]) -> int | None:
        raise KeyboardInterrupt

    install(tool)
    assert cli.main(["demo"]) == 130


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "lethe_compile", "demos"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "Did you mean 'demo'?" in ran.stderr

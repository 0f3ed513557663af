"""The C++ program that runs an artifact: configured, built, and its tokens those of `lethe run`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lethe_compile.artifact import generate, open_artifact
from lethe_compile.exporters import export
from lethe_compile.models.tiny import tiny
from tests.exporters.onnx_case import optimized, ragged

SOURCE = Path(__file__).parents[2] / "tools" / "aoti_cpp"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs CMake and a C++ compiler"
)


def ran(*command: object, timeout: float = 590) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=timeout)


def configure(folder: Path) -> None:
    done = ran("cmake", "-S", SOURCE, "-B", folder, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_cmake_finds_libtorch(tmp_path: Path) -> None:
    configure(tmp_path)
    assert (tmp_path / "CMakeCache.txt").is_file()


def test_json_reader(tmp_path: Path) -> None:
    """What of a manifest the program reads, compiled by itself: libtorch's headers take a minute."""
    program = tmp_path / "read.cpp"
    program.write_text(
        '#include <iostream>\n#include "json.h"\n'
        "int main(int, char** argv) {\n"
        "  try {\n    Json all = JsonReader::read(argv[1]);\n"
        '    std::cout << all["a"]["b"].items.at(1).number << all["s"].text << all["n"].kind << all["t"].number;\n'
        '    all["missing"];\n'
        '  } catch (const std::exception& error) { std::cout << "|" << error.what(); }\n}\n'
    )
    built = ran("c++", "-std=c++20", "-O0", f"-I{SOURCE}", program, "-o", tmp_path / "read")
    assert built.returncode == 0, built.stderr
    file = tmp_path / "manifest.json"
    file.write_text('{"a": {"b": [1, -2.5e1]}, "s": "x\\"y", "n": null, "t": true, "e": [], "o": {}}\n')
    assert ran(tmp_path / "read", file).stdout == '-25x"y01|the manifest has no "missing"'
    for text in ("", '{"a": ', '{"a" 1}', "{} x"):
        file.write_text(text)
        assert "is no JSON at character" in ran(tmp_path / "read", file).stdout, text
    assert "is not there" in ran(tmp_path / "read", tmp_path / "nowhere").stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two packages of Inductor's, and libtorch's headers
def test_tokens_are_those_of_lethe_run(tmp_path: Path) -> None:
    fast, folder = optimized(tiny("llama")), tmp_path / "llama"
    export(fast, folder, "aoti")
    configure(tmp_path / "build")
    built = ran("cmake", "--build", tmp_path / "build")
    assert built.returncode == 0, built.stdout + built.stderr
    program, prompts = tmp_path / "build" / "generate", ragged(fast.vocab_size)
    flags = [flag for prompt in prompts for flag in ("--ids", ",".join(map(str, prompt)))]
    done = ran(program, folder, *flags, "--max-new-tokens", 60)
    assert done.returncode == 0, done.stderr
    expected = generate(open_artifact(folder), prompts, max_new_tokens=60)
    assert expected.rounds >= 3
    assert done.stdout.splitlines() == [",".join(map(str, row)) for row in expected.ids]
    for arguments, message in (
        ([folder], "give --ids 1,2,3"),
        ([folder, "--ids", "1,x"], "error"),
        ([folder, "--ids", "1,9999"], "9999 is not an id of this model"),
        ([folder, "--top-k", "3"], "no option --top-k"),
        ([tmp_path, "--ids", "1"], "manifest.json is not there"),
    ):
        refused = ran(program, *arguments)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr

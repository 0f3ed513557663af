"""Round trips: exported by `lethe export`, run by `lethe run` in a fresh process, the answers of the process itself.

Slow tests: the reasoner takes most of a minute to ONNX (`test_reasoner.py` has more of it), and minutes to AOTInductor.
CI runs them beside the others, by `make round-trip`. Sizes and times are printed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lethe_compile import LetheConfig, optimize
from lethe_compile.artifact.manifest import load_manifest, total_bytes
from lethe_compile.models import reasoner
from lethe_compile.models.tiny import tiny
from lethe_compile.tools import export
from tests.exporters.onnx_case import generated, lethe_without, ragged

SETTINGS = {
    "llama": {"prune_interval": 8, "prune_threshold": 12, "sparse_ratio": 1.3, "segments": 8, "protect_prompt": False},
    "reasoner": {"prune_interval": 16},
}
ABSENT = {"onnx": ["torch", "transformers"], "aoti": ["transformers", "triton", "onnxruntime"]}


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param("llama", "onnx", marks=pytest.mark.slow),
        pytest.param("reasoner", "onnx", marks=pytest.mark.slow),
        pytest.param("reasoner", "aoti", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_fresh_process_gives_the_same_answers(
    name: str, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, settings = tmp_path / name, tmp_path / "result.json", SETTINGS[name]
    config = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    model = name if name == "reasoner" else f"lethe_compile.models.tiny:{name}"
    start = time.perf_counter()
    assert export.main([model, "--format", format, "--out", str(folder), *config]) == 0
    exporting = time.perf_counter() - start

    fast = optimize(
        reasoner.load_model() if name == "reasoner" else tiny(name), LetheConfig(**settings), verified=False
    )
    new, prompts = 60, ragged(fast.vocab_size)
    if name == "reasoner":
        problems = reasoner.problems(2, seed=5, min_tokens=1000, max_tokens=1200)
        new, prompts = 300, [problems.prompt(0), problems.prompt(1)]
    flags = [part for prompt in prompts for part in ("--ids", ",".join(map(str, prompt)))]
    arguments = ["run", str(folder), *flags, "--max-new-tokens", str(new), "--json", str(file)]
    ran = lethe_without(ABSENT[format], *arguments)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(file.read_text())
    assert result["new_ids"] == generated(fast, prompts, new)
    assert result["retained"] == fast.cache_stats().retained
    assert result["rounds"] >= 5
    manifest, seconds = load_manifest(folder), result["seconds"]
    sizes = ", ".join(f"{one} {facts['bytes']:,}" for one, facts in manifest.files.items())
    with capsys.disabled():
        print(
            f"\n{name} as {format}: exported in {exporting:.1f} s, loaded in {seconds['load']:.1f} s,"
            f" {len(prompts) * new / seconds['generate']:.0f} tokens/s; {total_bytes(manifest):,} bytes ({sizes})"
        )

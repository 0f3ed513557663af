"""Models of several families in ONNX: token for token what the optimized model writes, over many rounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lethe_compile.artifact import generate, open_artifact
from lethe_compile.exporters import export
from lethe_compile.models.architectures import build
from lethe_compile.models.plain_decoder import plain
from lethe_compile.models.tiny import tiny
from tests.exporters.onnx_case import check_equal, check_format, optimized, ragged

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "gpt2", "mistral", "bloom", "gpt_oss", "deepseek_v3", "plain"]
)
def test_tokens_are_the_same(name: str, tmp_path: Path) -> None:
    check_equal(optimized(plain() if name == "plain" else build(name)), tmp_path / name)
    check_format(tmp_path / name)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 24},
        {"budget": 75},
        {"score": "sum", "protect_prompt": True, "sparse_ratio": 3.0},
        {"paper_literal": True, "score": "sum", "sparse_ratio": 2.0},
    ],
    ids=["cap", "budget", "sum", "literal"],
)
def test_policies(settings: dict[str, Any], tmp_path: Path) -> None:
    check_equal(optimized(tiny("llama"), **settings), tmp_path / "artifact")


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_without_pruning(name: str, tmp_path: Path) -> None:
    """Windows are trimmed, nothing else goes: no round where there are none."""
    check_equal(optimized(tiny(name), policy="full"), tmp_path / name, rounds=0 if name == "llama" else 5)
    assert (tmp_path / name / "prune.onnx").exists() == (name == "mistral")


def test_half_precision(tmp_path: Path) -> None:
    """Products are summed in another order: logits agree to rounding, and most tokens are the same."""
    fast = optimized(tiny("llama").half())
    export(fast, tmp_path / "half", "onnx")
    check_format(tmp_path / "half")
    assert 2 * 100_000 < (tmp_path / "half" / "weights.bin").stat().st_size < 3 * 100_000
    prompts = ragged(fast.vocab_size)
    runner = open_artifact(tmp_path / "half", threads=1)
    for prompt in prompts:
        first = generate(runner, [prompt], max_new_tokens=1, eos_token_id=[])
        assert first.new_ids[0][0] == int(fast(torch.tensor([prompt]))[0, -1].argmax())
    result = generate(runner, prompts, max_new_tokens=60, eos_token_id=[])
    assert result.rounds >= 5


def test_a_model_of_more_than_2_gb_is_streamed(tmp_path: Path) -> None:
    """Beyond what a protobuf holds; while it is exported, memory stays within 1.3 times the weights."""
    script = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import lethe_compile as lethe
import onnxscript, lethe_compile.exporters.onnx

def peak():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

before = peak()
config = LlamaConfig(hidden_size=4096, intermediate_size=12288, num_hidden_layers=2, num_attention_heads=32,
                     num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
model = model.to_empty(device="cpu").eval()
for weight in model.parameters():
    weight.data.fill_(0.001)
model.model.rotary_emb.__init__(config)
fast = lethe.optimize(model, verified=False)
Path("/proc/self/clear_refs").write_text("5")  # the peak of the export, not of what came before
lethe.export(fast, sys.argv[1], format="onnx")
print(sum(weight.nbytes for weight in model.parameters()), peak() - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "large")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    weights, peak = map(int, ran.stdout.split()[-2:])
    assert weights > 2 << 30
    assert (tmp_path / "large" / "weights.bin").stat().st_size >= weights
    assert peak <= 1.3 * weights, f"{peak / weights:.2f} times the weights"
    check_format(tmp_path / "large")

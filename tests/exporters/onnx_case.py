"""A model exported to ONNX, and what it generates here and there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.artifact import generate, open_artifact
from lethe_compile.exporters import export
from lethe_compile.runtime import OptimizedModel

ABSENT = """
import sys
sys.modules.update(dict.fromkeys({packages!r}))  # to import one of them fails, as if it were not there
from lethe_compile.cli import main
sys.exit(main(sys.argv[1:]))
"""


def lethe_without(packages: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`lethe ARGUMENTS` in a fresh process in which some packages cannot be imported."""
    code = ABSENT.format(packages=tuple(packages))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)


def optimized(model: Any, **settings: Any) -> OptimizedModel:
    """Pruned often and hard, so that a short generation has many rounds."""
    often = {"prune_interval": 8, "prune_threshold": 12, "sparse_ratio": 1.3, "segments": 8, "protect_prompt": False}
    return lethe.optimize(model, lethe.LetheConfig(**{**often, "recent_ratio": 0.3, **settings}), verified=False)


def ragged(vocab_size: int, lengths: Sequence[int] = (17, 5, 11)) -> list[list[int]]:
    return [torch.randint(3, vocab_size - 1, (length,)).tolist() for length in lengths]


def generated(fast: OptimizedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """New tokens of the model itself, greedy, none of which ends a row."""
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out: Tensor = fast.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[:, width:].tolist()


def check_format(folder: Path) -> None:
    """Every program passes ONNX's checker, in standard operators of opset 18 or later."""
    for file in sorted(folder.glob("*.onnx")):
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(str(file), load_external_data=False)
        assert {one.domain for one in model.opset_import} <= {"", "ai.onnx"}
        assert all(one.version >= 18 for one in model.opset_import)
        assert not model.functions and all(node.domain == "" for node in model.graph.node)


def check_equal(fast: OptimizedModel, folder: Path, new: int = 100, format: str = "onnx", rounds: int = 5) -> None:
    """The artifact writes the tokens of the model, and prunes as it does, in so many rounds or more."""
    export(fast, folder, format)
    prompts = ragged(fast.vocab_size)
    expected = generated(fast, prompts, new)
    stats = fast.cache_stats()
    result = generate(open_artifact(folder, threads=1), prompts, max_new_tokens=new, eos_token_id=[])
    assert result.new_ids == expected
    assert result.retained == stats.retained
    assert result.rounds >= rounds
    assert max(map(max, result.retained)) < 17 + new

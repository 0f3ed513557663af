"""AOTInductor packages of a model in half precision: their logits against those of the model in float32.

Tokens of such a model are not a measure: where two logits are nearly equal, another order of sums decides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import lethe_compile as lethe
from lethe_compile.artifact import open_artifact
from lethe_compile.artifact.loop import Loop, Runner
from lethe_compile.artifact.sampling import Sampler
from lethe_compile.models.tiny import tiny
from lethe_compile.runtime import OptimizedModel
from tests.test_gpu_export import batch, in_process, often, prepare_compiler


class _Forced(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, tokens: Tensor, width: int) -> None:
        self.tokens, self.width = tokens, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.tokens[:, input_ids.shape[1] - self.width, None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def logits_of(fast: OptimizedModel, prompts: list[list[int]], tokens: Tensor) -> Iterator[Tensor]:
    """The model's logits ``[rows, vocab]`` before each of the tokens ``[rows, new]``, which it is made to write."""
    inputs, options = batch(prompts, tokens.shape[1])
    forced = LogitsProcessorList([_Forced(tokens, inputs["input_ids"].shape[1])])
    kept = {"logits_processor": forced, "output_logits": True, "return_dict_in_generate": True}
    out: Any = fast.generate(**inputs, **options, **kept)
    yield from out.logits


def logits_of_artifact(runner: Runner, prompts: list[list[int]], tokens: Tensor) -> Iterator[Tensor]:
    """As `logits_of`."""
    loop, new = Loop(runner, prompts, Sampler(), np.empty(0, np.int64)), tokens.shape[1]
    logits = loop.prefill()
    for step in range(new):
        if step:
            logits = loop.decode(new - step)
        yield torch.from_numpy(logits).to(tokens.device)
        loop.tokens = tokens[:, step].cpu().numpy()


def errors(got: Iterator[Tensor], exact: list[Tensor]) -> Tensor:
    """Of each step, relative to the logits' own size: ``[steps, rows]``."""
    pairs = zip(got, exact, strict=True)
    return torch.stack([((one.float() - truth).norm(dim=1) / truth.norm(dim=1)).cpu() for one, truth in pairs])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_as_exact_as_those_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    prepare_compiler()
    model = tiny("llama").to("cuda", dtype)
    truth = lethe.optimize(copy.deepcopy(model).float(), often(prune_threshold=4096), verified=False)
    fast = lethe.optimize(model, often(prune_threshold=4096), verified=False)
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, fast.vocab_size - 1, (length,), generator=draw).tolist() for length in (170, 5, 110)]
    tokens = torch.tensor(in_process(truth, prompts, 40)[0], device="cuda")
    exact = [one.float() for one in logits_of(truth, prompts, tokens)]
    ours = errors(logits_of(fast, prompts, tokens), exact)
    lethe.export(fast, tmp_path / "artifact", format="aoti")
    packages = errors(logits_of_artifact(open_artifact(tmp_path / "artifact"), prompts, tokens), exact)
    print(f"{dtype}: mean error of the model {ours.mean():.2e}, of packages {packages.mean():.2e}")
    assert 0 < ours.mean() < 0.05, "the truth is float32, and near"
    assert packages.mean() < 1.1 * ours.mean() and packages.max() < 2 * ours.max()

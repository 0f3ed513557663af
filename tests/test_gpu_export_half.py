"""AOTInductor packages of a model in half precision: their logits against those of the model in float32.

Tokens of such a model are not a measure: where two logits are nearly equal, another order of sums decides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.artifact import open_artifact
from lethe_compile.comparison.sides import ArtifactDecoder, right_padded
from lethe_compile.generation import Decoder
from lethe_compile.models.tiny import tiny
from tests.test_gpu_export import in_process, often, prepare_compiler


@torch.no_grad()
def forced(decoder: Decoder, prompts: list[list[int]], tokens: Tensor) -> Iterator[Tensor]:
    """A decoder's logits ``[rows, vocab]`` before each of the tokens ``[rows, new]``, which it is made to write."""
    ids, lengths = right_padded(prompts, decoder.device)
    tokens = tokens.to(decoder.device)
    active = torch.ones(len(prompts), dtype=torch.bool, device=decoder.device)
    decoder.begin(len(prompts), lengths, tokens.shape[1])
    yield decoder.prefill(ids, lengths)
    for token in tokens.T[:-1]:
        yield decoder.decode(token, active)
    decoder.end()


def errors(got: Iterator[Tensor], exact: list[Tensor]) -> Tensor:
    """Of each step, relative to the logits' own size: ``[steps, rows]``."""
    pairs = zip(got, exact, strict=True)
    return torch.stack([(one.float().cpu() - truth).norm(dim=1) / truth.norm(dim=1) for one, truth in pairs])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_as_exact_as_those_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    prepare_compiler()
    model = tiny("llama").to("cuda", dtype)
    truth = lethe.optimize(copy.deepcopy(model).float(), often(prune_threshold=4096), verified=False)
    fast = lethe.optimize(model, often(prune_threshold=4096), verified=False)
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, fast.vocab_size - 1, (length,), generator=draw).tolist() for length in (170, 5, 110)]
    tokens = torch.tensor(in_process(truth, prompts, 40)[0])
    exact = [one.to("cpu", torch.float32, copy=True) for one in forced(truth, prompts, tokens)]
    ours = errors(forced(fast, prompts, tokens), exact)
    lethe.export(fast, tmp_path / "artifact", format="aoti")
    packages = errors(forced(ArtifactDecoder(open_artifact(tmp_path / "artifact")), prompts, tokens), exact)
    print(f"{dtype}: mean error of the model {ours.mean():.2e}, of packages {packages.mean():.2e}")
    assert 0 < ours.mean() < 0.05, "the truth is float32, and near"
    assert packages.mean() < 1.1 * ours.mean() and packages.max() < 2 * ours.max()

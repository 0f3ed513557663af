"""Programs with the Triton kernels inside: what they compute, and the graph that AOTInductor gets of them."""

from __future__ import annotations

import pytest
import torch

from lethe_compile.artifact import generate
from lethe_compile.artifact.aoti_cuda import KernelRunner
from lethe_compile.artifact.loop import AheadRunner
from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.exporters import _manifest
from lethe_compile.exporters.aoti import kernel_programs
from lethe_compile.models.architectures import build
from lethe_compile.models.tiny import tiny
from lethe_compile.runtime import OptimizedModel
from tests.exporters.onnx_case import generated, optimized, ragged
from tests.kernels.interpret import run_interpreted

CPU = torch.device("cpu")


def runner_of(fast: OptimizedModel) -> KernelRunner:
    """The runner of an artifact over the programs themselves, op by op."""
    programs = {program.name: program for program in kernel_programs(fast)}
    specs = {
        name: ProgramSpec(f"{name}.pt2", tuple(operand.name for operand in program.inputs), program.outputs)
        for name, program in programs.items()
    }
    manifest = _manifest(fast, "aoti", specs, ())
    calls = {name: torch.no_grad()(program.module) for name, program in programs.items()}
    return KernelRunner(manifest, programs=calls, device=CPU)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tokens_are_those_of_the_model(name: str) -> None:
    fast = optimized(build(name), prune_interval=4)
    prompts = ragged(fast.vocab_size)
    expected = generated(fast, prompts, 20)
    runner = runner_of(fast)
    assert isinstance(runner, AheadRunner)
    result = generate(runner, prompts, max_new_tokens=20, eos_token_id=[])
    assert result.new_ids == expected and result.rounds >= 3
    assert result.retained == fast.cache_stats().retained


@pytest.mark.interpreted
def test_a_prompt_in_parts_and_an_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimized(tiny("llama"), prune_interval=4)
    prompts, runner = ragged(fast.vocab_size), runner_of(fast)
    whole = generate(runner, prompts, max_new_tokens=6, eos_token_id=[])
    monkeypatch.setattr("lethe_compile.artifact.loop.PREFILL", 6)
    parts = generate(runner, prompts, max_new_tokens=6, eos_token_id=[])
    assert parts == whole
    end = whole.new_ids[0][2]
    ended = generate(runner, prompts, max_new_tokens=6, eos_token_id=[end])
    for row, full in zip(ended.new_ids, whole.new_ids, strict=True):
        assert row == full[: full.index(end) + 1] if end in full else full


def test_through_the_interpreter() -> None:
    run_interpreted(__file__)

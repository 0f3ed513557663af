"""`optimize`: capture, passes, runtime, top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lethe_compile.capture import capture
from lethe_compile.config import LetheConfig
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.limits import max_positions, vocab_size
from lethe_compile.policies import make_policy
from lethe_compile.runtime import OptimizedModel
from lethe_compile.verify import verify


def optimize(
    model: nn.Module | torch.export.ExportedProgram,
    config: LetheConfig | None = None,
    *,
    policy: str | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    verified: bool = True,
) -> OptimizedModel:
    """Compile a decoder so that its KV cache is pruned, layer by layer, while it generates.

    Args:
        model: a Hugging Face causal LM, a plain module, an `fx.GraphModule`, or an ExportedProgram with dynamic batch
            and tokens. It is not changed; the result shares its weights.
        config: how to prune; the default is `LetheConfig()`.
        policy: name of the eviction policy, overriding the config's: "lethe", "full" (evicts nothing), or registered.
        example_inputs: for a plain module whose signature is not ``(input_ids[, positions])``.
        verified: compare the result with the model on sample sequences, whole and step by step, before returning it.

    Raises:
        UnsupportedGraphError: the model cannot be captured, or something in its graph cannot be rewritten safely;
            names layer, node and reason. Never is a layer silently left unpruned.
        InputError: broken weights, several devices, unusable example inputs.
        ConfigError: unknown policy, or settings that contradict.
    """
    config = config or LetheConfig()
    if policy is not None:
        config = replace(config, policy=policy)
    rule = make_policy(config)

    captured = capture(model, example_inputs)
    result = run_pipeline(captured.program, pipeline(rule.decay, rule.peak))
    fast = OptimizedModel(
        result.program,
        config,
        records=result.records,
        vocab_size=vocab_size(result.program),
        max_positions=max_positions(result.program, getattr(model, "config", None)),
        generation_config=getattr(model, "generation_config", None),
    )
    if verified:
        verify(captured.original, fast)
    return fast.eval()

"""`optimize`: capture, passes, runtime, top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lethe_compile.capture import capture
from lethe_compile.capture.causality import causality_told
from lethe_compile.config import LetheConfig
from lethe_compile.executor import choose_backend, waits_for_host, warm_up_compiler
from lethe_compile.inspection import GraphFacts
from lethe_compile.memory import check_kv_memory
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
    backend: str = "auto",
    kv_memory: int | float | None = None,
) -> OptimizedModel:
    """Compile a decoder so that its KV cache is pruned, layer by layer, while it generates.

    Args:
        model: a Hugging Face causal LM, a plain module, an `fx.GraphModule`, or an ExportedProgram with dynamic batch
            and tokens. The last three may be a decode step that carries its own cache, in buffers or as inputs and
            outputs, of one token or any number: the cache goes, and the result takes whole batches of sequences. The
            model is not changed; the result shares its weights. Of a model wrapped by PEFT, the adapters that
            are active now are compiled in: to set or disable others later changes nothing, and to merge later changes
            the weights under the compiled adapters, so merge before.
        config: how to prune; the default is `LetheConfig()`.
        policy: name of the eviction policy, overriding the config's: "lethe", "full" (evicts nothing), or registered.
        example_inputs: for a plain module whose signature is not ``(input_ids[, positions])``, and for a decode step
            that takes its past as an input: the arguments of one step, after two tokens or more. A graph of
            torch.compile is given with those that its backend gets.
        verified: compare the result with the model on sample sequences, whole and step by step, before returning it.
        backend: "eager" runs the graph node by node; "inductor" compiles what lies between the attention ops, each
            repeated layer once; "cudagraphs" also replays decode steps as CUDA graphs; "auto" takes the last on a GPU
            with Triton, or the one before it where layers keep other state than a KV cache or masks depend on the
            content of the sequence, else the first.
        kv_memory: most memory of the KV cache: an integer of bytes, or a float in (0, 1], the fraction of what is free
            when a generation begins; None for what it comes to need. With a number, on a GPU, all of it is allocated at
            once. A batch that might not fit is refused before any work, and a policy that can prunes harder rather than
            run out of pages.

    Raises:
        UnsupportedGraphError: the model cannot be captured, or something in its graph cannot be rewritten safely;
            names layer, node and reason. Never is a layer silently left unpruned.
        InputError: broken weights, several devices, unusable example inputs.
        ConfigError: unknown policy, settings that contradict, or a `kv_memory` that is not allowed.
    """
    config = config or LetheConfig()
    if policy is not None:
        config = replace(config, policy=policy)
    check_kv_memory(kv_memory)
    rule = make_policy(config)

    if backend != "eager" and isinstance(model, nn.Module) and any(weight.is_cuda for weight in model.parameters()):
        warm_up_compiler()
    captured = capture(model, example_inputs)
    before = GraphFacts.of(captured.program)
    device = captured.program.device
    own_cache = captured.program.step is not None
    options = {"fuse": device.type == "cuda", "own_cache": own_cache, "latent": config.cache_latent}
    passes = pipeline(rule.decay, rule.peak, per_head=rule.per_head, **options)
    with causality_told(captured.original, device):
        result = run_pipeline(captured.program, passes)
    stateful, content = bool(result.program.stateful), result.program.content
    chosen = choose_backend(
        backend, device, stateful=stateful, content=content, waits=waits_for_host(result.program.graph)
    )
    fast = OptimizedModel(
        result.program,
        config,
        records=result.records,
        vocab_size=vocab_size(result.program),
        max_positions=max_positions(result.program, getattr(model, "config", None)),
        generation_config=getattr(model, "generation_config", None),
        hf_config=getattr(model, "config", None),
        backend=chosen,
    )
    fast.restart_at, fast.captured = captured.restart_at, before
    if verified:
        with causality_told(captured.original, device):
            verify(captured.original, fast)
    fast.kv_memory = kv_memory  # from here on: what is verified holds next to nothing
    return fast.eval()

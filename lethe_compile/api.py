"""`optimize`: capture, passes, runtime, top to bottom."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from lethe_compile.capture import capture
from lethe_compile.capture.causality import causality_told
from lethe_compile.config import LetheConfig
from lethe_compile.distributed import Ranks, ranks_of, weights_of
from lethe_compile.errors import InputError
from lethe_compile.executor import choose_backend, waits_for_host, warm_up_compiler
from lethe_compile.inspection import GraphFacts
from lethe_compile.memory import check_kv_memory
from lethe_compile.passes import pipeline
from lethe_compile.passes.absent import is_absent
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.limits import max_positions, vocab_size
from lethe_compile.passes.parts import Fetch, fetch_part
from lethe_compile.passes.tensor_parallel import TensorParallel
from lethe_compile.policies import make_policy
from lethe_compile.runtime import OptimizedModel
from lethe_compile.verify import verify, verify_steps

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def optimize(
    model: nn.Module | torch.export.ExportedProgram,
    config: LetheConfig | None = None,
    *,
    policy: str | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    verified: bool = True,
    backend: str = "auto",
    kv_memory: int | float | None = None,
    tp: DeviceMesh | int | None = None,
    fetch: Fetch = fetch_part,
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
            run out of pages. With `tp` it is that of each rank.
        tp: the ranks that run the model together, each a share of its heads, MLPs and vocabulary: a mesh of one
            dimension, or a number N under ``torchrun --nproc-per-node N``; see `distributed.init`. Every rank calls
            `optimize` with the same arguments, and afterwards every method of the result that computes, alike. The
            weights that a rank splits are copies of its part: drop the model to free the whole.
        fetch: with `tp`, how a rank gets its part of a weight, where that is no copy of a part; see
            `passes.parts.Fetch`. Verification then needs a `model` with the same weights. Of `checkpoint.load_parts`,
            whose model has none anywhere, it can only see that logits are finite, and that decode steps continue what
            whole sequences compute.

    Raises:
        UnsupportedGraphError: the model cannot be captured, or something in its graph cannot be rewritten safely;
            names layer, node and reason. Never is a layer silently left unpruned.
        InputError: broken weights, several devices, unusable example inputs.
        ConfigError: unknown policy, settings that contradict, or a `kv_memory` that is not allowed; ranks that were
            given different things, on every rank.
        LetheError: another rank failed.
    """
    config = config or LetheConfig()
    if policy is not None:
        config = replace(config, policy=policy)
    ranks = ranks_of(tp)
    options: dict[str, Any] = {"backend": backend, "verified": verified, "kv_memory": kv_memory}
    if (ranks is None or fetch is fetch_part) and (name := _absent(model)) is not None:
        raise InputError(
            f"the model has no weights: {name} is to be fetched by part: give `tp` of several ranks, and the `fetch`"
            " that came with the model"
        )
    if ranks is None:
        return _optimize(model, config, example_inputs, None, fetch, **options)
    _compare(ranks, model, config, options)
    with ranks.together("optimize the model"):
        return _optimize(model, config, example_inputs, ranks, fetch, **options)


def _absent(model: object) -> str | None:
    """The name of a weight that the model does not have in memory; None where it has all, and for what is no model."""
    if not isinstance(model, nn.Module):
        return None
    return next((name for name, weight in model.named_parameters() if is_absent(weight)), None)


def _compare(ranks: Ranks, model: nn.Module | torch.export.ExportedProgram, config: LetheConfig, options: Any) -> None:
    """Refuse ranks that were given different models or settings, before any of them waits for another."""
    facts = {"the configuration": config.to_dict(), "the options": options, "the version of torch": torch.__version__}
    ranks.same(facts)
    weights = weights_of(model)
    ranks.same({"the names of their weights": list(weights)})
    ranks.same({f"the weight {name}": told for name, told in weights.items()})


def _optimize(
    model: nn.Module | torch.export.ExportedProgram,
    config: LetheConfig,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    ranks: Ranks | None,
    fetch: Fetch,
    *,
    backend: str,
    verified: bool,
    kv_memory: int | float | None,
) -> OptimizedModel:
    check_kv_memory(kv_memory)
    rule = make_policy(config)

    if backend != "eager" and isinstance(model, nn.Module) and any(weight.is_cuda for weight in model.parameters()):
        warm_up_compiler()
    captured = capture(model, example_inputs)
    before = GraphFacts.of(captured.program)
    device = captured.program.device
    own_cache = captured.program.step is not None
    parallel = None
    if ranks is not None:
        if ranks.device.type != device.type:
            raise InputError(f"the model lies on {device}, and the ranks of tp talk over {ranks.device}: move it there")
        plan = getattr(model, "tp_plan", None) or {}
        parallel = TensorParallel(ranks.rank, ranks.size, ranks.group_name, rule.per_head, fetch, plan)
    passes = pipeline(
        rule.decay,
        rule.peak,
        per_head=rule.per_head,
        fuse=device.type == "cuda",
        own_cache=own_cache,
        latent=config.cache_latent,
        parallel=parallel,
    )
    with causality_told(captured.original, device):
        result = run_pipeline(captured.program, passes)
    if (left := _absent(result.program.module)) is not None:
        raise InputError(f"{left} has no part of its own on this rank after the rewrite: load the model as a whole")
    stateful, content = bool(result.program.stateful), result.program.content
    chosen = choose_backend(
        backend, device, stateful=stateful, content=content, waits=waits_for_host(result.program.graph)
    )
    if ranks is not None:
        chosen = (chosen[0], f"{chosen[1]}; rank {ranks.rank} of {ranks.size}, its share of the heads")
    fast = OptimizedModel(
        result.program,
        config,
        records=result.records,
        vocab_size=vocab_size(result.program),
        max_positions=max_positions(result.program, getattr(model, "config", None)),
        generation_config=getattr(model, "generation_config", None),
        hf_config=getattr(model, "config", None),
        backend=chosen,
        ranks=ranks,
    )
    fast.restart_at, fast.captured = captured.restart_at, before
    if ranks is not None:
        ranks.same({"the graph": _calls(result.program.graph)})  # or they would wait for each other in vain
    if verified and _absent(model) is not None:
        verify_steps(fast)
    elif verified:
        with causality_told(captured.original, device):
            verify(captured.original, fast)
    fast.kv_memory = kv_memory  # from here on: what is verified holds next to nothing
    return fast.eval()


def _calls(graph: fx.Graph) -> str:
    """What the graph calls, in order, in short."""
    return hashlib.sha256(
        "\n".join(str(node.target) for node in graph.nodes if node.op == "call_function").encode()
    ).hexdigest()

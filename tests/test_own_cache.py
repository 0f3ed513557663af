"""Decode steps of transformers with caches of their own, static and growing, from torch.export and torch.compile.

Optimized, they write the tokens of the original's own loop, exactly, and pruned their logits are the eviction oracle's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.integrations.executorch import (
    convert_and_export_with_cache,
    register_dynamic_cache_export_support,
)

import lethe_compile as lethe
from lethe_compile.capture import Captured, capture
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.models.tiny import tiny
from lethe_compile.passes.locate_cache import LocateCache
from tests.oracle import PRUNING, assert_original_agrees

SLOTS = 128
ONE = torch.ones(1, 1, dtype=torch.int64)
WINDOW = 7


def model_of(name: str) -> Any:
    """Gemma 2 is attention written out, which keeps its softcap; the others are scaled_dot_product_attention."""
    model = tiny(name)
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    return model


# ------------------------------------------------------------------------------------------------------ static caches


def static(name: str, strict: bool = False) -> ExportedProgram:
    """A step of one token with a StaticCache, by transformers' own recipe."""
    model = model_of(name)
    cache = {"batch_size": 1, "max_cache_len": SLOTS}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache)
    return convert_and_export_with_cache(model, ONE, torch.tensor([0]), strict=strict)


@torch.no_grad()
def loop_of_static(step: ExportedProgram, prompt: Tensor, new: int) -> list[int]:
    module = step.module()
    tokens = prompt.tolist()
    for position in range(len(tokens) + new - 1):
        logits = module(input_ids=torch.tensor([[tokens[position]]]), cache_position=torch.tensor([position]))
        if position >= len(prompt) - 1:
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


# ----------------------------------------------------------------------------------------------------- growing caches


class PastInAndOut(nn.Module):
    """past_key_values as tensors, in and out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past_key_values: list[Any], attention_mask: Tensor | None = None) -> Any:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past_key_values):
            cache.update(key, value, layer)
        out = self.model(input_ids, past_key_values=cache, attention_mask=attention_mask, use_cache=True)
        return out.logits, [(layer.keys, layer.values) for layer in cache.layers]


def past_of(model: Any, rows: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(torch.zeros(rows, heads, tokens, size),) * 2 for _ in range(config.num_hidden_layers)]


def growing(name: str, rows: int = 1, tokens: int = 1, padded: bool = False) -> ExportedProgram:
    """A step with past_key_values in and out: one token of one row, or any number of both."""
    model = model_of(name)
    past = [(key.clone(), value.clone()) for key, value in past_of(model, rows, 5)]
    example: dict[str, Any] = {"input_ids": torch.ones(rows, tokens, dtype=torch.int64), "past_key_values": past}
    some = {0: Dim.AUTO} if rows > 1 else {}
    several = {1: Dim.AUTO} if tokens > 1 else {}
    shapes: dict[str, Any] = {
        "input_ids": {**some, **several},
        "past_key_values": [({**some, 2: Dim.AUTO},) * 2 for _ in past],
    }
    if padded:
        example["attention_mask"] = torch.ones(rows, 5 + tokens, dtype=torch.int64)
        shapes["attention_mask"] = {**some, 1: Dim.AUTO}
    return torch.export.export(PastInAndOut(model), (), example, dynamic_shapes=shapes, strict=False)


register_dynamic_cache_export_support()  # so that torch.export takes a DynamicCache apart


def with_dynamic_cache(name: str) -> ExportedProgram:
    """A step of the model itself, a DynamicCache in and out."""
    model = model_of(name)
    cache, count = DynamicCache(), model.config.num_hidden_layers
    with torch.no_grad():
        model(ONE.expand(1, 5), past_key_values=cache)
    growing_by_one = [{2: Dim.AUTO}] * count
    shapes = {"input_ids": None, "past_key_values": [growing_by_one, growing_by_one]}
    example = {"input_ids": ONE, "past_key_values": cache}
    return torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)


# -------------------------------------------------------------------------------------------------------- the checks


@dataclass
class Case:
    model: Any
    step: Any
    captured: Captured  # its cache located, so that what follows is done for each test, and this once
    notes: list[str]  # of locate-cache


def case(model: Any, step: Any, example: Any = None) -> Case:
    captured = capture(step, example)
    located = LocateCache().run(captured.program)
    return Case(model, step, replace(captured, program=located.program), [note.text for note in located.matches])


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["llama", *map(slow, ["qwen3", "mistral", "gemma2"])])
def static_case(request: pytest.FixtureRequest) -> Case:
    return case(model_of(request.param), static(request.param))


@pytest.fixture(scope="module", params=["llama", *map(slow, ["qwen3", "mistral", "gemma2"]), "gpt2"])
def growing_case(request: pytest.FixtureRequest) -> Case:
    several = request.param in ("qwen3", "mistral")
    options = {"rows": 2, "tokens": 3, "padded": request.param == "qwen3"} if several else {}
    return case(model_of(request.param), growing(request.param, **options))


def use(monkeypatch: pytest.MonkeyPatch, captured: Captured) -> None:
    """Let `optimize` start from what was captured."""

    def again(model: Any, example: Any) -> Captured:
        return replace(captured, program=replace(captured.program, module=copy.deepcopy(captured.program.module)))

    monkeypatch.setattr("lethe_compile.api.capture", again)


def assert_features(fast: lethe.OptimizedModel, config: Any) -> None:
    """Windows and softcaps are those of the configuration."""
    every = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [every] * len(fast.sites)
    windows = [site.mask.window if site.mask else None for site in fast.sites]
    assert windows == [WINDOW if kind == "sliding_attention" else None for kind in kinds]
    assert {site.softcap for site in fast.sites} == {getattr(config, "attn_logit_softcapping", None)}


def generated(model: Any, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out: Tensor = model.generate(ids, attention_mask=mask, **options)
    return out


def test_a_static_cache_of_one_row_serves_batches_and_prefills(
    static_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are those of the exported step's own loop, and of transformers; `optimize` has verified its logits."""
    use(monkeypatch, static_case.captured)
    fast = lethe.optimize(static_case.step, policy="full")
    assert fast.max_positions == SLOTS
    assert_features(fast, static_case.model.config)
    ids, mask = torch.randint(3, 97, (3, 15)), torch.ones(3, 15, dtype=torch.int64)
    mask[1, :6], mask[2, :12] = 0, 0
    out = generated(fast, ids, mask, 40)
    assert torch.equal(out, generated(static_case.model, ids, mask, 40))
    assert out[0].tolist() == loop_of_static(static_case.step, ids[0], 40)


def test_a_growing_cache_serves_batches_and_prefills(growing_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, growing_case.captured)
    fast = lethe.optimize(growing_case.step, policy="full")
    assert_features(fast, growing_case.model.config)
    ids, mask = torch.randint(3, 97, (3, 15)), torch.ones(3, 15, dtype=torch.int64)
    mask[1, :6], mask[2, :12] = 0, 0
    assert torch.equal(generated(fast, ids, mask, 40), generated(growing_case.model, ids, mask, 40))


def assert_pruned_as_the_oracle(one: Case, pruning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, one.captured)
    one.model.set_attn_implementation("eager")
    shows = pruning != "literal" and one.model.config.model_type != "mistral"  # a window may lose what it cannot see
    assert_original_agrees(one.model, PRUNING[pruning], tolerance=1e-4, evictions_show=shows, step=one.step)


@pytest.mark.parametrize("pruning", PRUNING)
def test_a_static_cache_pruned_matches_the_oracle(
    static_case: Case, pruning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_pruned_as_the_oracle(static_case, pruning, monkeypatch)


@pytest.mark.parametrize("pruning", ["lethe", "capped"])
def test_a_growing_cache_pruned_matches_the_oracle(
    growing_case: Case, pruning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_pruned_as_the_oracle(growing_case, pruning, monkeypatch)


# ---------------------------------------------------------------------------------------------- other ways to hand over


def assert_tokens(model: Any, fast: lethe.OptimizedModel) -> None:
    ids = torch.randint(3, 97, (2, 9))
    assert torch.equal(generated(fast, ids, torch.ones_like(ids), 30), generated(model, ids, torch.ones_like(ids), 30))


def test_a_strict_export() -> None:
    assert_tokens(model_of("llama"), lethe.optimize(static("llama", strict=True), policy="full"))


def test_the_graph_module_of_an_export() -> None:
    """Of a static cache the arguments are known; the past of another is an example's."""
    module = static("llama").module()
    assert isinstance(module, fx.GraphModule)
    assert_tokens(model_of("llama"), lethe.optimize(module, policy="full"))


@pytest.mark.parametrize("name", ["llama", "qwen3", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_dynamic_cache_in_and_out(name: str) -> None:
    assert_tokens(model_of(name), lethe.optimize(with_dynamic_cache(name), policy="full"))


@pytest.mark.slow
def test_the_graph_module_of_an_export_with_a_past() -> None:
    step = growing("qwen3")
    module, (_, example) = step.module(), step.example_inputs
    assert_tokens(model_of("qwen3"), lethe.optimize(module, policy="full", example_inputs=example))


def test_a_module_with_a_past() -> None:
    model = model_of("llama")
    past = [(key.clone(), value.clone()) for key, value in past_of(model, 1, 5)]
    example = {"input_ids": ONE, "past_key_values": past}
    assert_tokens(model, lethe.optimize(PastInAndOut(model), policy="full", example_inputs=example))


@torch.no_grad()
def compiled(model: Any, cache: Any, dynamic: bool | None, tokens: int = 3) -> tuple[fx.GraphModule, list[Any]]:
    """The graph of the decode step after `tokens`, or of the one after it, that torch.compile hands to a backend."""
    found: list[Any] = []

    def backend(module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        found.append((module, example))
        return module.forward

    torch._dynamo.reset()
    model(ONE.expand(1, tokens), past_key_values=cache)
    step = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for _ in range(2 if dynamic is None else 1):  # at the second, what differs from the first is dynamic
        step(ONE, past_key_values=cache)
    last: tuple[fx.GraphModule, list[Any]] = found[-1]
    return last


def static_cache(model: Any) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=SLOTS)


@pytest.mark.parametrize("dynamic", [False, slow(True)])
def test_a_static_cache_in_torch_compile(dynamic: bool) -> None:
    model = model_of("qwen3")
    module, example = compiled(model, static_cache(model), dynamic)
    fast = lethe.optimize(module, policy="full", example_inputs=example)
    assert fast.max_positions == SLOTS
    assert_tokens(model, fast)


def test_a_growing_cache_in_torch_compile() -> None:
    model = model_of("mistral")
    module, example = compiled(model, DynamicCache(), dynamic=True)
    assert_tokens(model, lethe.optimize(module, policy="full", example_inputs=example))


@pytest.fixture(scope="module", params=[slow(("gemma2", "static")), ("mistral", "growing")])
def rolling_case(request: pytest.FixtureRequest) -> Case:
    name, kind = request.param
    model = model_of(name)
    cache = static_cache(model) if kind == "static" else DynamicCache(config=model.config)
    module, example = compiled(model, cache, dynamic=None, tokens=WINDOW + 2)
    return case(model, module, example)


@pytest.mark.slow
def test_a_rolling_cache_in_torch_compile(rolling_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a full window: before it is full, every token that there is is seen."""
    use(monkeypatch, rolling_case.captured)
    fast = lethe.optimize(rolling_case.step, policy="full")
    assert_features(fast, rolling_case.model.config)
    rolling = [note for note in rolling_case.notes if "gone (shift)" in note]
    kinds = getattr(rolling_case.model.config, "layer_types", None) or ["sliding_attention"] * len(fast.sites)
    assert len(rolling) == kinds.count("sliding_attention")
    assert all(f"window {WINDOW}, captured for {WINDOW} tokens before it or more" in note for note in rolling)
    assert_tokens(rolling_case.model, fast)


def test_a_rolling_cache_pruned_matches_the_oracle(rolling_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_pruned_as_the_oracle(rolling_case, "lethe", monkeypatch)


def test_a_window_that_is_not_yet_full_limits_the_sequence() -> None:
    """Transformers' graph before that puts a token in the slot of its position, of which there are no more."""
    model = model_of("mistral")
    module, example = compiled(model, static_cache(model), dynamic=None, tokens=2)
    assert lethe.optimize(module, policy="full", example_inputs=example).max_positions == WINDOW


def test_a_rolling_cache_at_one_position_is_refused() -> None:
    """With `dynamic=False` the graph of a full window has the position at which it was captured as a number."""
    model = model_of("mistral")
    module, example = compiled(model, static_cache(model), dynamic=False, tokens=WINDOW + 3)
    with pytest.raises(UnsupportedGraphError, match=r"sees slot \d+ of '.*', which holds none|its mask is not"):
        lethe.optimize(module, example_inputs=example)

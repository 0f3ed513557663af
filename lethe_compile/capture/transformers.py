"""Capture of Hugging Face models: their attention interface hands every attention over as one call."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lethe_compile.capture.causality import causality_told
from lethe_compile.capture.graph import EXAMPLE_TOKENS, ROLES, Captured, evaluating, example_ids, export, to_program
from lethe_compile.capture.patches import patched
from lethe_compile.capture.rope import restart_length, rope_captured
from lethe_compile.capture.softmaxes import attentions
from lethe_compile.capture.stateful import find_stateful, stateful_captured
from lethe_compile.errors import UnsupportedGraphError

_COUNTED = 13  # tokens of the sequences on which a model's attentions are counted
_interface_lock = threading.Lock()


def capture_transformers(model: Any) -> Captured:
    """Capture a `PreTrainedModel` with a language-model head.

    Raises:
        UnsupportedGraphError: it is no decoder, cannot be exported, asks of its attention what is not understood, or
            is shown more by transformers' `generate` than the text.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedGraphError(f"{type(model).__name__} is an encoder-decoder, not a decoder")
    if model.get_output_embeddings() is None:
        raise UnsupportedGraphError(f"{type(model).__name__} gives no logits", hint="load it with AutoModelForCausalLM")
    ids = example_ids(model.device)
    positions = torch.arange(EXAMPLE_TOKENS, device=ids.device).expand_as(ids).contiguous()
    example = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    wrapped = _Logits(model)

    def original(inputs: Mapping[str, Tensor]) -> Tensor:
        with evaluating(model), _eager_attention(model):
            logits: Tensor = wrapped(**inputs)
            return logits

    with causality_told(original, ids.device):
        _refuse_added_tokens(model, ids)
        with _eager_attention(model), rope_captured(model):
            found = find_stateful(model, wrapped.with_cache)
            expected = attentions(wrapped.on_ids, ids.new_ones(2, _COUNTED)) or None
        with _attention_captured(model), stateful_captured(found), rope_captured(model), patched():
            exported = export(wrapped, example)
    program = to_program(exported, {role: role for role in ROLES}, expected)
    program = replace(program, stateful=tuple(site.call for site in found.sites))
    _name_from_the_model(program.graph)
    return Captured(program, original, restart_length(model))


def _refuse_added_tokens(model: Any, ids: Tensor) -> None:
    """Transformers' `generate` may predict in the place of a token that it adds to the text, and does not keep."""
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None:
        return
    try:
        given = prepare(ids, attention_mask=torch.ones_like(ids), use_cache=False)["input_ids"]
    except (AttributeError, KeyError, TypeError):  # code outside transformers that asks for more: nothing to learn here
        return
    if given.shape != ids.shape:
        raise UnsupportedGraphError(
            f"transformers' generate gives {type(model).__name__} {given.shape[1]} tokens where the text has"
            f" {ids.shape[1]}, and predicts in the place of one that it adds",
            hint="generate with the model itself",
        )


class _Logits(nn.Module):
    """A Hugging Face model reduced to what the graph needs: ids, positions and padding in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        self.options = {"use_cache": False} if "use_cache" in accepted or passes_on else {}
        self.positions = "position_ids" in accepted

    def on_ids(self, ids: Tensor) -> Tensor:
        """Logits of whole sequences without padding."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        logits: Tensor = self(ids, positions, torch.ones_like(ids))
        return logits

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if self.positions else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **positions, **self.options)
        logits: Tensor = output.logits
        return logits

    def with_cache(self, rows: int, tokens: int, cache: Any) -> None:
        """Run the model on so many tokens with a cache of its own, or on the token that follows them in `cache`."""
        if not self.options:
            return
        device = next(self.model.parameters()).device
        ids = (torch.arange(rows * (tokens + 1), device=device) % self._vocabulary()).view(rows, tokens + 1)
        positions = torch.arange(tokens + 1, device=device).expand_as(ids)
        part = slice(tokens, tokens + 1) if cache is not None else slice(tokens)
        options: dict[str, Any] = {"position_ids": positions[:, part].contiguous()} if self.positions else {}
        if cache is not None:
            options["past_key_values"] = cache
        self.model(input_ids=ids[:, part].contiguous(), use_cache=True, **options)

    def _vocabulary(self) -> int:
        embeddings: Any = self.model.get_input_embeddings  # a method of every Hugging Face model
        return int(embeddings().weight.shape[0])


def _name_from_the_model(graph: fx.Graph) -> None:
    """Module paths as in the user's model, without that of the wrapper around it."""
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), kind) for key, (path, kind) in stack.items()
            }


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Transformers' eager attention for the time of a call: the one that leaves nothing out (sdpa drops softcap)."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    before = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


@contextmanager
def _attention_captured(model: Any) -> Iterator[None]:
    """Route the model's attention through `attention_site` for the time of an export.

    The capture function goes by the name "eager": models test that name, and masks are made for it. Under any other
    name some models change semantics (softcap dropped, causal masks not made).
    """
    from transformers.modeling_utils import AttentionInterface

    registry = AttentionInterface._global_mapping
    with _interface_lock, _eager_attention(model):
        previous = registry.get("eager")
        try:
            AttentionInterface.register("eager", _attention)
            yield
        finally:
            registry.pop("eager", None)
            if previous is not None:
                registry["eager"] = previous


# What transformers passes beside the operands and is without effect on the result; anything else is refused.
_WITHOUT_EFFECT = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "past_key_values", "is_causal", "position_embeddings"),
        "block_indices",  # of a sparse layer: its mask says the same
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
    }
)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, with the call kept as one node. Operands ``[B, heads, T, head_dim]``."""
    unknown = sorted(name for name, given in other.items() if given is not None and name not in _WITHOUT_EFFECT)
    layer = int(getattr(module, "layer_idx", None) or 0)
    if unknown:
        raise UnsupportedGraphError(f"its attention takes {', '.join(unknown)}, which is not understood", layer=layer)
    if dropout:
        raise UnsupportedGraphError(f"its attention applies dropout {dropout} outside training", layer=layer)
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    options = (scale, None if softcap is None else float(softcap), sliding_window, layer)
    out = torch.ops.lethe.attention_site(query, key, value, attention_mask, s_aux, position_bias, *options)
    return out.transpose(1, 2).contiguous(), None  # [B, T, heads, v_dim]

"""Rotary frequencies that follow the length of the sequence, without the state that transformers keeps of it.

`dynamic_rope_update` compares the greatest position with a length in Python, which no export can follow, and stores the
frequencies that it chooses on the module. In their place, for the time of a capture, both are computed and one is
chosen by `torch.where`. As there, the longest row of a batch decides for all, and keys that are cached stay as they
are, unless the model's `generate` drops its cache when the frequencies change, as Phi-3's does: `restart_length`.

====================  ======================================================================  =========================
rope type             beyond the original length                                              else
====================  ======================================================================  =========================
longrope              the frequencies of the long factors                                     those of the short factors
dynamic               those of a base that grows with the length, anew at every step          those of the plain base
====================  ======================================================================  =========================
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lethe_compile.capture.patches import forwards_replaced


@contextmanager
def rope_captured(model: nn.Module) -> Iterator[None]:
    """In this context rotary embeddings of `model` that follow the length compute their frequencies in every call."""
    with forwards_replaced({module: _stateless(module) for module in model.modules() if _follows_length(module)}):
        yield


def restart_length(model: Any) -> int | None:
    """Tokens beyond which transformers' `generate` drops the model's cache, to fill it anew; None if it keeps it.

    (In 5.17 it goes on with the last token alone. `use_cache=False` gives the tokens that it should.)
    """
    from transformers.cache_utils import DynamicCache

    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    limit = parameters.get("original_max_position_embeddings")
    if limit is None or not any("longrope" in _kinds(module) for module in model.modules()):
        return None
    cache, cached = DynamicCache(), torch.zeros(1, 1, limit, 1)
    cache.update(cached, cached, 0)
    ids = torch.ones(1, limit + 1, dtype=torch.int64, device=model.device)
    given = model.prepare_inputs_for_generation(
        ids, past_key_values=cache, attention_mask=torch.ones_like(ids), use_cache=True
    )
    return int(limit) if given.get("past_key_values") is None else None


def _kinds(module: nn.Module) -> list[Any]:
    kinds = getattr(module, "rope_type", None)
    return [*kinds.values()] if isinstance(kinds, dict) else [kinds]


def _follows_length(module: nn.Module) -> bool:
    length = any(_is_dynamic(kind) or kind == "longrope" for kind in _kinds(module))
    return length and _is_updated(type(module).forward)


def _is_dynamic(kind: Any) -> bool:
    return isinstance(kind, str) and "dynamic" in kind


def _is_updated(forward: Any) -> bool:
    """Whether `dynamic_rope_update` is among the decorators of a forward."""
    helpers = sys.modules.get("transformers.modeling_rope_utils")
    while forward is not None:
        if helpers is not None and getattr(forward, "__globals__", None) is vars(helpers):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _stateless(module: Any) -> Callable[..., Any]:
    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        prefix = "" if layer_type is None else f"{layer_type}_"
        options = {} if layer_type is None else {"layer_type": layer_type}
        chosen = copy.copy(module)
        chosen._buffers = {**module._buffers, f"{prefix}inv_freq": _frequencies(module, x, position_ids, layer_type)}
        with torch.no_grad():
            return inspect.unwrap(type(module).forward)(chosen, x, position_ids, **options)

    return forward


def _frequencies(module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None) -> Tensor:
    """The inverse frequencies of one call."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = "" if layer_type is None else f"{layer_type}_"
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    original: Tensor = getattr(module, f"{prefix}original_inv_freq").to(x.device)
    tokens = position_ids.max() + 1
    if _is_dynamic(kind):
        limit, length = module.original_max_seq_len, tokens
    elif kind == "longrope":
        parameters = module.config.rope_parameters
        limit = (parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"]
        length = limit + 1
    else:
        return original
    beyond, _ = ROPE_INIT_FUNCTIONS[kind](module.config, x.device, seq_len=length, layer_type=layer_type)
    return torch.where(tokens > limit, beyond, original)

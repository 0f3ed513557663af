"""Capture of models wrapped by PEFT: adapters that sit in the model's layers are part of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lethe_compile.capture.graph import Captured, evaluating
from lethe_compile.capture.transformers import _eager_attention, capture_transformers
from lethe_compile.errors import UnsupportedGraphError

_BY_INPUT = {"XLORA": "mixes its adapters anew for every input", "POLY": "chooses its adapters by task_ids"}


def peft_base(model: nn.Module) -> Any | None:
    """The `PreTrainedModel` inside a `PeftModel`, adapters in its layers; None for a model of another kind.

    Raises:
        UnsupportedGraphError: an active adapter does more than change layers.
    """
    if not hasattr(model, "get_base_model") or not hasattr(model, "peft_config"):
        return None
    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    active: Any = model.active_adapters
    for name in active:
        config, kind = configs[name], type(model).__name__
        peft_type = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            reason = "puts virtual tokens in front of the prompt, which no call of the compiled graph would see"
            raise UnsupportedGraphError(f"the adapter '{name}' ({peft_type}) {reason}", where=kind)
        if getattr(config, "alora_invocation_tokens", None):
            reason = "(activated LoRA) starts behind a token of the prompt: what a layer computes depends on the text"
            raise UnsupportedGraphError(f"the adapter '{name}' {reason}", where=kind)
        if peft_type in _BY_INPUT:
            raise UnsupportedGraphError(f"the adapter '{name}' ({peft_type}) {_BY_INPUT[peft_type]}", where=kind)
    return model.get_base_model()  # type: ignore[operator]


def capture_peft(model: Any, base: Any) -> Captured:
    """Capture `base`, with the adapters as they are now, and keep the wrapper `model` to verify against.

    Raises:
        UnsupportedGraphError: as `capture_transformers`.
    """

    def original(inputs: Mapping[str, Tensor]) -> Tensor:
        with evaluating(model), _eager_attention(base):
            logits: Tensor = model(**inputs, use_cache=False).logits
            return logits

    return replace(capture_transformers(base), original=original)

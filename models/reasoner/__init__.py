"""The trained reasoner: a 9.5 M parameter decoder that solves the problems of `task` with traces of 1k-4k tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .task import FAMILIES, Problems, generate_problems, solved, token_accuracy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "FAMILIES", "Problems", "generate_problems", "load_model", "load_tokenizer", "path", "problems", "solved",
    "token_accuracy",
]  # fmt: skip


def path() -> Path:
    """Directory of the weights, in Hugging Face format."""
    return Path(__file__).resolve().parent


def load_model(dtype: torch.dtype | str = "float32", device: str = "cpu", **options: Any) -> PreTrainedModel:
    """The trained model in eval mode; `options` go to `AutoModelForCausalLM.from_pretrained`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path(), dtype=dtype, **options)
    return cast("PreTrainedModel", model.to(device).eval())


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The word-level tokenizer; it puts <bos> in front, and pads on the right."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path())


def problems(
    n: int, seed: int = 0, *, family: str = "loop", min_tokens: int = 1000, max_tokens: int = 4000, device: str = "cpu"
) -> Problems:
    """n fresh problems over the whole range of lengths the model was trained for."""
    return generate_problems(family, n, seed=seed, min_tokens=min_tokens, max_tokens=max_tokens, device=device)

"""Decoders of real shapes with random weights, made on the device, and what a decode step of theirs must read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lethe_compile.checkpoint import weightless
from lethe_compile.errors import InputError

_COMMON: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "bos_token_id": None,  # no id ends a sequence: random weights would pick it at random
    "eos_token_id": None,
    "pad_token_id": None,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "llama-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "toy": {  # seconds on a CPU: to try a command line, and for the tests
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
    },
}
REASONER = "reasoner"


@dataclass(frozen=True)
class Subject:
    """A model to measure, and its sizes."""

    name: str
    model: Any  # transformers.PreTrainedModel
    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, name: str, model: Any) -> Subject:
        config = model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(name, model, config.num_hidden_layers, config.num_key_value_heads, dim)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.model.parameters())).dtype  # type: ignore[no-any-return]

    @property
    def weight_bytes(self) -> int:
        """Weights that a decode step reads: all, but of a separate input embedding only a row per token."""
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        total: int = sum(parameter.nbytes for parameter in self.model.parameters())  # tied ones come once
        return total - (0 if embedding is head else embedding.nbytes)

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value of one token in every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


def without_weights(name: str, device: torch.device, layers: int | None = None) -> Any:
    """The shape `name` with weights that take no memory, good for capturing a graph."""
    return weightless(_config(name, layers), _dtype(device), device, attn_implementation="sdpa")


def load(name: str, device: torch.device, layers: int | None = None) -> Subject:
    """The shape `name` in bfloat16, or in float32 on a CPU; `reasoner` is the bundled model, trained.

    Raises:
        InputError: no such shape.
    """
    if name == REASONER:
        from lethe_compile.models import reasoner

        return Subject.of(name, reasoner.load_model(device=str(device)))
    with device:
        model = _from_config(name, device, layers)
    _randomise(model)
    return Subject.of(name, model.eval())


def _from_config(name: str, device: torch.device, layers: int | None) -> Any:
    """The model as its constructor leaves it, without any weight initialised."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = _config(name, layers)
    with no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=_dtype(device), attn_implementation="sdpa")


def _config(name: str, layers: int | None) -> Any:
    if name not in SHAPES:
        raise InputError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}")
    from transformers import AutoConfig

    settings = {**_COMMON, **SHAPES[name]}
    if layers is not None:
        settings["num_hidden_layers"] = layers
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _randomise(model: Any) -> None:
    """Matrices from a normal distribution of deviation 0.02, norms 1, biases 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

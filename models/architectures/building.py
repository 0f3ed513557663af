"""From settings to a model: `build`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import chain, cycle, islice
from typing import Any, NamedTuple

import torch

from lethe_compile import errors

from . import common, encoders, hybrid, known, moe, sparse, special
from .base import BASE, PER_LAYER, UNDECLARED, Settings

CONFIGS: dict[str, Settings] = dict(
    chain.from_iterable(group.CONFIGS.items() for group in (common, moe, sparse, hybrid, encoders, special))
)
ARCHITECTURES: tuple[str, ...] = tuple(sorted(CONFIGS))


class Widths(NamedTuple):
    """How `_widen` changes what transformers draws: two factors, and by their last names parameters set to a value."""

    matrices: float = 8.0
    embeddings: float = 4.0
    values: Mapping[str, float] = {}


WIDTHS: dict[str, Widths] = {
    # Their attention is flat with the widths of the others, or they repeat one token.
    **dict.fromkeys(("bert-generation", "biogpt", "blenderbot-small", "bloom", "ctrl", "electra"), Widths(12.0)),
    **dict.fromkeys(("jetmoe", "marian", "mbart", "pegasus", "plbart", "roc_bert", "xglm", "xmod"), Widths(12.0)),
    **dict.fromkeys(("openai-gpt", "xlnet"), Widths(12.0, 24.0)),  # no norm before the first attention
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), Widths(12.0)),
    **dict.fromkeys(("glm_moe_dsa", "inkling_text", "kimi_linear"), Widths(12.0)),
    "zaya": Widths(values={"temp": 2.0}),  # the temperature of its attention, which starts at zero
    # Wider ones would amplify rounding.
    **dict.fromkeys(("minicpm3", "recurrent_gemma", "youtu", "zamba2"), Widths(4.0)),
    **dict.fromkeys(("nemotron_h", "roformer"), Widths(6.0)),
    # Tied embeddings, scaled by the square root of the width: wider ones would outweigh every layer.
    **dict.fromkeys(("gemma", "gemma2", "gemma4_text", "gemma4_unified_text", "vaultgemma"), Widths(embeddings=2.0)),
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), Widths(embeddings=1.0)),
}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A randomly initialised Hugging Face causal LM of the architecture `name`, in evaluation mode, eager attention.

    `overrides` replace settings of its configuration. Raises `ConfigError` for a name that is not in `ARCHITECTURES`
    or that the installed transformers does not know, and for a setting that the configuration does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **_settings(name, _config_class(name), overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # sdpa would drop gemma2's softcap
    _widen(model, WIDTHS.get(name, Widths()))
    return model.to(dtype).eval()


def _config_class(name: str) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name not in CONFIGS:
        reason = known.OTHERS.get(name, f"the architectures are {', '.join(ARCHITECTURES)}")
        raise errors.ConfigError(f"no tiny configuration of {name!r}: {reason}")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise errors.ConfigError(
            f"transformers {transformers.__version__} has no causal language model {name!r}; install another version"
        )
    return CONFIG_MAPPING[name]


def _settings(name: str, config_class: Any, overrides: Settings) -> Settings:
    """Arguments of `config_class`: the base, the architecture's own, then `overrides`, under the names it declares.

    A list with one entry a layer is repeated or cut to the number of layers.
    """
    declared = set(inspect.signature(config_class).parameters)
    aliases = {alias: field for alias, field in config_class.attribute_map.items() if alias not in declared}
    aliases = {alias: field for alias, field in aliases.items() if field in declared}
    merged = {aliases[key]: value for key, value in BASE.items() if key in aliases}
    merged |= {key: value for key, value in BASE.items() if key in declared}
    merged |= {aliases.get(key, key): value for key, value in {**CONFIGS[name], **overrides}.items()}
    if unknown := sorted(merged.keys() - declared - UNDECLARED):
        raise errors.ConfigError(f"{config_class.__name__} of {name!r} has no setting {', '.join(unknown)}")
    layers = merged.get(aliases.get("num_hidden_layers", "num_hidden_layers"))
    if layers is not None:
        for key in PER_LAYER & merged.keys() - overrides.keys():
            merged[key] = list(islice(cycle(merged[key]), layers))
    return merged


def _widen(model: torch.nn.Module, widths: Widths) -> None:
    """Make random weights tell: attention far from uniform, biases that show, and no token that always wins.

    Parameters of two or more dimensions are scaled; what is all zeros (biases, the norms of Gemma) is drawn. Rows of
    linear layers are centred: behind an activation of positive mean they would push every token the same way, and
    greedy generation would repeat one token.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for module in model.modules():
            inputs = {"Linear": 1, "Conv1D": 0}.get(type(module).__name__)  # Conv1D: GPT-2's transposed linear layer
            weight = getattr(module, "weight", None)
            if inputs is not None and isinstance(weight, torch.Tensor) and id(weight) not in tables:
                weight.sub_(weight.mean(inputs, keepdim=True))
        for name, parameter in model.named_parameters():
            if (value := widths.values.get(name.rpartition(".")[2])) is not None:
                parameter.fill_(value)
            if parameter.dim() >= 2:
                parameter.mul_(widths.embeddings if id(parameter) in tables else widths.matrices)
            if not parameter.any():
                parameter.normal_(std=0.05)

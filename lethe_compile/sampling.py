"""The options of transformers' `generate`: one resolved configuration, its logits processors and stopping criteria.

The classes are transformers' own and stand in the order in which its `generate` applies them, so that the same seed
draws the same tokens. An option that cannot be honoured is refused by name; none is dropped silently.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethe_compile.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

DEFAULT_NEW_TOKENS = 20  # both as in transformers, for what neither the call nor the model sets
DEFAULT_TOP_K = 50

_BEAMS = "beams would have to fork the pruned cache; use greedy search or sampling"
_DRAFTS = "drafted tokens have to be rolled back, and a pruned cache cannot be"
_TWICE = "it runs the model more than once for a token"
_LOGITS_ONLY = "the compiled graph maps token ids to logits and returns nothing else"
_POSITIONS = "positions follow from the attention mask"
_CACHE = "the cache belongs to the optimized model; configure it with LetheConfig"
_COMPILED = "the graph was compiled by lethe_compile.optimize; choose there"

# option -> (values that mean "off" beside None, why any other is refused)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "penalty_alpha": ((0.0,), _TWICE),
    "guidance_scale": ((1.0,), _TWICE),
    "negative_prompt_ids": ((), _TWICE),
    "negative_prompt_attention_mask": ((), _TWICE),
    "dola_layers": ((), _LOGITS_ONLY),
    "output_attentions": ((False,), _LOGITS_ONLY),
    "output_hidden_states": ((False,), _LOGITS_ONLY),
    "inputs_embeds": ((), _LOGITS_ONLY),
    "position_ids": ((), _POSITIONS),
    "cache_position": ((), _POSITIONS),
    "assistant_model": ((), _DRAFTS),
    "assistant_tokenizer": ((), _DRAFTS),
    "assistant_early_exit": ((), _DRAFTS),
    "prompt_lookup_num_tokens": ((), _DRAFTS),
    "speculation_type": ((), _DRAFTS),
    "is_assistant": ((False,), _DRAFTS),
    "use_mtp": ((False,), _DRAFTS),
    "token_healing": ((False,), "heal the prompt before the call"),
    "synced_gpus": ((False,), "the loop runs in one process"),
    "custom_generate": ((), "an optimized model has this one loop"),
    "past_key_values": ((), _CACHE),
    "use_cache": ((True,), _CACHE),
    "cache_implementation": ((), _CACHE),
    "cache_config": ((), _CACHE),
    "max_cache_len": ((), _CACHE),
    "prefill_chunk_size": ((), _CACHE),
    "low_memory": ((False,), _CACHE),
    "compile_config": ((), _COMPILED),
    "disable_compile": ((False,), _COMPILED),
}
# A checkpoint's hints to transformers' own runtime: they change no token, so only a call that asks for them is refused.
_NOT_INHERITED = {name for name, (_, reason) in _REFUSED.items() if reason in (_CACHE, _COMPILED)}
RUNTIME_OFF: Mapping[str, None] = dict.fromkeys(_NOT_INHERITED)
"""Those hints, with the value that says nothing."""


def without_runtime_hints(config: GenerationConfig) -> GenerationConfig:
    """A copy of a model's defaults that says nothing about caches and compilers."""
    config = copy.deepcopy(config)
    for name in RUNTIME_OFF:
        if hasattr(config, name):
            setattr(config, name, None)
    return config


def resolve_config(
    defaults: GenerationConfig | None, given: GenerationConfig | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """A fresh configuration: `options` over `given` over the model's `defaults` over transformers' defaults.

    Raises `InputError` for an option that is unknown, unsupported, or has a value which transformers refuses.
    """
    from transformers import GenerationConfig

    if given is not None and not isinstance(given, GenerationConfig):
        raise InputError(f"generation_config must be a transformers.GenerationConfig, not {type(given).__name__}")
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    for name, value in ({} if defaults is None else vars(defaults)).items():
        if not name.startswith("_") and name not in _NOT_INHERITED and getattr(config, name, None) is None:
            setattr(config, name, copy.deepcopy(value))
    if config.top_k is None:
        config.top_k = DEFAULT_TOP_K
    with _transformers_checks():
        unused = config.update(**options)
    refuse({**vars(config), **unused})
    unknown = [name for name, value in unused.items() if value is not None and name not in _REFUSED]
    if unknown:
        close = difflib.get_close_matches(unknown[0], vars(config), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"generate does not know the options {unknown}{hint}")
    return config


def refuse(options: Mapping[str, Any]) -> None:
    """Raises `InputError` for the first option whose value asks for what an optimized model cannot do."""
    for name, (neutral, reason) in _REFUSED.items():
        value = options.get(name)
        if value is not None and value not in neutral:
            shown = repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
            raise InputError(f"generate does not support {name}={shown}: {reason}")


@contextmanager
def _transformers_checks() -> Iterator[None]:
    """Turns what transformers' own argument checks raise into `InputError`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(f"generate: {error}") from error


def token_ids(value: int | Sequence[int] | Tensor | None, device: torch.device) -> Tensor | None:
    """One or several token ids as int64 `[n]`, or None where there are none."""
    ids = torch.as_tensor([] if value is None else value, dtype=torch.int64, device=device).reshape(-1)
    return ids if len(ids) else None


def logits_processors(
    config: GenerationConfig,
    custom: Sequence[Any] | None,
    prompt: Tensor,  # [rows, prompt] left-padded
    new_tokens: int,
    eos: Tensor | None,
    vocab_size: int,
    allowed: Callable[[int, Tensor], list[int]] | None,
) -> LogitsProcessorList:
    """What turns logits into the scores that a token is chosen by: penalties, `custom`, then the sampling warpers.

    A custom processor takes the place of a standard one of its own type. `allowed` is `prefix_allowed_tokens_fn`.
    """
    from transformers import LogitNormalization, LogitsProcessorList

    with _transformers_checks():
        standard = _penalties(config, prompt, new_tokens, eos, allowed)
        processors = LogitsProcessorList(_merge(standard, custom, "logits_processor"))
        if config.do_sample:
            processors += _warpers(config, str(prompt.device))
        if config.watermarking_config is not None:
            processors.append(config.watermarking_config.construct_processor(vocab_size, prompt.device))
        if config.renormalize_logits:
            processors.append(LogitNormalization())
    return processors


def stopping_criteria(
    config: GenerationConfig,
    custom: Sequence[Any] | None,
    prompt_length: int,
    room: int | None,
    eos: Tensor | None,
    tokenizer: Any,
) -> StoppingCriteriaList:
    """What ends a row: length, time, stop strings, end-of-sequence ids, and the caller's `custom` criteria.

    `prompt_length` counts padding. `room` is the number of new tokens that the model has positions for, None without
    a limit; it bounds the default length only. There is always a `MaxLengthCriteria`.
    """
    import transformers as hf

    if config.stop_strings is not None and tokenizer is None:
        raise InputError("stop_strings are found through the model's tokenizer: pass tokenizer= as well")
    with _transformers_checks():
        standard = _enabled(
            (_max_length(config, prompt_length, room), None, hf.MaxLengthCriteria),
            (config.max_time, None, hf.MaxTimeCriteria),
            (config.stop_strings, None, lambda strings: hf.StopStringCriteria(tokenizer, strings)),
            (eos, None, hf.EosTokenCriteria),
        )
        return hf.StoppingCriteriaList(_merge(standard, custom, "stopping_criteria"))


def _max_length(config: GenerationConfig, prompt_length: int, room: int | None) -> int:
    for name in ("max_new_tokens", "max_length"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, int):
            raise InputError(f"{name} must be an int, not {value!r}")
    if config.max_new_tokens is not None:
        return prompt_length + int(config.max_new_tokens)
    if config.max_length is not None:
        return int(config.max_length)
    default = DEFAULT_NEW_TOKENS if room is None else min(DEFAULT_NEW_TOKENS, room)
    warnings.warn(f"max_new_tokens is not set: generating at most {default}", stacklevel=4)
    return prompt_length + default


def _penalties(config: Any, prompt: Any, new_tokens: int, eos: Any, allowed: Any) -> list[Any]:
    import transformers as hf

    columns, device = prompt.shape[1], str(prompt.device)
    last = columns + new_tokens
    begin = columns + (columns == 1 and config.forced_bos_token_id is not None)
    min_length = columns + config.min_new_tokens if config.min_new_tokens is not None else config.min_length
    return _enabled(
        (config.sequence_bias, None, hf.SequenceBiasLogitsProcessor),
        (config.encoder_repetition_penalty, 1.0, lambda x: hf.EncoderRepetitionPenaltyLogitsProcessor(x, prompt)),
        (config.repetition_penalty, 1.0, hf.RepetitionPenaltyLogitsProcessor),
        (config.no_repeat_ngram_size, 0, hf.NoRepeatNGramLogitsProcessor),
        (config.encoder_no_repeat_ngram_size, 0, lambda n: hf.EncoderNoRepeatNGramLogitsProcessor(n, prompt)),
        (config.bad_words_ids, None, lambda words: hf.NoBadWordsLogitsProcessor(words, eos)),
        (eos if min_length else None, None, lambda ids: hf.MinLengthLogitsProcessor(min_length, ids, device)),
        (allowed, None, lambda function: hf.PrefixConstrainedLogitsProcessor(function, 1)),
        (config.forced_bos_token_id, None, hf.ForcedBOSTokenLogitsProcessor),
        (config.forced_eos_token_id, None, lambda ids: hf.ForcedEOSTokenLogitsProcessor(last, ids, device)),
        (config.remove_invalid_values, False, lambda _: hf.InfNanRemoveLogitsProcessor()),
        (config.exponential_decay_length_penalty, None, lambda x: hf.ExponentialDecayLengthPenalty(x, eos, columns)),
        (config.suppress_tokens, None, lambda ids: hf.SuppressTokensLogitsProcessor(ids, device)),
        (config.begin_suppress_tokens, None, lambda x: hf.SuppressTokensAtBeginLogitsProcessor(x, begin, device)),
    )


def _warpers(config: GenerationConfig, device: str) -> list[Any]:
    import transformers as hf

    return _enabled(
        (config.temperature, 1.0, hf.TemperatureLogitsWarper),
        (config.top_h, None, hf.TopHLogitsWarper),
        (config.top_k, 0, hf.TopKLogitsWarper),
        (config.top_p, 1.0, hf.TopPLogitsWarper),
        (config.min_p, None, hf.MinPLogitsWarper),
        (config.typical_p, 1.0, hf.TypicalLogitsWarper),
        (config.epsilon_cutoff, 0.0, hf.EpsilonLogitsWarper),
        (config.eta_cutoff, 0.0, lambda epsilon: hf.EtaLogitsWarper(epsilon, device=device)),
    )


def _enabled(*options: tuple[Any, Any, Callable[[Any], Any]]) -> list[Any]:
    """The objects of the options that are on, from triples: value, value that means "off" beside None, class."""
    return [make(value) for value, off, make in options if value is not None and (off is None or value != off)]


def _merge(standard: list[Any], custom: Sequence[Any] | None, argument: str) -> list[Any]:
    if not isinstance(custom, (list, tuple, type(None))):
        raise InputError(f"{argument} must be a list, not {type(custom).__name__}")
    first = {type(one): one for one in reversed(custom or ())}
    merged = [first.get(type(one), one) for one in standard]
    for one in custom or ():
        if one not in merged:
            merged.append(one)
    return merged

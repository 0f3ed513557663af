"""An optimized model as transformers sees models: for `pipeline`, `GenerationMixin.generate` and loops of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from lethe_compile import generation, sampling
from lethe_compile.errors import InputError
from lethe_compile.hf_cache import EndedRows, LetheCache
from lethe_compile.runtime import OptimizedModel

_MIXIN: Any = GenerationMixin  # which types its own `self` as a protocol that nothing outside transformers meets
# Columns of the sequence, as older versions pass them: they follow from past_key_values.
_WITHOUT_EFFECT = frozenset({"cache_position", "return_dict"})


class AdapterConfig(PreTrainedConfig):
    """The key under which transformers' registry knows the adapter; the adapter itself has its model's config."""

    model_type = "lethe"


class LetheForCausalLM(PreTrainedModel, GenerationMixin):
    """An `OptimizedModel` behind transformers' interface; `OptimizedModel.as_hf` makes it.

    `generate` runs the optimized model's own loop; what that refuses, such as beam search, raises `InputError`.
    `forward` works inside any other loop, `GenerationMixin.generate(model, …)` among them: its `past_key_values` is a
    `LetheCache`, the cache is pruned between steps, and the tokens are those of `OptimizedModel.generate`.

    Attributes:
        optimized: the model that does the work; its `report()` and `cache_stats()` tell what happened.
        config: the original model's own.
        generation_config: a copy of the original's, without what it says about caches and compilers.
    """

    config_class = AdapterConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, optimized: OptimizedModel) -> None:
        if not isinstance(optimized, OptimizedModel):
            raise InputError(f"this class wraps an OptimizedModel, not {type(optimized).__name__}: call its as_hf()")
        if not isinstance(optimized.hf_config, PreTrainedConfig):
            raise InputError(
                "as_hf() needs the model's transformers config, and this model was optimized from a "
                f"{type(optimized.hf_config).__name__} config: optimize() the transformers model itself"
            )
        super().__init__(optimized.hf_config)
        self.optimized = optimized
        self.generation_config = sampling.without_runtime_hints(optimized.generation_config or GenerationConfig())
        self.train(False)

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> Any:
        return attn_implementation  # the config is the original model's, and stays as it is

    def _check_and_adjust_experts_implementation(self, experts_implementation: Any, *_: Any, **__: Any) -> Any:
        return experts_implementation

    @property
    def device(self) -> torch.device:
        return self.optimized.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LetheForCausalLM:
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        moved = fn(probe)
        if moved.device != probe.device or moved.dtype != probe.dtype:
            raise InputError(
                f"the graph was compiled for {probe.dtype} on {probe.device} and stays there: optimize the model where "
                f"it is to run, and give a pipeline device={str(probe.device)!r}"
            )
        return self

    # ------------------------------------------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        **options: Any,
    ) -> Any:
        """`GenerationMixin.generate` with the same arguments, run by the optimized model; see `generation.generate`.

        With `past_key_values`, a `LetheCache`, or a callable `custom_generate`, transformers' own loop runs instead.

        Raises:
            InputError: an option that an optimized model cannot honour, by name.
        """
        common = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "streamer": streamer,
            **options,
        }
        if isinstance(options.get("past_key_values"), LetheCache) or callable(custom_generate):
            return _MIXIN.generate(self, inputs, custom_generate=custom_generate, **common)
        refused = {
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        decoder = _WithDefaults(self.optimized, self.generation_config)
        return generation.generate(decoder, inputs, **common, **{k: v for k, v in refused.items() if v is not None})

    def new_cache(self) -> LetheCache:
        """An empty `past_key_values`, for a conversation that `generate` continues turn by turn."""
        return LetheCache(self.optimized)

    def _prepare_generation_config(self, generation_config: Any, *args: Any, **options: Any) -> Any:
        """Transformers' loop begins here: refuse what would fork the cache, roll it back, or need more than logits."""
        config, rest = _MIXIN._prepare_generation_config(self, generation_config, *args, **options)
        sampling.refuse({**vars(config), **sampling.RUNTIME_OFF})
        return config, rest

    def _validate_generation_mode(self, generation_mode: Any, *args: Any) -> None:
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise InputError(f"generate does not support {generation_mode.value}: use greedy search or sampling")
        _MIXIN._validate_generation_mode(self, generation_mode, *args)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        if generation_config.cache_implementation is not None:
            sampling.refuse({"cache_implementation": generation_config.cache_implementation})
        if model_kwargs.get("past_key_values") is not None:
            self._session(model_kwargs["past_key_values"])._is_user_defined = True  # as transformers marks it
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LetheCache(self.optimized, max_cache_length + 1)

    def _sample(self, input_ids: Any, *args: Any, **options: Any) -> Any:
        """Transformers' loop, which tells the session of rows that ended, and ends the session when it does."""
        session = options.get("past_key_values")
        if not isinstance(session, LetheCache):
            return _MIXIN._sample(self, input_ids, *args, **options)
        kept = options["generation_config"].return_dict_in_generate or session._is_user_defined
        options["stopping_criteria"] = EndedRows(options["stopping_criteria"], session)
        try:
            out = _MIXIN._sample(self, input_ids, *args, **options)
        except BaseException:
            session.close()
            raise
        finally:
            session.ended_rows = None
        if not kept:
            session.close()
        return out

    def init_continuous_batching(self, *args: Any, **options: Any) -> NoReturn:
        raise InputError("an optimized model has its own paged cache: transformers' continuous batching cannot use it")

    # --------------------------------------------------------------------------------------------------------- forward

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """Logits of tokens ``[rows, T]`` and, with `use_cache`, the session that goes on from them.

        With `use_cache`, which defaults to the config's, a call without `past_key_values` begins a session, and one
        with it appends; T > 1 then takes T decode steps. Without it, whole sequences are computed and nothing is
        evicted. Positions count each row's own tokens, padding on either side. `attention_mask` is
        ``[rows, columns + T]``, 0 on padding. `logits_to_keep` is the number of last columns, or their indices
        ``[n]``; 0 for all. `labels` ``[rows, T]`` give a loss, without gradients.

        Raises:
            InputError: a session that ended, a mask or positions at odds with it, or arguments that have no effect.
        """
        self._refuse(options, input_ids)
        assert input_ids is not None
        if use_cache is None:
            use_cache = bool(getattr(self.config.get_text_config(), "use_cache", True))
        if past_key_values is not None or use_cache:
            past_key_values = self._session(past_key_values)
            last = isinstance(logits_to_keep, int) and logits_to_keep == 1
            # A row padded on the right has its last token in another column than the last one.
            last = last and labels is None and (attention_mask is None or bool((attention_mask[..., -1] != 0).all()))
            logits = past_key_values.append(input_ids, attention_mask, position_ids, whole=not last)
        else:
            logits = self.optimized(input_ids, position_ids, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.optimized.vocab_size)
        kept = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        out = CausalLMOutputWithPast(loss=loss, logits=kept, past_key_values=past_key_values)
        return out.to_tuple() if options.get("return_dict") is False else out

    def _session(self, given: Any) -> LetheCache:
        if given is None:
            return LetheCache(self.optimized)
        if not isinstance(given, LetheCache) or given._model is not self.optimized:
            raise InputError(
                f"past_key_values must be what this model's forward returned, or new_cache(), not another "
                f"{type(given).__name__}"
            )
        return given

    def _refuse(self, options: dict[str, Any], input_ids: Tensor | None) -> None:
        for name, value in options.items():
            if value is not None and value is not False and name not in _WITHOUT_EFFECT:
                raise InputError(f"forward does not support {name}: the compiled graph maps token ids to logits")
        if not isinstance(input_ids, Tensor):
            raise InputError(f"input_ids must be a tensor [rows, tokens], not {type(input_ids).__name__}")

    # ------------------------------------------------------------------------------------------------------- refusals

    def save_pretrained(self, *args: Any, **options: Any) -> NoReturn:
        """Refused: the weights are the original model's; save that one."""
        raise InputError("an optimized model shares its weights with the original: save that with its save_pretrained")


class _WithDefaults:
    """The optimized model as `generation.Decoder`, with another `generation_config` for defaults."""

    def __init__(self, optimized: OptimizedModel, generation_config: GenerationConfig) -> None:
        self._optimized, self.generation_config = optimized, generation_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimized, name)


# `pipeline` looks for the class's name there, and complains about one that it does not find.
AutoModelForCausalLM.register(AdapterConfig, LetheForCausalLM, exist_ok=True)

"""How a request's tokens are chosen, and when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

_OWN = {"seed", "logprobs", "ignore_eos", "stop_token_ids", "logits_processor", "options"}


@dataclass(frozen=True)
class SamplingParams:
    """Of one request. None means the model's `generation_config`, then transformers' default, as in `generate`.

    The same parameters give the tokens that ``fast.generate(ids, …, seed=seed)`` gives of that prompt alone.

    Attributes:
        max_new_tokens: most tokens to generate.
        do_sample: draw instead of taking the likeliest. None: whether `temperature` is given and above 0, or the
            model's own. `temperature=0` is greedy, as services have it.
        temperature, top_k, top_p, min_p: of the drawing, in this order.
        repetition_penalty: above 1 makes what is in prompt and text less likely.
        seed: of this request's own draws; None draws one.
        stop_token_ids: ids that end it, beside the model's own `eos_token_id`.
        ignore_eos: the model's own `eos_token_id` does not end it; `stop_token_ids` do.
        stop_strings: texts that end it. Needs `Engine(tokenizer=…)`.
        logprobs: how many likeliest tokens to report at each token, beside the chosen one (0 and up); None: no figures.
        logits_processor: more of transformers' `LogitsProcessor`s, or one's own: ``(ids [1, T], scores [1, V])``. They
            run in the engine's thread.
        options: any other field of `transformers.GenerationConfig` that `generate` takes, such as
            `{"no_repeat_ngram_size": 3}`.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    stop_strings: Sequence[str] | None = None
    logprobs: int | None = None
    logits_processor: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def generation_options(self) -> dict[str, Any]:
        """What `transformers.GenerationConfig` knows of it, as keywords."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OWN}
        given = {name: value for name, value in own.items() if value is not None}
        if self.temperature == 0:
            del given["temperature"]
            given["do_sample"] = False
        elif self.temperature is not None and self.do_sample is None:
            given["do_sample"] = True
        return {**given, **self.options}

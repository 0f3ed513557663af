"""A request as the engine sees it: what was checked when it came, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile import sampling
from lethe_compile.errors import InputError
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.lockstep import Arrival
from lethe_compile.serving.request import FinishReason, Request
from lethe_compile.serving.sampling import SamplingParams
from lethe_compile.serving.stats import RequestStats

if TYPE_CHECKING:
    from transformers import GenerationConfig

_UNSERVED = ("return_dict_in_generate", "output_scores", "output_logits")


@dataclass(frozen=True)
class Terms:
    """What a request asks for, resolved against the model's defaults as `generate` does."""

    config: GenerationConfig
    new_tokens: int
    stops: tuple[int, ...]  # ids that end it
    criteria: tuple[Any, ...]  # transformers' StoppingCriteria that only the host can ask, such as stop strings
    processors: Any  # a LogitsProcessorList on the CPU
    custom: Sequence[Any]

    @property
    def sample(self) -> bool:
        return bool(self.config.do_sample)

    def processors_on(self, prompt: Tensor, vocab_size: int) -> Any:
        """The list for the device of `prompt` [1, T]."""
        if prompt.device.type == "cpu":
            return self.processors
        eos = sampling.token_ids(self.stops, prompt.device)
        return sampling.logits_processors(
            self.config, list(self.custom), prompt, self.new_tokens, eos, vocab_size, None
        )


def read_prompt(ids: Sequence[int] | Tensor, vocab_size: int) -> tuple[int, ...]:
    """Token ids of one prompt; the device is not touched for ids that are on the host.

    Raises:
        InputError: they are no ids of this vocabulary, or none at all.
    """
    if isinstance(ids, Tensor):
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() > 2 or (ids.dim() == 2 and len(ids) != 1):
            raise InputError(f"a request is one prompt: ids [tokens] of int64, not {ids.dtype} {list(ids.shape)}")
        ids = ids.flatten().tolist()
    prompt = tuple(ids)
    if not prompt:
        raise InputError("the prompt is empty: give at least one token id, such as the model's bos_token_id")
    for place, token in enumerate(prompt):
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InputError(f"prompt[{place}] is {token!r}: not an id of the vocabulary of {vocab_size}")
    return tuple(map(int, prompt))


def read_terms(params: SamplingParams, prompt: tuple[int, ...], fast: OptimizedModel, tokenizer: Any) -> Terms:
    """Check and resolve what a request asks for.

    Raises:
        InputError: an option that is unknown, cannot be honoured, or has a value that is not allowed.
    """
    options = params.generation_options()
    config = sampling.resolve_config(fast.generation_config, None, options)
    for name in _UNSERVED:
        if options.get(name):
            raise InputError(f"a request does not support {name}: it delivers tokens; ask for logprobs instead")
    if config.num_return_sequences not in (None, 1):
        raise InputError("a request is one sequence: submit the prompt num_return_sequences times")
    if params.logprobs is not None and not 0 <= params.logprobs <= fast.vocab_size:
        raise InputError(f"logprobs={params.logprobs} must be None or in 0..{fast.vocab_size}")
    if params.seed is not None and (not isinstance(params.seed, int) or isinstance(params.seed, bool)):
        raise InputError(f"seed must be an int, not {params.seed!r}")
    cpu = torch.device("cpu")
    known = () if params.ignore_eos else (sampling.token_ids(config.eos_token_id, cpu),)
    own = [id for ids in known if ids is not None for id in ids.tolist()]
    stops = tuple(dict.fromkeys([*own, *map(int, params.stop_token_ids)]))
    eos = sampling.token_ids(stops, cpu)
    room = None if fast.max_positions is None else fast.max_positions - len(prompt)
    criteria = sampling.stopping_criteria(config, None, len(prompt), room, eos, tokenizer)
    new_tokens = (criteria.max_length or 0) - len(prompt)
    if new_tokens < 1:
        raise InputError(f"max_new_tokens leaves {new_tokens} tokens to generate: ask for at least one")
    ids = torch.tensor([prompt])
    processors = sampling.logits_processors(
        config, list(params.logits_processor), ids, new_tokens, eos, fast.vocab_size, None
    )
    asked = [one for one in criteria if type(one).__name__ not in ("MaxLengthCriteria", "EosTokenCriteria")]
    return Terms(config, new_tokens, stops, tuple(asked), processors, params.logits_processor)


@dataclass(eq=False)
class Job:
    """A request under way. All but `request` and `terms` is the engine's thread's alone.

    Attributes:
        text: prompt and generated tokens.
        row: its row of the batch; None while it waits.
        source: what is prefilled: the prompt, or after a preemption, where nothing was evicted, all the text but its
            last token; `filled` of it are in the cache.
        forced: tokens that it has generated before a preemption, to be fed again rather than chosen; `chosen` says how
            many tokens it has had since its prefill, forced ones included.
        claim: [layers] tokens that each layer may come to hold, None where the policy has no cap.
        verdict: how it ends, where only this rank's host knows: it does so before the next step, on all ranks alike,
            and nothing more is delivered until then.
        wants: [layers] tokens that it held when it was preempted, and needs again before it is worth admitting.
    """

    request: Request
    terms: Terms
    seed: int
    order: int = 0
    row: int | None = None
    source: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    filled: int = 0
    forced: tuple[int, ...] = ()
    chosen: int = 0
    text: list[int] = field(default_factory=list)
    claim: NDArray[np.int64] | None = None
    wants: NDArray[np.int64] | None = None
    cancelled: bool = False
    verdict: tuple[FinishReason, BaseException | None] | None = None
    ended: bool = False
    generator: torch.Generator | None = None
    processors: Any = None
    ids: Tensor | None = None  # [1, prompt + new] on the device, for processors
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    rounds: int = 0
    pressed: int = 0
    preemptions: int = 0
    retained_peak: int = 0

    def __post_init__(self) -> None:
        self.text = list(self.request.prompt)
        self.source = np.asarray(self.text, np.int64)

    @property
    def prompt(self) -> int:
        """Tokens of its prompt."""
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens that were read back and delivered."""
        return len(self.text) - self.prompt

    @property
    def forcing(self) -> bool:
        """Whether its next token is one that it has chosen before."""
        return self.chosen < len(self.forced)

    def stats(self, now: float | None = None) -> RequestStats:
        """As they are; with `now`, at its end."""
        after = self.generated - 1
        per_token = (self.last - self.first) / after if self.first and self.last and after > 0 else None
        return RequestStats(
            queued=None if self.admitted is None else self.admitted - self.submitted,
            first_token=None if self.first is None else self.first - self.submitted,
            per_token=per_token,
            total=None if now is None else now - self.submitted,
            rounds=self.rounds,
            pressed=self.pressed,
            preemptions=self.preemptions,
            retained_peak=self.retained_peak,
        )


def follower(arrival: Arrival) -> Job:
    """A job of another rank's: who asked, and how its tokens are chosen, is known there."""
    from transformers import GenerationConfig

    request = Request(f"request {arrival.order} of rank 0", arrival.prompt, SamplingParams(), lambda _: None)
    terms = Terms(GenerationConfig(do_sample=False), arrival.new_tokens, (), (), (), ())
    return Job(request, terms, seed=0, order=arrival.order)

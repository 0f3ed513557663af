"""Requests as they come: read, checked against what the engine can serve, and turned into jobs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lethe_compile.errors import InputError
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.admission import Admission
from lethe_compile.serving.job import Job, read_prompt, read_terms
from lethe_compile.serving.request import Request
from lethe_compile.serving.sampling import SamplingParams

_ids = itertools.count()


class Intake:
    """Reads requests, from any thread; nothing of an engine is changed.

    Args:
        max_length: most prompt and new tokens together, that the engine's user allows.
        tokenizer: for stop strings.

    Attributes:
        limit: most prompt and new tokens together; None without a limit but memory.
        admission: knows what the pool holds; given once there is one.
    """

    admission: Admission

    def __init__(self, fast: OptimizedModel, max_length: int | None, tokenizer: Any) -> None:
        self._fast, self._max_length, self._tokenizer = fast, max_length, tokenizer
        self.limit = min([x for x in (fast.max_positions, fast.restart_at, max_length) if x], default=None)

    def read(
        self, ids: Sequence[int] | Tensor, params: SamplingParams, id: str | None, cancel: Callable[[Job], None]
    ) -> Job:
        """A checked job.

        Raises:
            InputError: see `Engine.submit`.
        """
        prompt = read_prompt(ids, self._fast.vocab_size)
        terms = read_terms(params, prompt, self._fast, self._tokenizer)
        self._check_length(len(prompt), terms.new_tokens)
        seed = int(torch.randint(0, 1 << 62, ())) if params.seed is None else params.seed
        request = Request(id or f"request-{os.getpid()}-{next(_ids)}", prompt, params, lambda _: cancel(job))
        job = Job(request, terms, seed)
        job.claim = self.admission.claim(len(prompt), terms.new_tokens)
        return job

    def _check_length(self, prompt: int, new_tokens: int) -> None:
        whole = prompt + new_tokens
        if self.limit is not None and whole > self.limit:
            limits = {
                "positions of the model": self._fast.max_positions,
                "max_length of the engine": self._max_length,
                "tokens beyond which this model's rotary frequencies depend on the longest row of a batch": (
                    self._fast.restart_at
                ),
            }
            (why,) = [name for name, limit in limits.items() if limit == self.limit][:1]
            raise InputError(
                f"a prompt of {prompt} tokens and up to {new_tokens} new ones are {whole} tokens, and the limit is"
                f" {self.limit}, the {why}: shorten the prompt or lower max_new_tokens"
            )
        self.admission.check(prompt, new_tokens)


def merged(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    """`params` with the options of `submit` over them; what is no field of theirs is transformers' own."""
    own = {name: value for name, value in options.items() if name in SamplingParams.__dataclass_fields__}
    rest = {name: value for name, value in options.items() if name not in own}
    if rest:
        own["options"] = {**own.get("options", {}), **rest}
    return replace(params or SamplingParams(), **own)

"""`Engine`: many requests on one model, continuously batched over one page pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from torch import Tensor

from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.request import Completion, Request
from lethe_compile.serving.sampling import SamplingParams
from lethe_compile.serving.stats import EngineStats


class Engine:
    """Serves requests on an optimized model: rows join and leave between decode steps, prompts are run in chunks.

    One thread owns the model, from the first moment until `close`: `generate` on it is refused meanwhile. All methods
    may be called from any thread, and requests be consumed from threads and from asyncio. A context manager: leaving it
    drains, or aborts when an exception is under way.

    Args:
        fast: what `optimize` returned.
        max_batch: most requests that are decoded together.
        kv_memory: most memory of the cache, as in `optimize`; None: `fast.kv_memory`, else on a GPU 0.9 of what is free,
            on a CPU no limit.
        max_queue: most requests that wait; beyond that `submit` raises `EngineBusyError`. None: no limit.
        max_length: most prompt and new tokens of a request together; None: what model and memory allow.
        prefill_chunk: most prompt tokens that are run between two decode steps; None: 256 on a CPU, 2048 elsewhere.
        under_pressure: when pages run out, "prune" first prunes harder, down to the policy's floor, and preempts only
            then; "preempt" never prunes harder than the policy would alone.
        tokenizer: for `stop_strings`; nothing else needs it.

    Guarantees, in float32: greedy tokens of a request are those of ``fast.generate`` with the prompt alone, whatever its
    neighbours do, and drawn tokens those of the same `seed`; with pruning too, each request's rounds coming at its own
    steps. A preempted request is computed anew so that it goes on exactly as it would have. The one exception is a
    request that pressure has pruned harder (`RequestStats.pressed` above 0): with `under_pressure="preempt"` there is
    none.

    Raises:
        ConfigError: a setting that is not allowed; a policy that couples rows (`paper_literal`).
        UnsupportedGraphError: a model whose rows cannot be served apart; says why.
        InputError: the model is generating.
    """

    def __init__(
        self,
        fast: OptimizedModel,
        *,
        max_batch: int = 32,
        kv_memory: int | float | None = None,
        max_queue: int | None = None,
        max_length: int | None = None,
        prefill_chunk: int | None = None,
        under_pressure: Literal["prune", "preempt"] = "prune",
        tokenizer: Any = None,
    ) -> None:
        raise NotImplementedError

    def submit(
        self,
        ids: Sequence[int] | Tensor,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        **options: Any,
    ) -> Request:
        """Queue one prompt; returns at once. `options` are fields of `SamplingParams`, and override `params`.

        Raises:
            InputError: the prompt is empty, has ids outside the vocabulary, or is with its new tokens longer than the
                model, `max_length` or the pool allow; an option is unknown or cannot be honoured. Nothing was queued.
            EngineBusyError: `max_queue` requests wait already.
            EngineClosedError: the engine is closed, or has failed; in that case the cause is attached.
        """
        raise NotImplementedError

    def run(
        self,
        prompts: Iterable[Sequence[int] | Tensor | tuple[Sequence[int] | Tensor, SamplingParams]],
        params: SamplingParams | None = None,
        *,
        ordered: bool = True,
        progress: bool = True,
        **options: Any,
    ) -> Iterator[Completion]:
        """An offline batch of any size: results in the prompts' order, or as completed. Prompts may be a generator: no
        more of them are read ahead than a few batches. Closing the iterator cancels what is under way.

        Raises:
            LetheError: of the first request that fails, when its turn comes; the others are cancelled.
        """
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Figures of now; cheap, from any thread."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """Whether `submit` is refused: `drain` or `close` was called, or the engine has failed."""
        raise NotImplementedError

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, None while it is well."""
        raise NotImplementedError

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until all have ended; whether they did within `timeout` seconds."""
        raise NotImplementedError

    def close(self, *, abort: bool = False, timeout: float | None = None) -> None:
        """Drain, or with `abort` (and after `timeout` seconds of draining) cancel what is left; then end the thread and
        give the model back. May be called twice."""
        raise NotImplementedError

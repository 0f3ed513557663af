"""`Engine`: many requests on one model, continuously batched over one page pool."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from lethe_compile.errors import ConfigError, EngineBusyError, EngineClosedError, InputError
from lethe_compile.executor import Executor
from lethe_compile.memory import allowance, check_kv_memory
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.job import Job, read_prompt, read_terms
from lethe_compile.serving.loop import Loop
from lethe_compile.serving.request import Completion, Request
from lethe_compile.serving.sampling import SamplingParams
from lethe_compile.serving.stats import Counters, EngineStats, Times

_GPU_SHARE = 0.9  # of free memory, for the cache, where nobody says
_CHUNKS = {"cpu": 256}  # prompt tokens between two decode steps, by device
_CHUNK = 2048
_WIDTH = (
    4096  # tokens of a row that the page table has room for from the start; on a GPU another width is recorded anew
)
_AHEAD = 4  # batches that `run` reads ahead

Prompt = Sequence[int] | Tensor
_ids = itertools.count()


class Engine:
    """Serves requests on an optimized model: rows join and leave between decode steps, prompts are run in chunks.

    One thread owns the model, from the first moment until `close`: `generate` on it is refused meanwhile. All methods
    may be called from any thread, and requests be consumed from threads and from asyncio. A context manager: leaving it
    drains, or aborts when an exception is under way.

    Args:
        fast: what `optimize` returned.
        max_batch: most requests that are decoded together.
        kv_memory: most memory of the cache, as in `optimize`; None: `fast.kv_memory`, else on a GPU 0.9 of what is
            free, on a CPU no limit.
        max_queue: most requests that wait; beyond that `submit` raises `EngineBusyError`. None: no limit.
        max_length: most prompt and new tokens of a request together; None: what model and memory allow.
        prefill_chunk: most prompt tokens that are run between two decode steps; None: 256 on a CPU, 2048 elsewhere.
        under_pressure: when pages run out, "prune" first prunes harder, down to the policy's floor, and preempts only
            then; "preempt" never prunes harder than the policy would alone.
        tokenizer: for `stop_strings`; nothing else needs it.

    Guarantees, in float32: greedy tokens of a request are those of ``fast.generate`` with the prompt alone, whatever
    its neighbours do, and drawn tokens those of the same `seed`; with pruning too, each request's rounds coming at its
    own steps. A preempted request is computed anew so that it goes on exactly as it would have. The one exception is a
    request that pressure has pruned harder (`RequestStats.pressed` above 0): with `under_pressure="preempt"` there is
    none, unless a request does not fit even alone without.

    Models whose layers keep other state run their prompts whole; those with masks by content take steps row by row,
    since such a mask can depend on the longest row of a batch. Where rotary frequencies change with the length,
    requests beyond the first range are refused.

    Raises:
        ConfigError: a setting that is not allowed; a policy that couples rows (`paper_literal`); a model whose heads
            are split over ranks.
        InputError: the model is generating, or another engine's.
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
        numbers = {"max_batch": max_batch, "max_queue": max_queue, "max_length": max_length}
        for name, value in {**numbers, "prefill_chunk": prefill_chunk}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={value!r} is not allowed: must be an integer >= 1")
        if under_pressure not in ("prune", "preempt"):
            raise ConfigError(f"under_pressure={under_pressure!r} is not allowed: must be 'prune' or 'preempt'")
        check_kv_memory(kv_memory)
        if fast.ranks is not None:
            raise ConfigError(
                "an Engine cannot serve a tensor-parallel model: each rank would admit and preempt by itself, and ranks"
                " must take the same steps. Run one Engine for each GPU, or generate in batches"
            )
        self.fast, self.max_batch, self.max_length, self._max_queue = fast, max_batch, max_length, max_queue
        self._tokenizer = tokenizer
        self._limit = min([x for x in (fast.max_positions, fast.restart_at, max_length) if x], default=None)
        self._changed = threading.Condition()  # guards all below
        self._inbox: deque[Job] = deque()
        self._waiting = 0  # in the inbox, or not yet admitted
        self._closing = self._abort = False
        self._failure: BaseException | None = None
        self._counters, self._times = Counters(), Times()
        self._look: dict[str, Any] = {}
        executor = fast.lend("an Engine")
        try:
            self._loop = self._make_loop(executor, kv_memory, prefill_chunk, under_pressure == "prune")
            self._thread = threading.Thread(target=self._main, name="lethe-engine", daemon=True)
            self._ready = threading.Event()
            self._thread.start()
            self._ready.wait()
            if self._failure is not None:
                raise self._failure
        except BaseException:
            fast.take_back()
            raise

    def _make_loop(self, executor: Executor, kv_memory: int | float | None, chunk: int | None, prunes: bool) -> Loop:
        fast = self.fast
        if kv_memory is None:
            kv_memory = fast.kv_memory
        if kv_memory is None and fast.device.type == "cuda":
            kv_memory = _GPU_SHARE
        return Loop(
            fast,
            executor,
            max_batch=self.max_batch,
            max_bytes=allowance(kv_memory, fast.device, 0, None),
            longest=min(self._limit or _WIDTH, self.max_length or _WIDTH),
            prefill_chunk=chunk or _CHUNKS.get(fast.device.type, _CHUNK),
            prunes=prunes,
            counters=self._counters,
            times=self._times,
        )

    # --------------------------------------------------------------------------------------------------- requests

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
        params = replace(params or SamplingParams(), **_known(options))
        job = self._read(ids, params, id)
        with self._changed:
            if self._max_queue is not None and self._waiting >= self._max_queue:
                self._counters.refused += 1
                raise EngineBusyError(f"{self._waiting} requests wait already (max_queue): try again later")
            self._enter(job)
        return job.request

    def _read(self, ids: Prompt, params: SamplingParams, id: str | None) -> Job:
        """A checked job; nothing has happened yet."""
        try:
            prompt = read_prompt(ids, self.fast.vocab_size)
            terms = read_terms(params, prompt, self.fast, self._tokenizer)
            self._check_length(len(prompt), terms.new_tokens)
        except InputError:
            with self._changed:
                self._counters.refused += 1
            raise
        seed = int(torch.randint(0, 1 << 62, ())) if params.seed is None else params.seed
        request = Request(id or f"request-{os.getpid()}-{next(_ids)}", prompt, params, lambda _: self._cancel(job))
        job = Job(request, terms, seed)
        job.claim = self._loop.scheduler.admission.claim(len(prompt), terms.new_tokens)
        return job

    def _check_length(self, prompt: int, new_tokens: int) -> None:
        whole = prompt + new_tokens
        if self._limit is not None and whole > self._limit:
            limits = {
                "positions of the model": self.fast.max_positions,
                "max_length of the engine": self.max_length,
                "tokens beyond which this model's rotary frequencies depend on the longest row of a batch": (
                    self.fast.restart_at
                ),
            }
            (why,) = [name for name, limit in limits.items() if limit == self._limit][:1]
            raise InputError(
                f"a prompt of {prompt} tokens and up to {new_tokens} new ones are {whole} tokens, and the limit is"
                f" {self._limit}, the {why}: shorten the prompt or lower max_new_tokens"
            )
        self._loop.scheduler.admission.check(prompt, new_tokens)

    def _enter(self, job: Job) -> None:
        if self._failure is not None:
            raise EngineClosedError(f"the engine has failed: {self._failure}") from self._failure
        if self._closing:
            raise EngineClosedError("the engine is closed: it takes no requests any more")
        job.order = self._counters.submitted
        self._counters.submitted += 1
        self._waiting += 1
        self._inbox.append(job)
        self._changed.notify_all()

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        with self._changed:
            self._changed.notify_all()

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
        total = len(prompts) if isinstance(prompts, Sized) else None
        shared = replace(params or SamplingParams(), **_known(options))
        return self._run(iter(prompts), shared, ordered, progress, total)

    def _run(
        self, prompts: Iterator[Any], shared: SamplingParams, ordered: bool, progress: bool, total: int | None
    ) -> Iterator[Completion]:
        from tqdm import tqdm

        begun: dict[Request, None] = {}  # in order
        ended: queue.SimpleQueue[Request] = queue.SimpleQueue()
        bar = tqdm(total=total, unit=" requests", disable=not progress)

        def refill() -> None:
            for one in itertools.islice(prompts, _AHEAD * self.max_batch - len(begun)):
                ids, own = one if isinstance(one, tuple) and isinstance(one[-1], SamplingParams) else (one, shared)
                job = self._read(ids, own, None)
                with self._changed:
                    self._enter(job)
                begun[job.request] = None
                job.request.add_done_callback(ended.put)

        try:
            refill()
            while begun:
                request = next(iter(begun)) if ordered else ended.get()
                result = request.result()
                del begun[request]
                bar.update()
                refill()
                yield result
        finally:
            for request in begun:
                request.cancel()
            bar.close()

    # ------------------------------------------------------------------------------------------------------ figures

    def stats(self) -> EngineStats:
        """Figures of now; cheap, from any thread."""
        with self._changed:
            return EngineStats(
                queued=self._waiting,
                max_batch=self.max_batch,
                **self._look,
                **asdict(self._counters),
                **self._times.lists(),
            )

    def _observe(self) -> None:
        """What `stats` shows of what the thread has; called by it."""
        cache, scheduler = self._loop.batch.cache, self._loop.scheduler
        held, free = cache.pages
        with self._changed:
            self._waiting = len(self._inbox) + len(scheduler.waiting)
            self._look = {
                "running": len(scheduler.rows),
                "pages_used": held,
                "pages_free": free,
                "bytes_used": cache.bytes_in_use,
                "bytes_allowed": cache.max_bytes,
                "retained_tokens": int(cache.lengths.sum()),
            }

    # ----------------------------------------------------------------------------------------------------- the thread

    def _main(self) -> None:
        """The engine's thread: nothing else touches the model or its cache."""
        try:
            with ExitStack() as stack:
                if self.fast.device.type == "cuda":
                    stack.enter_context(torch.cuda.device(self.fast.device))
                stack.enter_context(torch.no_grad())
                self._loop.batch.warm_up()
                self._observe()
                self._ready.set()
                while self._take():
                    self._loop.admit()
                    self._observe()  # before anyone reads a token of a request that `stats` still counts as queued
                    self._loop.step()
                    self._observe()
                    self._loop.tell()
        except BaseException as error:
            self._failure = error
        finally:
            self._end()
            self._ready.set()

    def _take(self) -> bool:
        """New jobs into the queue; waits for some if there is nothing to do. False: the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._closing or not self._loop.idle)
            self._loop.scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
            if self._abort:
                for job in [*self._loop.scheduler.waiting, *self._loop.scheduler.rows]:
                    job.cancelled = True
            return not (self._closing and self._loop.idle)

    def _end(self) -> None:
        """However the thread ends, nobody is left waiting."""
        with self._changed:
            self._closing = True
            left = [*self._inbox, *self._loop.scheduler.waiting, *self._loop.scheduler.rows]
            self._inbox.clear()
        for job in left:
            error = EngineClosedError(f"the engine has failed: {self._failure!r}")
            error.__cause__ = self._failure
            self._loop.fail(job, error)
        self._loop.tell()
        self._loop.scheduler.waiting.clear()
        self._loop.scheduler.rows.clear()
        try:
            self._loop.batch.end()
            self._observe()
        finally:
            self.fast.take_back()
            with self._changed:
                self._changed.notify_all()

    # --------------------------------------------------------------------------------------------------------- ends

    @property
    def closed(self) -> bool:
        """Whether `submit` is refused: `drain` or `close` was called, or the engine has failed."""
        return self._closing or self._failure is not None

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, None while it is well."""
        return self._failure

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until all have ended; whether they did within `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self, *, abort: bool = False, timeout: float | None = None) -> None:
        """Drain, or with `abort` (and after `timeout` seconds of draining) cancel what is left; then end the thread and
        give the model back. May be called twice."""
        if not abort and self.drain(timeout):
            return
        with self._changed:
            self._closing = self._abort = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(abort=kind is not None)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `submit` as fields of `SamplingParams`; what is none of these is transformers' own."""
    own = {name: value for name, value in options.items() if name in SamplingParams.__dataclass_fields__}
    rest = {name: value for name, value in options.items() if name not in own}
    return {**own, "options": {**own.get("options", {}), **rest}} if rest else own

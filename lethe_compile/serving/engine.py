"""`Engine`: many requests on one model, continuously batched over one page pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal

from torch import Tensor

from lethe_compile.errors import ConfigError, EngineClosedError, InputError
from lethe_compile.executor import Executor
from lethe_compile.memory import allowance, check_kv_memory
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.driver import Driver
from lethe_compile.serving.intake import Intake, merged
from lethe_compile.serving.lockstep import Alone, lockstep_of
from lethe_compile.serving.loop import Loop
from lethe_compile.serving.offline import completions
from lethe_compile.serving.request import Completion, Request
from lethe_compile.serving.sampling import SamplingParams
from lethe_compile.serving.stats import Counters, EngineStats, Times

_GPU_SHARE = 0.9  # of free memory, for the cache, where nobody says
_CHUNKS = {"cpu": 256}  # prompt tokens between two decode steps, by device
_CHUNK = 2048
_WIDTH = 4096  # tokens of a row that the page table has room for at once; on a GPU another width is recorded anew
_AHEAD = 4  # batches that `run` reads ahead

Prompt = Sequence[int] | Tensor


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

    On the ranks of a tensor-parallel model, every rank makes its engine with the same arguments. Requests are submitted
    on rank 0, and the others follow it, step by step, until it closes; under ``torchrun --nproc-per-node 2 app.py``::

        fast = lethe.optimize(model, tp=lethe_compile.distributed.init())
        with lethe.Engine(fast, max_batch=64) as engine:
            if engine.leads:  # rank 0
                print(engine.submit(ids, max_new_tokens=4096).result().tokens)
        # the others wait here until rank 0 has left; `follow()` does so within

    Tokens are those of one rank. Logits processors and stop strings run on rank 0 alone. `kv_memory` is of each rank, a
    fraction the least of all. When a rank fails, the engines of all end with an error that names it, and the processes
    must be started anew.

    Raises:
        ConfigError: a setting that is not allowed; a policy that couples rows (`paper_literal`); ranks that were given
            different settings.
        InputError: the model is generating, or another engine's.
        LetheError: another rank failed.
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
        numbers = {"max_batch": max_batch, "max_length": max_length, "prefill_chunk": prefill_chunk}
        if fast.ranks is not None:
            facts = {**numbers, "kv_memory": kv_memory, "under_pressure": under_pressure}
            fast.ranks.same({f"the engine's {name}": value for name, value in facts.items()})
        for name, value in {**numbers, "max_queue": max_queue}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={value!r} is not allowed: must be an integer >= 1")
        if under_pressure not in ("prune", "preempt"):
            raise ConfigError(f"under_pressure={under_pressure!r} is not allowed: must be 'prune' or 'preempt'")
        check_kv_memory(kv_memory)
        self.fast, self.max_batch, self.max_length = fast, max_batch, max_length
        self._intake = Intake(fast, max_length, tokenizer)
        self._counters, self._times = Counters(), Times()
        executor = fast.lend("an Engine")
        try:
            ranks = lockstep_of(fast.ranks, fast.policy.per_head)
            max_bytes = fast.compiled.least(self._allowed(kv_memory))
            with fast.compiled.together("make an Engine"):
                self._loop = self._make_loop(ranks, executor, max_bytes, prefill_chunk, under_pressure == "prune")
            self._intake.admission = self._loop.scheduler.admission
            self._ranks, self._driver = ranks, Driver(self._loop, ranks, max_queue)
            self._driver.start()
        except BaseException:
            fast.take_back()
            raise

    def _allowed(self, kv_memory: int | float | None) -> int | None:
        """Bytes of the cache on this rank's device."""
        fast = self.fast
        if kv_memory is None:
            kv_memory = fast.kv_memory
        if kv_memory is None and fast.device.type == "cuda":
            kv_memory = _GPU_SHARE
        return allowance(kv_memory, fast.device, 0, None)

    def _make_loop(
        self, ranks: Alone, executor: Executor, max_bytes: int | None, chunk: int | None, prunes: bool
    ) -> Loop:
        fast = self.fast
        return Loop(
            fast,
            executor,
            max_batch=self.max_batch,
            max_bytes=max_bytes,
            longest=min(self._intake.limit or _WIDTH, self.max_length or _WIDTH),
            prefill_chunk=chunk or _CHUNKS.get(fast.device.type, _CHUNK),
            prunes=prunes,
            counters=self._counters,
            times=self._times,
            ranks=ranks,
        )

    @property
    def leads(self) -> bool:
        """Whether requests are submitted here: on rank 0, and where there is one rank alone."""
        return self._ranks.leads

    # --------------------------------------------------------------------------------------------------- requests

    def submit(
        self,
        ids: Prompt,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        **options: Any,
    ) -> Request:
        """Queue one prompt; returns at once. `options` are fields of `SamplingParams`, and override `params`.

        Raises:
            InputError: the prompt is empty, has ids outside the vocabulary, or is with its new tokens longer than the
                model, `max_length` or the pool allow; an option is unknown or cannot be honoured; this is not rank 0.
                Nothing was queued.
            EngineBusyError: `max_queue` requests wait already.
            EngineClosedError: the engine is closed, or has failed; in that case the cause is attached.
        """
        return self._submit(ids, merged(params, options), id, bounded=True)

    def _submit(self, ids: Prompt, params: SamplingParams, id: str | None = None, *, bounded: bool = False) -> Request:
        try:
            if not self.leads:
                raise InputError(f"{self._where} follows rank 0: submit requests there, and call follow() here")
            job = self._intake.read(ids, params, id, self._driver.cancel)
        except InputError:
            with self._driver.changed:
                self._counters.refused += 1
            raise
        self._driver.enter(job, bounded=bounded)
        return job.request

    def run(
        self,
        prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]],
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
        return completions(
            self._submit,
            iter(prompts),
            merged(params, options),
            ahead=_AHEAD * self.max_batch,
            ordered=ordered,
            progress=progress,
            total=len(prompts) if isinstance(prompts, Sized) else None,
        )

    def stats(self) -> EngineStats:
        """Figures of now; cheap, from any thread. On ranks other than 0, how requests ended is not known."""
        driver = self._driver
        with driver.changed:
            return EngineStats(
                queued=driver.waiting,
                max_batch=self.max_batch,
                **driver.look,
                **asdict(self._counters),
                **self._times.lists(),
            )

    # --------------------------------------------------------------------------------------------------------- ends

    @property
    def closed(self) -> bool:
        """Whether `submit` is refused: `drain` or `close` was called, or the engine has failed."""
        return self._driver.closing or self._driver.failure is not None

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread, None while it is well."""
        return self._driver.failure

    @property
    def _where(self) -> str:
        return "this process" if self.fast.ranks is None else f"rank {self.fast.ranks.rank}"

    def follow(self) -> None:
        """On ranks other than 0: take part in rank 0's steps until it closes its engine.

        Raises:
            InputError: this is rank 0, or one rank alone.
            EngineClosedError: the engine has failed, here or on the rank that it names; the cause is attached.
        """
        if self.leads:
            raise InputError(f"{self._where} has nobody to follow: submit requests here, and close the engine then")
        self._driver.join()
        if self.failure is not None:
            raise EngineClosedError(f"the engine has failed: {self.failure!r}") from self.failure

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until all have ended; whether they did within `timeout` seconds.

        On ranks other than 0: wait until rank 0 has closed its engine.
        """
        if self.leads:
            self._driver.end(abort=False)
        return self._driver.join(timeout)

    def close(self, *, abort: bool = False, timeout: float | None = None) -> None:
        """Drain, or with `abort` (and after `timeout` seconds of draining) cancel what is left; then end the thread and
        give the model back. May be called twice. On ranks other than 0 an abort is a failure, and ends all ranks."""
        if not abort and self.drain(timeout):
            return
        if self.leads:
            self._driver.end(abort=True)
        elif not self._driver.over.is_set():
            self._driver.leave(EngineClosedError(f"{self._where} has left the engine before rank 0 closed it"))
        self._driver.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None and not self.leads:
            self.follow()
        else:
            self.close(abort=kind is not None)

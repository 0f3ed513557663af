"""What the engine's thread does: chunks of prompts, decode steps, and reading back what they chose.

A step chooses the next token of every row on the device. On a GPU the host reads a step's tokens only after it has
launched the next one, in which a row that turns out to have ended takes no part.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lethe_compile.errors import InputError, LetheError
from lethe_compile.executor import Executor
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.batch import Batch
from lethe_compile.serving.job import Job, follower
from lethe_compile.serving.lockstep import Alone, Turn
from lethe_compile.serving.logprobs import Figures, figures_of, logprobs_of
from lethe_compile.serving.request import FinishReason
from lethe_compile.serving.sampler import Sampler, vectorised
from lethe_compile.serving.scheduler import Scheduler
from lethe_compile.serving.stats import Counters, RequestStats, Times
from lethe_compile.transfers import Fetched, sent


@dataclass(frozen=True)
class Sent:
    """A step's outcome on its way to the host."""

    jobs: list[tuple[int, Job, bool]]  # column, job, and whether its token is news
    packed: Fetched  # [3, B]: tokens, whether scores were sound, whether a stop token came
    logprobs: dict[int, Figures]  # by column


class Loop:
    """The steps of an engine; see `Engine` for the settings. The engine's thread's alone."""

    def __init__(
        self,
        fast: OptimizedModel,
        executor: Executor,
        *,
        max_batch: int,
        max_bytes: int | None,
        longest: int,
        prefill_chunk: int,
        prunes: bool,
        counters: Counters,
        times: Times,
        ranks: Alone | None = None,
    ) -> None:
        self.fast, self.counters, self.times = fast, counters, times
        self._ranks = ranks or Alone()
        self.batch = Batch(fast, executor, max_batch, max_bytes, longest, self._ranks)
        flush, fail = self.flush, self.fail
        self._overlap = fast.device.type == "cuda"
        self.scheduler = Scheduler(
            fast, self.batch, counters, times, prunes=prunes, waits=lambda: not self._overlap, flush=flush, fail=fail
        )
        self._chunk, self._alone = prefill_chunk, fast.needs_content
        self._whole = bool(fast.stateful) or self._alone
        self._sampler = Sampler(fast.vocab_size, fast.device)
        self._sent: deque[Sent] = deque()
        self._ended: deque[tuple[Job, FinishReason, RequestStats, BaseException | None]] = deque()
        self._stops = torch.zeros(0, 1, dtype=torch.int64, device=fast.device)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until someone submits."""
        return not (self.scheduler.waiting or self.scheduler.rows or self._sent)

    @property
    def jobs(self) -> list[Job]:
        """Those under way and those that wait."""
        return [*self.scheduler.rows, *self.scheduler.waiting]

    def state(self) -> list[int]:
        """Numbers that are alike on all ranks before a step."""
        batch = self.batch
        steps = np.concatenate([batch.fed[: batch.used], batch.until_round[: batch.used]])
        return [len(self._sent), batch.used, *(job.order for job in self.jobs), *steps.tolist()]

    def take(self, turn: Turn) -> None:
        """New jobs, of which this rank knows no more than all do."""
        for one in turn.arrivals:
            job = follower(one)
            job.claim = self.scheduler.admission.claim(len(one.prompt), one.new_tokens)
            self.scheduler.waiting.append(job)

    def ending(self) -> list[int]:
        """Orders of jobs that end before the next step, by what this rank alone knows."""
        return [job.order for job in self.jobs if job.cancelled or job.verdict is not None]

    def admit(self, ending: Collection[int] | None = None) -> None:
        """End the jobs of these orders (of `ending` where none are given), and give rows to those who wait."""
        scheduler = self.scheduler
        orders = set(self.ending() if ending is None else ending)
        for job in self.jobs:
            if job.order in orders:
                self.finish(job, "cancelled")
        scheduler.sweep()
        scheduler.admit()

    @torch.no_grad()
    def step(self) -> None:
        """Run some prompt tokens and one token of every row, and deliver what has come."""
        scheduler = self.scheduler
        self._prefill()
        if scheduler.prepare():
            self._decode()
        self._read(behind=1 if self._overlap and self.batch.live.any() else 0)
        scheduler.settle()
        scheduler.sweep()

    def tell(self) -> None:
        """Let those know whose requests have ended; by then their pages are free."""
        while self._ended:
            job, reason, stats, error = self._ended.popleft()
            job.request._end(reason, stats, error)

    # ------------------------------------------------------------------------------------------------------ prompts

    def _prefill(self) -> None:
        budget = self._chunk
        while budget > 0:
            row = next((job.row for job in self.scheduler.rows if job.filled < len(job.source)), None)
            if row is None:
                return
            jobs = self._together(row, budget)
            budget -= self._run_prompts(row, jobs, budget)

    def _together(self, row: int, budget: int) -> list[Job]:
        """Jobs from `row` on that are run at once: several only if all begin, and end within the budget."""
        jobs = [self.scheduler.rows[row]]
        longest = len(jobs[0].source)
        if self._alone or jobs[0].filled or longest > budget or self.batch.observed_from(longest):
            return jobs
        for job in self.scheduler.rows[row + 1 :]:
            longest = max(longest, len(job.source))
            if job.filled or longest * (len(jobs) + 1) > budget:
                break
            jobs.append(job)
        return jobs

    def _run_prompts(self, row: int, jobs: list[Job], budget: int) -> int:
        """One run of the model over prompt tokens; returns how many."""
        job = jobs[0]
        count = len(job.source) - job.filled
        split = self.batch.observed_from(len(job.source))
        if split and job.filled < split:
            count = split - job.filled
        elif split and job.filled == split:
            self.batch.forget_scores(row)
        if len(jobs) == 1 and not self._whole:
            count = min(count, budget)
        lengths = np.array([count if len(jobs) == 1 else len(one.source) for one in jobs], np.int64)
        ids = np.zeros((len(jobs), int(lengths.max())), np.int64)
        for line, (one, length) in enumerate(zip(jobs, lengths.tolist(), strict=True)):
            ids[line, :length] = one.source[one.filled : one.filled + length]
            one.filled += length
        ends = job.filled == len(job.source)
        logits = self.batch.prefill(row, ids, lengths, ends)
        self.counters.prompt_tokens += int(lengths.sum())
        if logits is not None:
            for one in jobs:
                self._prepare_ids(one)
            self._choose(row, jobs, logits)
        return ids.size

    def _prepare_ids(self, job: Job) -> None:
        """Its text on the device, for processors that read it."""
        if vectorised(job):
            return
        text = torch.tensor([job.text], device=self.fast.device)
        job.ids = torch.nn.functional.pad(text, (0, job.prompt + job.terms.new_tokens - text.shape[1]))
        if job.processors is None:
            job.processors = job.terms.processors_on(text[:, : job.prompt], self.fast.vocab_size)

    # -------------------------------------------------------------------------------------------------------- steps

    def _decode(self) -> None:
        live = self.batch.live[: self.batch.used].copy()
        logits = self.batch.decode()[: self.batch.used]
        jobs = [job if on else None for job, on in zip(self.scheduler.rows, live.tolist(), strict=True)]
        self.counters.steps += 1
        self.counters.step_rows += int(live.sum())
        self._choose(0, jobs, logits)

    def _choose(self, first: int, jobs: list[Job | None] | list[Job], logits: Tensor) -> None:
        """Choose the next token of rows from the `first` on, by logits [B, V], and send it to the host."""
        at = slice(first, first + len(jobs))
        tokens, sound = self._sampler.choose(logits, jobs)
        for job, error in self._sampler.failed:
            job.verdict = ("error", error)
        self._sampler.failed.clear()
        stopped = (tokens[:, None] == self._stop_ids()[at]).any(1)
        tokens, sound, stopped = self._ranks.from_first(tokens, sound, stopped)
        news = [(column, job, not job.forcing) for column, job in enumerate(jobs) if job is not None]
        logprobs = {
            column: logprobs_of(logits[column], tokens[column], job.request.params.logprobs)
            for column, job, new in news
            if new and job.request.params.logprobs is not None
        }
        self.batch.tokens[at] = tokens
        for column, job, _ in news:
            if job.ids is not None:
                job.ids[0, len(job.source) + job.chosen] = tokens[column]
            job.chosen += 1
            self._go_on(first + column, job)
        self.batch.active[at].logical_and_(~stopped)
        packed = Fetched(torch.stack([tokens, sound.long(), stopped.long()]))
        self._sent.append(Sent(news, packed, logprobs))

    def _go_on(self, row: int, job: Job) -> None:
        """After its newest token: begin decoding it, or end that after its last one."""
        left = job.prompt + job.terms.new_tokens - len(job.source) - job.chosen
        if job.chosen == 1 and left:
            self.batch.start(row, left)
        elif not left:
            self.batch.stop(row)

    def _stop_ids(self) -> Tensor:
        """[size, K] ids that end each row, -1 where there are fewer."""
        if self.scheduler.changed:
            rows = self.scheduler.rows
            ids = np.full((self.batch.size, max([1, *(len(job.terms.stops) for job in rows)])), -1, np.int64)
            for row, job in enumerate(rows):
                ids[row, : len(job.terms.stops)] = job.terms.stops
            self._stops, self.scheduler.changed = sent(ids, self.fast.device), False
        return self._stops

    # ------------------------------------------------------------------------------------------------ reading back

    def flush(self) -> None:
        """Read everything that is on its way."""
        self._read(behind=0)

    def _read(self, behind: int) -> None:
        while len(self._sent) > behind:
            step = self._sent.popleft()
            tokens, sound, stopped = step.packed.wait().tolist()
            for column, job, new in step.jobs:
                if new and not job.ended:
                    figures = step.logprobs.get(column)
                    self._deliver(job, tokens[column], bool(sound[column]), bool(stopped[column]), figures)

    def _deliver(self, job: Job, token: int, sound: bool, stopped: bool, figures: Figures | None) -> None:
        if not sound:
            self.fail(job, _broken(job))
            return
        now = time.monotonic()
        job.text.append(token)
        self.counters.generated_tokens += 1
        if job.first is None:
            job.first = now
            self.times.ttft.append(now - job.submitted)
        job.last = now
        if job.verdict is None:
            job.request._advance(stats=job.stats())
            job.request._deliver(token, None if figures is None else figures_of(token, figures))
            if self._criteria(job):
                job.verdict = ("stop", None)
        if stopped:
            self.finish(job, "stop")
        elif job.generated == job.terms.new_tokens:
            self.finish(job, "length")

    def _criteria(self, job: Job) -> bool:
        if not job.terms.criteria or job.ended:
            return False
        ids = torch.tensor([job.text])
        return any(bool(one(ids, None)) for one in job.terms.criteria)

    # ------------------------------------------------------------------------------------------------------- ends

    def finish(self, job: Job, reason: FinishReason) -> None:
        """Its end, to be told when its row is free; a verdict that this rank has on it goes before the `reason`."""
        reason, error = job.verdict or (reason, None)
        if error is not None:
            self.fail(job, error)
            return
        now = time.monotonic()
        job.ended = True
        stats = job.stats(now)
        if reason == "cancelled":
            self.counters.cancelled += 1
        else:
            self.counters.finished += 1
            self.times.end_to_end.append(now - job.submitted)
            if stats.per_token is not None:
                self.times.tpot.append(stats.per_token)
        self._ended.append((job, reason, stats, None))

    def fail(self, job: Job, error: BaseException) -> None:
        """Its end by an error of its own; the others go on."""
        if not job.ended:
            job.ended = True
            self.counters.failed += 1
            self._ended.append((job, "error", job.stats(time.monotonic()), error))


def _broken(job: Job) -> LetheError:
    step = job.generated + 1
    if len(job.terms.processors):
        return InputError(
            f"request {job.request.id}, token {step}: no token can be chosen from its scores; loosen its logits"
            " processors, or look for NaN in the model"
        )
    return LetheError(
        f"request {job.request.id}, token {step}: the model's logits are not finite. Look for NaN in its weights, and"
        " for overflow if it runs in float16"
    )

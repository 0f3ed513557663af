"""Which request has which row: admission, rounds, and what happens when pages run out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from lethe_compile.errors import OutOfPagesError
from lethe_compile.ledger import Counts
from lethe_compile.runtime import OptimizedModel
from lethe_compile.serving.admission import Admission
from lethe_compile.serving.batch import Batch, Evicted
from lethe_compile.serving.job import Job
from lethe_compile.serving.stats import Counters, Times


class Scheduler:
    """Waiting jobs in order, and running ones by row. The engine's thread's alone.

    Args:
        prunes: whether pressure prunes rows harder before it preempts one.
        waits: whether a round is waited for at once.
        flush: reads back what is on its way from the device; jobs may end by it.
        fail: ends a job with an error.
    """

    def __init__(
        self,
        fast: OptimizedModel,
        batch: Batch,
        counters: Counters,
        times: Times,
        *,
        prunes: bool,
        waits: Callable[[], bool],
        flush: Callable[[], None],
        fail: Callable[[Job, Exception], None],
    ) -> None:
        self.batch, self.counters, self.times = batch, counters, times
        self.admission = Admission(fast, batch)
        self.waiting: deque[Job] = deque()
        self.rows: list[Job] = []
        self.changed = True  # whether rows joined, left or moved since someone looked
        self._lossless = fast.policy.name == "full"
        self._prunes, self._waits, self._flush, self._fail = prunes, waits, flush, fail

    # -------------------------------------------------------------------------------------------------- membership

    def admit(self) -> None:
        """Give rows to those who wait, in their order, for as long as there is room."""
        while self.waiting and self.batch.used < self.batch.size:
            job = self.waiting[0]
            fits = self.admission.fits(job, self.rows, self.batch.needs(self._prompts()))
            if not self.batch.ranks.agreed(fits):
                return
            job.row = self.batch.join(job.prompt)
            self.rows.append(job)
            self.changed = True
            try:
                self.batch.reserve(self._prompts())
            except OutOfPagesError as error:  # pages are too scattered, or the device has less than it said
                self._vacate(job)
                if not self.rows:
                    self.waiting.popleft()
                    self._fail(job, error)
                    continue
                return
            self.waiting.popleft()
            now = time.monotonic()
            if job.admitted is None:
                job.admitted = now
                self.times.queue_time.append(now - job.submitted)
            job.request._advance("running", job.stats())

    def sweep(self) -> None:
        """Free the rows of jobs that have ended, and forget those that ended while they waited."""
        for job in [job for job in self.rows if job.ended]:
            self._vacate(job)
        if any(job.ended for job in self.waiting):
            self.waiting = deque(job for job in self.waiting if not job.ended)

    def _vacate(self, job: Job) -> None:
        assert job.row is not None
        last = self.batch.leave(job.row)
        moved = self.rows.pop(last)
        if moved is not job:
            self.rows[job.row], moved.row = moved, job.row
        job.row, self.changed = None, True

    def _prompts(self) -> Counts:
        """[used] tokens that each row's prefill has yet to bring."""
        return np.array([len(job.source) - job.filled for job in self.rows], np.int64)

    # ------------------------------------------------------------------------------------------------------ rounds

    def prepare(self) -> bool:
        """Rounds that are due, and pages for the next step; False if no row is left to be decoded."""
        due = self.batch.due()
        if due:
            self._round(due, None)
        self._reserve()
        return bool(self.batch.live.any())

    def _round(self, rows: list[int], limit: int | None) -> None:
        self._count(self.batch.round(rows, limit, wait=limit is not None or self._waits()))
        if limit is not None:
            self.counters.pressed += len(rows)
            for row in rows:
                self.rows[row].pressed += 1

    def settle(self) -> None:
        """Take over what rounds did that were not waited for."""
        self._count(self.batch.settle())

    def _count(self, evicted: Sequence[Evicted]) -> None:
        for one in evicted:
            if one.tokens:
                self.rows[one.row].rounds += 1
                self.counters.rounds += 1

    def _reserve(self) -> None:
        """Pages for every row until its next round: pruning harder, then preempting, where there are too few."""
        pruned = False
        while self.rows:
            try:
                self.batch.reserve(self._prompts())
            except OutOfPagesError as error:
                if self.batch.unsettled:
                    self.settle()
                    continue
                self.batch.cache.trim()
                self._flush()
                if any(job.ended for job in self.rows):
                    self.sweep()
                elif self._may_prune() and not pruned and self._press():
                    pruned = True
                elif len(self.rows) > 1:
                    self._preempt(max(self.rows, key=lambda job: job.order))
                    pruned = False
                else:  # alone, and admitted: only a device that has less memory than it said comes here
                    self._fail(self.rows[0], error)
                    self.sweep()
            else:
                break
        for job, retained in zip(self.rows, self.batch.retained().tolist(), strict=False):
            job.retained_peak = max(job.retained_peak, retained)

    def _may_prune(self) -> bool:
        return self._prunes or len(self.rows) == 1  # alone, `generate` prunes harder, too

    def _press(self) -> bool:
        """Prune rows down to what lets all go on, if that is not below the floor; whether it was done."""
        batch, floor = self.batch, self.admission.floor if len(self.rows) > 1 else self.admission.hard_floor
        fixed = np.repeat(~batch.live, len(batch.cache.lengths[0]) // batch.size)
        try:
            limit = batch.cache.limit(batch.needs(self._prompts()), fixed)
        except OutOfPagesError:
            limit = 0
        # Another rank's device may have less, and its heads rows that are longer.
        limit, *others = batch.ranks.fewest(np.array([limit, *-batch.longest()])).tolist()
        longest = [-least for least in others]
        rows = [row for row in range(batch.used) if batch.live[row] and longest[row] > limit]
        if limit < floor or not rows:  # a floor is 1 at least
            return False
        self._round(rows, limit)
        return True

    def _preempt(self, job: Job) -> None:
        """Take its pages; it waits in front, and is then computed anew.

        Where nothing is evicted, all its text is prefilled at once. Where tokens are evicted, that would need more
        pages than it had, and keep others: its prompt is prefilled, and its own tokens are fed step by step, so that
        every round comes where it came, and what it writes afterwards is what it would have written.
        """
        job.wants = self.batch.cache.lengths[:, self.batch.rows_of(job.row or 0)] + self.batch.interval
        at_once = self._lossless and job.generated > 0 and self.admission.holds(len(job.text) + self.batch.interval)
        source = job.text[:-1] if at_once else list(job.request.prompt)
        self.counters.recomputed_tokens += job.filled + job.chosen
        job.source, job.forced = np.asarray(source, np.int64), tuple(job.text[len(source) :])
        job.filled = job.chosen = 0
        job.preemptions += 1
        self.counters.preemptions += 1
        self._vacate(job)
        job.request._advance("queued", job.stats())
        self.waiting.appendleft(job)

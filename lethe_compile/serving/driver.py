"""The thread of an engine, which owns the model, and what other threads say to it."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import ExitStack
from typing import Any

import torch

from lethe_compile.errors import EngineBusyError, EngineClosedError
from lethe_compile.serving.job import Job
from lethe_compile.serving.lockstep import Alone, Arrival, Turn
from lethe_compile.serving.loop import Loop

_GRACE = 2.0  # seconds that the thread has to notice another rank's failure


class Driver:
    """Runs a `Loop` in a thread of its own, from `start` until `end`.

    Args:
        max_queue: see `Engine`.
        ranks: keeps the engines of several ranks in step. On ranks other than 0 nothing is entered.

    Attributes:
        changed: guards what other threads say and see: all below.
        failure: what ended the thread, None while it is well.
        closing: whether nothing is entered any more.
        waiting: requests that are not admitted yet.
        look: figures of the loop, for `Engine.stats`.
        over: set once nobody waits for the thread any more.
    """

    def __init__(self, loop: Loop, ranks: Alone, max_queue: int | None) -> None:
        self._loop, self._ranks, self._max_queue = loop, ranks, max_queue
        self.changed = threading.Condition()
        self._inbox: deque[Job] = deque()
        self.waiting, self.look = 0, dict[str, Any]()
        self.closing = self._abort = self._left = False
        self.failure: BaseException | None = None
        self.over, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._main, name="lethe-engine", daemon=True)

    def start(self) -> None:
        """Returns once the loop is warm; raises what kept it from that."""
        self._ranks.watch(self._lost)
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    # --------------------------------------------------------------------------------------------- other threads

    def enter(self, job: Job, *, bounded: bool) -> None:
        """Queue a job. Raises as `Engine.submit`; `EngineBusyError` only if the queue is `bounded`."""
        counters = self._loop.counters
        with self.changed:
            if bounded and self._max_queue is not None and self.waiting >= self._max_queue:
                counters.refused += 1
                raise EngineBusyError(f"{self.waiting} requests wait already (max_queue): try again later")
            if self.failure is not None:
                raise EngineClosedError(f"the engine has failed: {self.failure}") from self.failure
            if self.closing:
                raise EngineClosedError("the engine is closed: it takes no requests any more")
            job.order = counters.submitted
            counters.submitted += 1
            self.waiting += 1
            self._inbox.append(job)
            self.changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End it before the next step."""
        job.cancelled = True
        with self.changed:
            self.changed.notify_all()

    def end(self, *, abort: bool) -> None:
        """Take nothing more, and stop when all has ended; with `abort`, cancel what is left."""
        with self.changed:
            self.closing, self._abort = True, self._abort or abort
            self.changed.notify_all()

    def leave(self, error: BaseException) -> None:
        """End the engines of all ranks by an `error` on this one, which does not lead them."""
        self._lost(self._ranks.fail(error))

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has stopped; whether it did."""
        if not self.over.wait(timeout):
            return False
        if not self._left:
            self._thread.join()
        return True

    # ------------------------------------------------------------------------------------------------ the thread

    def _main(self) -> None:
        """Nothing else touches the model or its cache."""
        loop = self._loop
        try:
            with ExitStack() as stack:
                if loop.batch.device.type == "cuda":
                    stack.enter_context(torch.cuda.device(loop.batch.device))
                stack.enter_context(torch.no_grad())
                loop.batch.warm_up()
                self._ranks.everywhere(True)  # whoever is ready waits for the others
                self._observe()
                self._ready.set()
                while (turn := self._turn()).goes_on:
                    loop.admit(turn.ending)
                    if turn.ending or loop.scheduler.changed:
                        self._observe()  # before anyone reads a token of a request that `stats` still counts as queued
                    loop.tell()
                    loop.step()
                    self._observe()
                    loop.tell()
                self._ranks.close()
        except BaseException as error:
            if self.failure is None:
                self.failure = self._ranks.fail(error)
        finally:
            try:
                self._end()
            finally:
                self._ready.set()
                self.over.set()

    def _turn(self) -> Turn:
        """What all ranks do next; waits until there is something to do."""
        state = self._loop.state() if self._ranks.size > 1 else []
        turn = self._ranks.turn(self._next() if self._ranks.leads else None, state)
        if not self._ranks.leads:
            self._loop.take(turn)
        return turn

    def _next(self) -> Turn:
        loop = self._loop
        with self.changed:
            self.changed.wait_for(
                lambda: self._inbox or self.closing or not loop.idle or self.failure, self._ranks.patience
            )
            if self.failure is not None:
                raise self.failure
            fresh = list(self._inbox)
            self._inbox.clear()
            goes_on = bool(fresh) or not (self.closing and loop.idle)
            loop.scheduler.waiting.extend(fresh)
            ending = [job.order for job in loop.jobs] if self._abort else loop.ending()
        arrivals = tuple(Arrival(job.order, job.request.prompt, job.terms.new_tokens) for job in fresh)
        return Turn(arrivals, tuple(ending), goes_on)

    def _observe(self) -> None:
        """What `stats` shows of what the thread has."""
        cache, scheduler = self._loop.batch.cache, self._loop.scheduler
        held, free = cache.pages
        with self.changed:
            self.waiting = len(self._inbox) + len(scheduler.waiting)
            self.look = {
                "running": len(scheduler.rows),
                "pages_used": held,
                "pages_free": free,
                "bytes_used": cache.bytes_in_use,
                "bytes_allowed": cache.max_bytes,
                "retained_tokens": int(cache.lengths.sum()),
            }

    def _end(self) -> None:
        """However the thread ends, nobody is left waiting."""
        loop = self._loop
        self._refuse()
        loop.scheduler.waiting.clear()
        loop.scheduler.rows.clear()
        try:
            loop.batch.end()
            self._observe()
        finally:
            loop.fast.take_back()
            with self.changed:
                self.changed.notify_all()

    def _refuse(self) -> None:
        """Fail whatever has not ended."""
        loop = self._loop
        with self.changed:
            self.closing = True
            left = [*self._inbox, *loop.jobs]
            self._inbox.clear()
        for job in left:
            error = EngineClosedError(f"the engine has failed: {self.failure!r}")
            error.__cause__ = self.failure
            loop.fail(job, error)
        loop.tell()

    def _lost(self, error: BaseException) -> None:
        """Another rank has failed, and this one's thread may wait for it in vain: then it is left behind."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()
        self._ranks.abort(str(error))
        self._thread.join(_GRACE)
        if self._thread.is_alive():
            self._left = True
            self._refuse()
        self._ready.set()
        self.over.set()

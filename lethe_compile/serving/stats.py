"""Figures of an engine and of its requests, for a service's metrics and for a bench."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

_KEPT = 1 << 16  # raw times kept of each kind: the newest


@dataclass(frozen=True)
class RequestStats:
    """Times of one request, in seconds, and what the cache did for it. Times that have not come are None.

    Attributes:
        queued: from `submit` to the first admission.
        first_token: from `submit` to the first token (TTFT).
        per_token: mean time of each token after the first (TPOT); None with fewer than two.
        total: from `submit` to the end.
        rounds: rounds that evicted something, those for lack of pages among them.
        pressed: rounds that pruned it harder for lack of pages. With 0, its greedy tokens are those it writes alone.
        preemptions: how often it lost its pages and was computed anew.
        retained_peak: most tokens that its layers held together, as the host bounds them.
    """

    queued: float | None = None
    first_token: float | None = None
    per_token: float | None = None
    total: float | None = None
    rounds: int = 0
    pressed: int = 0
    preemptions: int = 0
    retained_peak: int = 0


@dataclass(frozen=True)
class EngineStats:
    """One look at an engine. Counters only grow; all others are of now.

    Attributes:
        queued: requests that wait for admission; `running`: rows that are prefilled or decoded now.
        max_batch: most rows at a time.
        pages_used, pages_free: pages of the pool that sequences hold, those reserved for the next steps among them, and
            the others: of what `kv_memory` allows, or where there is no limit, of what is allocated.
        bytes_used, bytes_allowed: keys and values of those pages; the limit, None without one.
        retained_tokens: tokens in the caches of all layers and rows together, as the host bounds them.
        submitted, finished, cancelled, failed, preemptions: requests, counted. `refused` ones raised at `submit`.
        rounds, pressed: row rounds that evicted something; of these, those that came for lack of pages.
        prompt_tokens, generated_tokens: tokens prefilled (recomputation included), and tokens delivered.
        steps: decode steps; `step_rows`: rows that took part, added up: their quotient is the mean batch.
        recomputed_tokens: tokens run again after preemptions.
        ttft, tpot, queue_time, end_to_end: the newest raw times in seconds, one for each request that got there; `tpot`
            is a request's mean after its first token.
    """

    queued: int
    running: int
    max_batch: int
    pages_used: int
    pages_free: int
    bytes_used: int
    bytes_allowed: int | None
    retained_tokens: int
    submitted: int
    refused: int
    finished: int
    cancelled: int
    failed: int
    preemptions: int
    rounds: int
    pressed: int
    prompt_tokens: int
    generated_tokens: int
    recomputed_tokens: int
    steps: int
    step_rows: int
    ttft: list[float] = field(repr=False)
    tpot: list[float] = field(repr=False)
    queue_time: list[float] = field(repr=False)
    end_to_end: list[float] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class Counters:
    """What an engine counts; written by its thread alone, but for `submitted` and `refused`."""

    submitted: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preemptions: int = 0
    rounds: int = 0
    pressed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    step_rows: int = 0


class Times:
    """The newest raw times of each kind."""

    def __init__(self) -> None:
        self.ttft, self.tpot, self.queue_time, self.end_to_end = (deque[float](maxlen=_KEPT) for _ in range(4))

    def lists(self) -> dict[str, Any]:
        """By name, as `EngineStats` has them."""
        return {name: list(values) for name, values in vars(self).items()}

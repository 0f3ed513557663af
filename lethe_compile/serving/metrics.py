"""Prometheus metrics of the service: of HTTP, of requests, and of every engine behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600, 1800)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# Figures of `EngineStats` by kind: name -> help.
_GAUGES = {
    "queued": "Requests that wait for admission.",
    "running": "Rows of the batch that are prefilled or decoded now.",
    "max_batch": "Most rows at a time.",
    "pages_used": "Pages of the pool that sequences hold.",
    "pages_free": "Pages of the pool that are free.",
    "bytes_used": "Bytes of keys and values in pages that are held.",
    "bytes_allowed": "Most bytes that the cache may take; absent without a limit.",
    "retained_tokens": "Tokens in the caches of all layers and rows together.",
}
_COUNTERS = {
    "submitted": "Requests accepted by an engine.",
    "refused": "Requests that an engine refused.",
    "finished": "Requests that ended by themselves.",
    "cancelled": "Requests that were cancelled.",
    "failed": "Requests that ended with an error.",
    "preemptions": "Times a request lost its pages and was computed anew.",
    "rounds": "Rounds of eviction that evicted something.",
    "pressed": "Rounds that came for lack of pages.",
    "prompt_tokens": "Tokens prefilled, recomputation included.",
    "generated_tokens": "Tokens delivered.",
    "recomputed_tokens": "Tokens run again after preemptions.",
    "steps": "Decode steps.",
    "step_rows": "Rows that took part in decode steps, added up.",
}


class _Engines(Collector):
    """The figures of the engines at the time of the scrape."""

    def __init__(self) -> None:
        self.figures: Mapping[str, Mapping[str, Any]] = {}
        self.retries = self.waiting = 0

    def collect(self) -> Iterable[Metric]:
        text = "Requests run again because their replica was lost."
        yield CounterMetricFamily("lethe_retries", text, value=self.retries)
        text = "Requests that wait for a replica, before any engine has them."
        yield GaugeMetricFamily("lethe_waiting", text, value=self.waiting)
        kinds: tuple[tuple[Mapping[str, str], type[GaugeMetricFamily] | type[CounterMetricFamily]], ...]
        kinds = ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily))
        for names, family_of in kinds:
            for name, text in names.items():
                family = family_of(f"lethe_engine_{name}", text, labels=["replica"])
                for replica, figures in self.figures.items():
                    if figures[name] is not None:
                        family.add_metric([replica], figures[name])
                yield family


class Metrics:
    """All metrics of one service, in a registry of their own.

    Attributes:
        http: requests by path and status.
        active: calls that are being answered.
        first_token, per_token, queue_time, end_to_end: histograms in seconds, one value a sequence; `per_token` is its
            mean time after the first token.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = self.registry
        self.http = Counter("lethe_http_requests", "HTTP requests answered.", ["path", "status"], registry=kept)
        self.active = Gauge("lethe_http_active", "Calls that are being answered.", registry=kept)
        self.first_token = self._histogram("first_token", "From a request's arrival to its first token.", _SECONDS)
        self.per_token = self._histogram("per_token", "Mean of a request's tokens after the first.", _TOKEN_SECONDS)
        self.queue_time = self._histogram("queue_time", "From submission to admission.", _SECONDS)
        self.end_to_end = self._histogram("end_to_end", "From a request's arrival to its last token.", _SECONDS)
        self._engines = _Engines()
        self.registry.register(self._engines)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lethe_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def exposition(self, figures: Mapping[str, Mapping[str, Any]], retries: int, waiting: int) -> bytes:
        """Prometheus' text format, with `figures` by replica (`EngineStats`), and what a `Source` counts."""
        self._engines.figures, self._engines.retries, self._engines.waiting = figures, retries, waiting
        return generate_latest(self.registry)

"""Continuous batching: many requests on one optimized model and one page pool; see `Engine`."""

from __future__ import annotations

from lethe_compile.serving.engine import Engine
from lethe_compile.serving.request import Completion, Request, TokenLogprobs
from lethe_compile.serving.sampling import SamplingParams
from lethe_compile.serving.stats import EngineStats, RequestStats

__all__ = ["Completion", "Engine", "EngineStats", "Request", "RequestStats", "SamplingParams", "TokenLogprobs"]

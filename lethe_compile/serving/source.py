"""Where tokens come from: what the HTTP service asks of an engine in this process, or of replicas elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lethe_compile.errors import EngineClosedError
from lethe_compile.runtime import OptimizedModel
from lethe_compile.sampling import token_ids
from lethe_compile.serving.engine import Engine
from lethe_compile.serving.request import FinishReason, Request, TokenLogprobs
from lethe_compile.serving.sampling import SamplingParams
from lethe_compile.serving.stats import RequestStats

RAW_TIMES = ("ttft", "tpot", "queue_time", "end_to_end")  # of `EngineStats`; the service has histograms of its own


@dataclass(frozen=True)
class Chunk:
    """Tokens that came, or with `finish_reason` the end."""

    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()  # one a token where they were asked for
    finish_reason: FinishReason | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What a service must know of a model to check requests.

    Attributes:
        limit: most tokens of prompt and text together, None without one.
        eos: ids that end a text unless `ignore_eos`.
    """

    vocab_size: int
    limit: int | None
    eos: tuple[int, ...]


class Stream(Protocol):
    """The chunks of one accepted request. Whoever stops reading before the end must `aclose` it: that cancels it."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    async def aclose(self) -> None: ...


class Source(Protocol):
    """An engine, or many. `submit` returns once the request is accepted, and raises what `Engine.submit` does."""

    facts: ModelFacts
    retries: int  # requests that were run again because their replica was lost
    waiting: int  # requests that wait for a replica; those that wait within an engine are in its figures

    async def submit(self, ids: Sequence[int], params: SamplingParams) -> Stream: ...

    async def stats(self) -> Mapping[str, Mapping[str, Any]]:
        """`EngineStats` without raw times, by replica."""
        ...

    async def failure(self) -> str | None:
        """Why it cannot serve, None while it can."""
        ...

    def close(self) -> None:
        """Cancel whatever is under way, and end."""
        ...

    def __enter__(self) -> Source: ...

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        ...


def model_facts(engine: Engine) -> ModelFacts:
    """Of the engine's model and its settings."""
    fast: OptimizedModel = engine.fast
    limits = [limit for limit in (fast.max_positions, fast.restart_at, engine.max_length) if limit]
    eos = token_ids(getattr(fast.generation_config, "eos_token_id", None), fast.device)
    return ModelFacts(fast.vocab_size, min(limits, default=None), () if eos is None else tuple(eos.tolist()))


def figures(engine: Engine) -> dict[str, Any]:
    """`EngineStats` without raw times."""
    return {name: value for name, value in asdict(engine.stats()).items() if name not in RAW_TIMES}


async def chunks(request: Request) -> AsyncIterator[Chunk]:
    """Each token of `request` as it comes, then its end; leaving early cancels it."""
    asked, at = request.params.logprobs is not None, 0
    try:
        async for token in request:
            yield Chunk((token,), request.logprobs[at : at + 1] if asked else ())
            at += 1
        if request.finish_reason == "cancelled":
            raise EngineClosedError("the engine was closed before the text was complete")
        yield Chunk(finish_reason=request.finish_reason, stats=request.stats)
    finally:
        request.cancel()


class LocalSource:
    """An engine of this process."""

    retries = waiting = 0

    def __init__(self, engine: Engine) -> None:
        self._engine, self.facts = engine, model_facts(engine)

    async def submit(self, ids: Sequence[int], params: SamplingParams) -> Stream:
        request = self._engine.submit(ids, params)
        return _Local(request)

    async def stats(self) -> Mapping[str, Mapping[str, Any]]:
        return {"0": figures(self._engine)}

    async def failure(self) -> str | None:
        if self._engine.failure is not None:
            return f"the engine has failed: {self._engine.failure!r}"
        return "the engine is closed" if self._engine.closed else None

    def close(self) -> None:
        self._engine.close(abort=True)

    def __enter__(self) -> LocalSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Local:
    def __init__(self, request: Request) -> None:
        self._request = request

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return chunks(self._request)

    async def aclose(self) -> None:
        self._request.cancel()  # an async generator that never began has no `finally` to run

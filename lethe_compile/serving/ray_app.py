"""Engines as replicas of one Ray Serve deployment, and a source of tokens that outlives any of them.

HTTP stays in the process that starts them: Ray's own proxies answer a request with an error when its replica dies,
while here it is run again on another one. Docs: https://docs.ray.io/en/latest/serve/.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from lethe_compile.errors import EngineBusyError, EngineClosedError, LetheError
from lethe_compile.serving.engine import Engine
from lethe_compile.serving.log import log
from lethe_compile.serving.ray_settings import DEPLOYMENT, RaySettings, start_ray
from lethe_compile.serving.sampling import SamplingParams
from lethe_compile.serving.source import Chunk, ModelFacts, chunks, figures, model_facts

_APP = "lethe"
_REPORT = 1.0  # seconds between the figures of a replica
_STALE = 5.0  # seconds after which they are forgotten
_TRIES = 8  # runs of a request, of which all but the last may lose their replica


class Board:
    """The newest figures of each replica; an actor."""

    def __init__(self) -> None:
        self._figures: dict[str, tuple[float, dict[str, Any]]] = {}

    def put(self, name: str, figures: dict[str, Any]) -> None:
        """What replica `name` says of itself."""
        self._figures[name] = (time.monotonic(), figures)

    def get(self) -> dict[str, dict[str, Any]]:
        """By replica, of those that still report."""
        now = time.monotonic()
        self._figures = {name: one for name, one in self._figures.items() if now - one[0] < _STALE}
        return {name: figures for name, (_, figures) in self._figures.items()}


class Replica:
    """An engine in a process of Ray's."""

    def __init__(self, make_engine: Callable[[], Engine], board: Any, loopback: bool) -> None:
        if loopback:
            _stay_on_loopback()
        self._name = str(serve.get_replica_context().replica_id.unique_id)
        self._engine, self._board = make_engine(), board
        threading.Thread(target=self._report, name="lethe-figures", daemon=True).start()

    async def generate(self, ids: Sequence[int], params: SamplingParams) -> AsyncIterator[Chunk | LetheError | None]:
        """None once the request is accepted, then chunks. What goes wrong is an item, too: Ray would wrap an error."""
        try:
            request = self._engine.submit(ids, params)
            yield None
            async for chunk in _joined(chunks(request)):
                yield chunk
        except LetheError as error:
            yield error

    def facts(self) -> ModelFacts:
        """Of the model."""
        return model_facts(self._engine)

    def check_health(self) -> None:
        """Asked by Ray, which replaces the replica if this raises."""
        if self._engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self._engine.failure!r}")

    def _report(self) -> None:
        while not self._engine.closed:
            self._board.put.remote(self._name, figures(self._engine))
            time.sleep(_REPORT)

    def __del__(self) -> None:
        """Called by Ray when the replica is taken away; accepted requests are done by then, or their time is up."""
        if hasattr(self, "_engine"):
            self._engine.close(abort=True)


def _stay_on_loopback() -> None:
    """Ray Serve opens a port of every replica to all addresses, for calls between deployments, which are none here.

    It has no setting for that, so the function that opens it, after this class is made, is told another address.
    """
    from ray.serve._private import replica

    internals: Any = replica
    opens: Callable[[Any, str], int] = internals.add_port_to_grpc_server
    internals.add_port_to_grpc_server = lambda server, address: opens(server, address.replace("[::]", "127.0.0.1"))


async def _joined(parts: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """The same with all that has come while the reader was busy in one chunk: each costs a message."""
    came: list[Chunk | BaseException] = []
    news = asyncio.Event()

    async def read() -> None:
        try:
            async for part in parts:
                came.append(part)
                news.set()
        except Exception as error:
            came.append(error)
            news.set()

    task = asyncio.ensure_future(read())
    try:
        while True:
            await news.wait()
            news.clear()
            fresh, came[:] = came[:], []
            good = [one for one in fresh if isinstance(one, Chunk)]
            if good:
                yield Chunk(
                    tuple(token for one in good for token in one.tokens),
                    tuple(figure for one in good for figure in one.logprobs),
                    good[-1].finish_reason,
                    good[-1].stats,
                )
            if isinstance(fresh[-1], BaseException):
                raise fresh[-1]
            if good[-1].finish_reason is not None:
                return
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class RaySource:
    """The replicas, as a `Source`. Starts Ray, or joins a cluster, and ends what it started.

    A request whose replica is lost is run again from its prompt, with its seed, and the tokens that were already
    delivered are generated anew and left out: so what follows is what would have followed, greedy or drawn, with the
    same rounds of eviction. Should the new run choose otherwise before that point, as another batch may make a model
    in reduced precision do, the text goes on from prompt and delivered tokens.
    """

    def __init__(self, make_engine: Callable[[], Engine], settings: RaySettings) -> None:
        self.retries = self.waiting = 0
        self.closing = False
        start_ray(settings)
        try:
            serve.start(proxy_location="Disabled")
            board: Any = ray.remote(num_cpus=0)(Board)
            self._board: Any = board.remote()
            app = serve.deployment(**settings.deployment_options())(Replica).bind(
                make_engine, self._board, settings.address is None
            )
            handle = serve.run(app, name=_APP, route_prefix=None)
            self.facts: ModelFacts = handle.facts.remote().result()
            self._stream = handle.options(stream=True).generate
        except BaseException:
            self.close()
            raise

    async def submit(self, ids: Sequence[int], params: SamplingParams) -> _RayStream:
        """As `Source.submit`: returns once a replica has accepted the request."""
        stream = _RayStream(self, ids, params)
        self.waiting += 1
        try:
            await stream.start()
        except BaseException:
            await stream.aclose()
            raise
        finally:
            self.waiting -= 1
        return stream

    def run(self, ids: Sequence[int], params: SamplingParams) -> Any:
        """One run of a request on some replica."""
        return self._stream.remote(list(ids), params)

    async def stats(self) -> Mapping[str, Mapping[str, Any]]:
        """By replica, as they were a moment ago."""
        found: Mapping[str, Mapping[str, Any]] = await self._board.get.remote()
        return found

    async def failure(self) -> str | None:
        """Why no request could be served."""
        app = (await asyncio.to_thread(serve.status)).applications.get(_APP)
        deployment = None if app is None else app.deployments.get(DEPLOYMENT)
        states: Mapping[Any, int] = {} if deployment is None else deployment.replica_states
        return None if states.get("RUNNING") else "no replica is running"

    def close(self) -> None:
        """End the replicas, and Ray if it was started here. May be called twice."""
        if not self.closing:
            self.closing = True
            if ray.is_initialized():
                serve.shutdown()  # type: ignore[no-untyped-call]
                ray.shutdown()

    def __enter__(self) -> RaySource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _RayStream:
    """The chunks of one request, over as many replicas as it takes."""

    def __init__(self, source: RaySource, ids: Sequence[int], params: SamplingParams) -> None:
        self._source, self._ids, self._params = source, tuple(ids), params
        self._told: list[int] = []  # tokens delivered, of all runs
        self._base = 0  # of these, those that are in the prompt of this run
        self._at = 0  # tokens of this run, after its base
        self._response: Any = None
        self._tries = 0

    async def start(self) -> None:
        """Begin a run, and wait until a replica has accepted it."""
        while True:
            self._tries += 1
            params = replace(self._params, max_new_tokens=(self._params.max_new_tokens or 0) - self._base)
            self._at = 0
            try:
                self._response = self._source.run([*self._ids, *self._told[: self._base]], params)
                await self._next()
                return
            except Exception as error:
                await self._lost(error)

    async def _next(self) -> Chunk | None:
        item = await self._response.__anext__()
        if isinstance(item, LetheError):
            raise item
        return item  # type: ignore[no-any-return]

    async def _lost(self, error: Exception) -> None:
        """Returns, after a while, if another run may help; else raises what clients are told."""
        if isinstance(error, BackPressureError):
            raise EngineBusyError("too many requests wait for a replica: try again later") from error
        if isinstance(error, DeploymentUnavailableError) or self._source.closing:
            raise EngineClosedError("the service is shutting down, or its replicas cannot start") from error
        lost = isinstance(error, (RayError, EngineClosedError, StopAsyncIteration))
        if not lost or isinstance(error, (RayTaskError, TaskCancelledError)):
            raise error
        if self._tries >= _TRIES:
            raise EngineClosedError(f"{self._tries} replicas were lost while they ran this request") from error
        self._source.retries += 1
        log.warning("a replica was lost after %d tokens of a request, which runs again: %s", len(self._told),
                    type(error).__name__)  # fmt: skip
        await asyncio.sleep(min(2.0, 0.1 * 2**self._tries))

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while True:
            try:
                chunk = await self._next()
            except Exception as error:
                await self._lost(error)
                await self.start()
                continue
            assert chunk is not None
            if not self._agrees(chunk.tokens):
                log.warning("a second run chose other tokens than the first: going on from those that were delivered")
                await self.aclose()
                self._base = len(self._told)
                await self.start()
                continue
            fresh = max(0, min(len(chunk.tokens), self._base + self._at + len(chunk.tokens) - len(self._told)))
            self._at += len(chunk.tokens)
            new = len(chunk.tokens) - fresh
            tokens = chunk.tokens[new:]
            self._told += tokens
            if tokens or chunk.finish_reason is not None:
                yield replace(chunk, tokens=tokens, logprobs=chunk.logprobs[new:])
            if chunk.finish_reason is not None:
                return

    def _agrees(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` are those that were delivered at their places, as far as any were."""
        told = self._told[self._base + self._at :][: len(tokens)]
        return list(tokens[: len(told)]) == told

    async def aclose(self) -> None:
        """Cancel it."""
        if self._response is not None:
            self._response.cancel()

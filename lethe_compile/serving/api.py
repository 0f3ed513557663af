"""The HTTP service: OpenAI's completions and chats of one model, health, and metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lethe_compile.errors import LetheError
from lethe_compile.serving.answers import Answer, ChatFormat, CompletionFormat, Format
from lethe_compile.serving.api_errors import ApiError, translated
from lethe_compile.serving.choice import Choice
from lethe_compile.serving.gate import Gate, read_body
from lethe_compile.serving.log import log
from lethe_compile.serving.metrics import Metrics
from lethe_compile.serving.openai_schema import ChatRequest, CompletionRequest, GenerationRequest, Schema, parse
from lethe_compile.serving.prompts import Prompts
from lethe_compile.serving.source import Source, Stream
from lethe_compile.serving.sse import ClientLeft, EventStream, unless_gone

_UNLIMITED = 4096  # new tokens of a chat that names no limit, on a model that has none
_LEFT = Response(status_code=499)  # nobody reads it


@dataclass(frozen=True)
class ServiceSettings:
    """Of the HTTP side.

    Attributes:
        name: of the model, as clients ask for it.
        api_keys: any of them opens all but ``/health``; none: no key is asked for.
        max_body: bytes of a request's body.
        stall: seconds after which a reader that takes nothing of a stream is given up.
    """

    name: str
    api_keys: Sequence[str] = field(default=(), repr=False)
    max_body: int = 4 << 20
    stall: float = 60.0


class Service:
    """The endpoints; `app` is the ASGI application."""

    def __init__(self, source: Source, prompts: Prompts, settings: ServiceSettings) -> None:
        self.source, self.prompts, self.settings = source, prompts, settings
        self.metrics = Metrics()
        self._created = int(time.time())
        inner = FastAPI(title="Lethe Compile", openapi_url=None, docs_url=None, redoc_url=None)
        self.app = Gate(inner, self.metrics, settings.api_keys, settings.max_body)
        inner.post("/v1/completions")(self._completions)
        inner.post("/v1/chat/completions")(self._chats)
        inner.get("/v1/models")(self._models)
        inner.get("/v1/models/{name:path}")(self._model)
        inner.get("/health")(self._health)
        inner.get("/metrics")(self._metrics)
        inner.exception_handler(HTTPException)(_http_error)
        for known in (ApiError, LetheError, Exception):  # of the last one, the server logs where it came from
            inner.exception_handler(known)(_error)

    # ---------------------------------------------------------------------------------------------------- generation

    async def _completions(self, request: Request) -> Response:
        async def prepared(body: bytes) -> tuple[CompletionRequest, list[list[int]], Format]:
            call = self._parse(CompletionRequest, body)
            ids = [await self.prompts.encode(prompt) for prompt in call.prompt]
            return call, ids, CompletionFormat(self.settings.name, self.prompts.tokenizer)

        return await self._answer(request, prepared)

    async def _chats(self, request: Request) -> Response:
        async def prepared(body: bytes) -> tuple[ChatRequest, list[list[int]], Format]:
            call = self._parse(ChatRequest, body)
            ids = await self.prompts.chat(call.messages, call.chat_template_kwargs)
            return call, [ids], ChatFormat(self.settings.name, self.prompts.tokenizer)

        return await self._answer(request, prepared)

    def _parse(self, schema: type[Schema], body: bytes) -> Schema:
        call = parse(schema, body)
        if call.model != self.settings.name:
            raise self._no_model(call.model)
        if call.stop and self.prompts.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer, and so no stop strings", param="stop")
        return call

    async def _answer(
        self,
        request: Request,
        prepared: Callable[[bytes], Awaitable[tuple[GenerationRequest, list[list[int]], Format]]],
    ) -> Response:
        begun = time.monotonic()
        try:
            call, prompts, form = await prepared(await read_body(request, self.settings.max_body))
            submitting = self._submit(call, prompts, begun)
            choices = await unless_gone(submitting, request.receive)
            answer = Answer(form, choices, sum(map(len, prompts)))
            if call.stream:
                return EventStream(answer.events(call.include_usage), answer.close, self.settings.stall)
            try:
                return JSONResponse(await unless_gone(answer.whole(), request.receive))
            finally:
                await answer.close()
        except (ClientLeft, ClientDisconnect):
            return _LEFT

    async def _submit(self, call: GenerationRequest, prompts: list[list[int]], begun: float) -> list[Choice]:
        """All sequences of a call accepted, or none."""
        stop_ids = {*call.stop_token_ids, *(() if call.ignore_eos else self.source.facts.eos)}
        seed = secrets.randbits(62) if call.seed is None else call.seed
        streams: list[Stream] = []
        try:
            for ids in prompts:
                new_tokens = self._room(call, len(ids))
                for _ in range(call.n):
                    own = seed + len(streams) if seed < 2**62 else seed - len(streams)
                    params = call.sampling(new_tokens, own, self.source.facts.vocab_size)
                    streams.append(await self.source.submit(ids, params))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        tokenizer = self.prompts.tokenizer
        return [Choice(stream, tokenizer, call.stop, stop_ids, self.metrics, begun) for stream in streams]

    def _room(self, call: GenerationRequest, prompt: int) -> int:
        """New tokens that a prompt of so many may get.

        Raises:
            ApiError: there is no room for them.
        """
        limit, asked = self.source.facts.limit, call.new_tokens
        if limit is None:
            return asked or _UNLIMITED
        if prompt >= limit or prompt + (asked or 1) > limit:
            message = f"the limit is {limit} tokens, and the prompt has {prompt}" + (
                f" and up to {asked} new ones are asked for" if asked and prompt < limit else ""
            )
            fault = "max_tokens" if prompt < limit else ("messages" if isinstance(call, ChatRequest) else "prompt")
            raise ApiError(400, message, param=fault, code="context_length_exceeded")
        return asked or limit - prompt

    # -------------------------------------------------------------------------------------------------------- others

    def _card(self) -> dict[str, Any]:
        facts = {"max_model_len": self.source.facts.limit}
        return {
            "id": self.settings.name, "object": "model", "created": self._created, "owned_by": "lethe", **facts
        }  # fmt: skip

    def _no_model(self, name: str) -> ApiError:
        message = f"no model {name!r} here: this service has {self.settings.name!r}"
        return ApiError(404, message, param="model", code="model_not_found")

    async def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, name: str) -> Response:
        if name != self.settings.name:
            raise self._no_model(name)
        return JSONResponse(self._card())

    async def _health(self) -> Response:
        problem = "draining" if self.app.draining else await self.source.failure()
        return JSONResponse({"status": problem or "ok"}, status_code=503 if problem else 200)

    async def _metrics(self) -> Response:
        figures = await self.source.stats()
        source = self.source
        text = await asyncio.to_thread(self.metrics.exposition, figures, source.retries, source.waiting)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


async def _error(_: Request, error: Exception) -> Response:
    told = translated(error)
    if told.status >= 500 and isinstance(error, LetheError):
        log.error("a request has failed: %s", error)
    return JSONResponse(told.body(), told.status, told.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, error.detail).body(), error.status_code, error.headers)

"""Texts and chats to token ids, off the event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lethe_compile.serving.api_errors import ApiError
from lethe_compile.serving.openai_schema import Message


class Prompts:
    """A tokenizer, used by one thread at a time: fast tokenizers are not safe in more.

    Args:
        tokenizer: None where the model has none: then prompts are token ids only.
        chat_template: Jinja text in place of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._template = chat_template
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lethe-tokenizer")
        taken = () if tokenizer is None else inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*taken, "messages"}

    @property
    def has_template(self) -> bool:
        """Whether chats can be served."""
        return self.tokenizer is not None and bool(self._template or self.tokenizer.chat_template)

    async def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt; special tokens are added as the tokenizer does.

        Raises:
            ApiError: a text for a model without a tokenizer, or one that has no tokens.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: send token ids", param="prompt", code="no_tokenizer")
        ids = await self._call(lambda: list(self.tokenizer(prompt)["input_ids"]))
        if not ids:
            raise ApiError(400, "the prompt has no tokens", param="prompt")
        return ids

    async def chat(self, messages: Sequence[Message], options: dict[str, Any]) -> list[int]:
        """Ids of a chat, up to where the assistant's answer begins.

        Raises:
            ApiError: the model has no chat template, or its template refuses these messages.
        """
        from jinja2 import TemplateError

        if not self.has_template:
            message = "this model has no chat template: use /v1/completions, or start the service with --chat-template"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        if taken := self._reserved & options.keys():
            message = f"chat_template_kwargs may not set {sorted(taken)}"
            raise ApiError(400, message, param="chat_template_kwargs")
        chat = [message.for_template() for message in messages]

        def apply() -> list[int]:
            own = {"chat_template": self._template, "add_generation_prompt": True, "return_dict": False}
            return list(self.tokenizer.apply_chat_template(chat, **own, **options))

        try:
            ids = await self._call(apply)
        except (
            TemplateError,
            TypeError,
            ValueError,
        ) as error:  # what templates raise on purpose, or for lack of a role
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        if not ids:
            raise ApiError(400, "the chat has no tokens", param="messages")
        return ids

    async def _call(self, work: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

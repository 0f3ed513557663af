"""Requests as OpenAI's API has them, checked; what is not supported is refused by name, never ignored.

Reference: https://platform.openai.com/docs/api-reference/completions and …/chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lethe_compile.serving.api_errors import ApiError
from lethe_compile.serving.penalties import CountPenalty
from lethe_compile.serving.sampling import SamplingParams

MAX_CHOICES = 128
"""Most sequences of one call: prompts times `n`."""

# Parameters that this service does not have, with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # says how tools are called, where there are some
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """`include_usage`: one more event, of no choices, with the tokens counted."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(_Strict):
    """What completions and chats share. `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids` and `ignore_eos` are
    not OpenAI's; clients send them as `extra_body`. Sampling that is not given is as the model's own
    `generation_config` says.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[StopText], Field(max_length=16)] = []
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] = []
    ignore_eos: bool = False
    # Of accounting, on which no token depends.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("the body must be a JSON object")
        kept = dict(data)
        for name in _UNSUPPORTED.keys() & (kept.keys() - cls.model_fields.keys()):
            value = kept.pop(name)
            if value is not None and value not in _UNSUPPORTED[name]:
                raise ApiError(400, f"{name} is not supported by this service", param=name, code="unsupported")
        return {name: value for name, value in kept.items() if value is not None}  # null: the default

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _by_id(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
            raise ValueError("keys must be token ids")
        return value

    @model_validator(mode="after")
    def _options_of_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is allowed with stream=true only", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the tokens counted."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def new_tokens(self) -> int | None:
        """Most tokens to generate, None for what there is room for."""
        raise NotImplementedError

    @property
    def logprob_count(self) -> int | None:
        """Likeliest tokens to report at each token; None: no figures."""
        raise NotImplementedError

    def sampling(self, new_tokens: int, seed: int, vocab_size: int) -> SamplingParams:
        """For the engine.

        Raises:
            ApiError: a token id that is not in the vocabulary.
        """
        for name, ids in (("logit_bias", map(int, self.logit_bias)), ("stop_token_ids", self.stop_token_ids)):
            if any(id >= vocab_size for id in ids):
                raise ApiError(400, f"{name} names an id outside the vocabulary of {vocab_size}", param=name)
        warped = (self.top_p or 1) < 1 or (self.top_k or 0) > 0 or bool(self.min_p)
        temperature = self.temperature
        if temperature is None and warped:  # whoever says how to draw wants to draw: OpenAI's default is 1
            temperature = 1.0
        options: dict[str, Any] = {}
        if self.logit_bias:
            options["sequence_bias"] = [[[int(id)], bias] for id, bias in self.logit_bias.items()]
        processors: Sequence[Any] = ()
        if self.presence_penalty or self.frequency_penalty:
            processors = (CountPenalty(self.presence_penalty, self.frequency_penalty),)
        return SamplingParams(
            max_new_tokens=new_tokens,
            temperature=temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprob_count,
            logits_processor=processors,
            options=options,
        )


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`; `prompt` is a text, token ids, or a list of either."""

    prompt: list[str | list[TokenId]]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        one = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
        prompts = [value] if one else value
        if not isinstance(prompts, list) or not prompts:
            raise ValueError("must be a text, a list of token ids, or a list of some of these")
        if not all(isinstance(prompt, str) or (isinstance(prompt, list) and prompt) for prompt in prompts):
            raise ValueError("each prompt must be a text or a list of at least one token id")
        return prompts

    @model_validator(mode="after")
    def _choices(self) -> CompletionRequest:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ApiError(400, f"{len(self.prompt)} prompts times n={self.n}: at most {MAX_CHOICES}", param="n")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    """A part of a message's content; images and sounds are refused."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat; what roles may follow each other, the model's template says."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As `apply_chat_template` takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`; `chat_template_kwargs` are the template's own, such as ``enable_thinking``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one", param="max_tokens")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Schema = TypeVar("Schema", bound=GenerationRequest)


def parse(schema: type[Schema], body: bytes) -> Schema:
    """A checked request.

    Raises:
        ApiError: 400; names the first parameter at fault.
    """
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json") from error
        unknown = first["type"] == "extra_forbidden"
        reason = "this service does not know it" if unknown else first["msg"].removeprefix("Value error, ")
        param = str(first["loc"][0]) if first["loc"] else None
        message = f"{path}: {reason}" if path else reason
        raise ApiError(400, message, param=param, code="unknown_parameter" if unknown else None) from error

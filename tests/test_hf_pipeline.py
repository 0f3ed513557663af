"""`transformers.pipeline` over an optimized model: the bundled reasoner and its tokenizer, against the original."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer, pipeline

import lethe_compile as lethe
from lethe_compile.models.reasoner import load_model, load_tokenizer, problems

# Renders one message a line, and a role's name before it, in words that the reasoner's vocabulary has.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<bos> ' if loop.first else '' }}{{ 'A ' if message['role'] == 'user' else 'B ' }}{{ message['content'] + ' ' }}
{%- endfor -%}
{%- if add_generation_prompt %}B {% endif -%}"""
PRUNING = lethe.LetheConfig(sparse_ratio=2.0, decay=0.9, prune_threshold=24, prune_interval=4, protect_prompt=False)
BATCHES = [{"return_full_text": False}, {"return_tensors": True}, {"num_return_sequences": 2}]
NEW = {"max_new_tokens": 40, "do_sample": False}


class Texts:
    """The reasoner in two pipelines, the original's and the optimized one's, and prompts of unequal length."""

    def __init__(self) -> None:
        self.tokenizer: Any = load_tokenizer()
        self.tokenizer.padding_side = "left"
        self.tokenizer.chat_template = CHAT_TEMPLATE
        self.model: Any = load_model()
        self.fast = lethe.optimize(self.model, policy="full")
        self.theirs = self.pipeline(self.model)
        self.ours = self.pipeline(self.fast.as_hf())
        given = problems(3, seed=4)
        self.prompts = [self.tokenizer.decode(given.prompt(row)[1 : 40 + 25 * row]) for row in range(3)]

    def pipeline(self, model: Any) -> Any:
        return pipeline("text-generation", model=model, tokenizer=self.tokenizer)


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts()


def test_nothing_is_said_against_the_model(texts: Texts, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        texts.pipeline(texts.fast.as_hf())
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_prompt_is_continued(texts: Texts) -> None:
    assert texts.ours(texts.prompts[0], **NEW) == texts.theirs(texts.prompts[0], **NEW)


@pytest.mark.parametrize(
    "options", [{"return_full_text": False}, {"return_tensors": True}, {"num_return_sequences": 2}]
)
def test_a_batch_is_continued(texts: Texts, options: dict[str, Any]) -> None:
    if "num_return_sequences" in options:
        options = {**options, "do_sample": True}
    written = []
    for pipe in (texts.theirs, texts.ours):
        torch.manual_seed(3)
        written.append(pipe(texts.prompts, batch_size=3, **{**NEW, **options}))
    assert len(written[0]) == 3
    assert written[1] == written[0]


def test_an_empty_prompt_begins_a_text(texts: Texts) -> None:
    # The tokenizer puts <bos> in front; without special tokens there is no prompt at all.
    assert texts.ours("", add_special_tokens=False, **NEW) == texts.theirs("", add_special_tokens=False, **NEW)


def test_a_text_streamer_hears_the_text(texts: Texts, capsys: pytest.CaptureFixture[str]) -> None:
    heard = []
    for pipe in (texts.theirs, texts.ours):
        streamer = TextStreamer(texts.tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = pipe(texts.prompts[0], streamer=streamer, return_full_text=False, **NEW)
        heard.append(capsys.readouterr().out.strip())
        assert heard[-1] == out[0]["generated_text"].strip() != ""
    assert heard[1] == heard[0]


def test_an_iterator_hears_the_text_from_another_thread(texts: Texts) -> None:
    expected = texts.theirs(texts.prompts[1], return_full_text=False, **NEW)[0]["generated_text"]
    streamer: Iterator[str] = TextIteratorStreamer(texts.tokenizer, skip_prompt=True, timeout=120)  # type: ignore[assignment]
    work = threading.Thread(target=texts.ours, args=(texts.prompts[1],), kwargs={"streamer": streamer, **NEW})
    work.start()
    pieces = list(streamer)
    work.join()
    assert len(pieces) > 10, "piece by piece"
    assert "".join(pieces).split() == expected.split()


def test_messages_in_and_messages_out(texts: Texts) -> None:
    chat = [{"role": "user", "content": texts.prompts[0]}]
    (answer,) = texts.ours(chat, **NEW)
    assert [answer] == texts.theirs(chat, **NEW)
    assert [message["role"] for message in answer["generated_text"]] == ["user", "assistant"]
    chat = [*answer["generated_text"], {"role": "user", "content": texts.prompts[1]}]
    assert texts.ours([chat, chat[:1]], batch_size=2, **NEW) == texts.theirs([chat, chat[:1]], batch_size=2, **NEW)


def test_a_pruned_pipeline_writes_what_generate_writes(texts: Texts) -> None:
    fast = lethe.optimize(texts.model, PRUNING, verified=False)
    inputs = texts.tokenizer(texts.prompts, return_tensors="pt", padding=True)
    expected = texts.tokenizer.batch_decode(
        fast.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **NEW)[:, inputs.input_ids.shape[1] :],
        skip_special_tokens=True,
    )
    assert all(min(layer) > 0 for layer in fast.cache_stats().rounds)
    out = texts.pipeline(fast.as_hf())(texts.prompts, batch_size=3, return_full_text=False, **NEW)
    assert [one["generated_text"].split() for (one,) in out] == [text.split() for text in expected]
    assert out != texts.theirs(texts.prompts, batch_size=3, return_full_text=False, **NEW), "evictions must show"


def test_an_unsupported_option_of_a_pipeline_is_refused_by_name(texts: Texts) -> None:
    with pytest.raises(lethe.InputError, match="num_beams=3"):
        texts.ours(texts.prompts[0], num_beams=3, **NEW)
    with pytest.raises(lethe.InputError, match="num_beams=3"):
        pipeline("text-generation", model=texts.fast.as_hf(), tokenizer=texts.tokenizer, num_beams=3)


def test_an_assistant_model_of_a_pipeline_is_refused(texts: Texts) -> None:
    pipe = pipeline("text-generation", model=texts.fast.as_hf(), tokenizer=texts.tokenizer, assistant_model=texts.model)
    with pytest.raises(lethe.InputError, match="assistant_model"):
        pipe(texts.prompts[0], **NEW)

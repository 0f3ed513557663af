"""Text as it comes: equal to the whole, no half characters, nothing of a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lethe_compile.models import reasoner
from lethe_compile.serving.text import Detokenizer, StopScanner


def byte_level() -> Any:
    """Of bytes, with some merges: most characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cache is pruned while the model generates, é and ü"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


BYTES, WORDS = byte_level(), reasoner.load_tokenizer()


def told(tokenizer: Any, ids: list[int]) -> list[str]:
    words = Detokenizer(tokenizer)
    return [*(words.push(token) for token in ids), words.flush()]


@settings(max_examples=20)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40))
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    parts = told(BYTES, ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_an_emoji_waits_for_its_last_byte() -> None:
    ids = BYTES("a🙂b")["input_ids"]
    assert len(ids) == 6
    assert told(BYTES, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_what_never_becomes_a_character_is_told_at_the_end() -> None:
    half = BYTES("🙂")["input_ids"][:2]
    assert told(BYTES, half) == ["", "", "\ufffd"]


def test_bytes_that_never_become_a_character_do_not_wait_forever() -> None:
    half = BYTES("🙂")["input_ids"][:1]
    parts = told(BYTES, half * 100)
    assert any(parts[:40]), "nothing told in 40 tokens"


@settings(max_examples=20)
@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=40))
def test_words_are_those_of_the_whole(ids: list[int]) -> None:
    assert "".join(told(WORDS, ids)) == WORDS.decode(ids, skip_special_tokens=True)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings(text: str, stops: list[str], data: st.DataObject) -> None:
    """Whatever the parts: what is shown never reaches into a stop string, and is the text before the first."""
    scanner, shown, rest = StopScanner(stops), "", text
    while rest and not scanner.stopped:
        count = data.draw(st.integers(1, len(rest)))
        shown += scanner.push(rest[:count])
        rest = rest[count:]
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    shown += scanner.flush()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert scanner.stopped == bool(ends)
    if len(stops) <= 1 or not ends:
        assert shown == text[: min(ends, default=len(text))]
    assert not any(stop in shown for stop in stops)


def test_a_beginning_that_comes_to_nothing_is_shown() -> None:
    scanner = StopScanner(["stop"])
    assert [scanner.push(part) for part in ("x s", "t", "ay", " sto")] == ["x ", "", "stay", " "]
    assert scanner.flush() == "sto"


@pytest.mark.parametrize("late", ["", "more"])
def test_nothing_comes_after_a_stop_string(late: str) -> None:
    scanner = StopScanner(["##"])
    assert scanner.push("a#") == "a"
    assert scanner.push("#b") == ""
    assert scanner.push(late) == scanner.flush() == ""

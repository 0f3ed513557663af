"""The decode loop against transformers' own `generate`, over a decoder that recomputes every sequence from scratch."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lethe_compile import generation
from lethe_compile.errors import InputError, LetheError
from lethe_compile.generation import generate

VOCAB = 48
PAD = 0
POSITIONS = 64


class RecomputingDecoder:
    """Keeps each row's tokens and runs the model over all of them, right-padded, at every step: no cache to go wrong.

    Logits of inactive rows are NaN, so that a loop which reads them fails. `faults` maps a decode step (from 1) to an
    exception to raise or a row whose logits become NaN. `trace` is the order in which the model is run and the host
    looks at a step's copy, where `traced` makes the copies tell. Like a CUDA graph, a step overwrites the last logits.
    """

    def __init__(self, model: Any) -> None:  # a LlamaForCausalLM
        self.model, self.vocab_size = model, VOCAB
        self.max_positions: int | None = POSITIONS
        self.device = torch.device("cpu")
        self.generation_config = model.generation_config
        self.faults: dict[int, BaseException | int] = {}
        self.log: list[str] = []
        self.trace: list[str] = []
        self.inactive = 0  # row steps that were not computed
        self.rows: list[list[int]] = []

    def begin(self, rows: int, prompt_lengths: Tensor, new_tokens: int) -> None:
        assert prompt_lengths.shape == (rows,)
        self.log.append("begin")
        self.step, self.new_tokens = 0, new_tokens
        self.output: Tensor | None = None

    def end(self) -> None:
        self.log.append("end")
        self.rows = []

    def prefill(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        assert input_ids.shape[1] == int(lengths.max())
        self.rows = [ids[:n].tolist() for ids, n in zip(input_ids, lengths, strict=True)]
        self.trace.append("prefill")
        self.output = self._logits(torch.ones(len(lengths), dtype=torch.bool))
        return self.output

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        self.step += 1
        self.trace.append(f"decode {int(active.sum())}")
        assert self.step < self.new_tokens, "the last token is not decoded"
        assert active.is_contiguous(), "a kernel may read it"
        fault = self.faults.get(self.step)
        if isinstance(fault, BaseException):
            raise fault
        for row, token, on in zip(self.rows, tokens.tolist(), active.tolist(), strict=True):
            assert 0 <= token < VOCAB
            if on:
                row.append(token)
        self.inactive += int((~active).sum())
        logits = self._logits(active)
        if isinstance(fault, int):
            logits[fault, 3] = torch.nan
        assert self.output is not None
        return self.output.copy_(logits)

    def _logits(self, active: Tensor) -> Tensor:
        width = max(map(len, self.rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in self.rows])
        last = torch.tensor([len(row) - 1 for row in self.rows])
        logits = self.model(ids).logits[torch.arange(len(ids)), last]
        return torch.where(active[:, None], logits, torch.nan)


class ListStreamer:
    """Records what a streamer is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append((tuple(value.shape), value.dtype, value.tolist()))

    def end(self) -> None:
        self.heard.append("end")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.4,
        bos_token_id=1, eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    # Random weights settle on one token; a flatter head keeps sampled and greedy rows varied.
    model.lm_head.weight.data.mul_(0.35)
    return model


@pytest.fixture
def decoder(model: LlamaForCausalLM) -> RecomputingDecoder:
    return RecomputingDecoder(model)


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both orders of a step: on a CPU, and on a GPU, where the next one is launched before the last one is read."""
    monkeypatch.setattr(generation, "_overlaps", lambda device: request.param)
    return bool(request.param)


both_orders = pytest.mark.usefixtures("overlap")


@pytest.fixture
def traced(decoder: RecomputingDecoder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decoder's trace, in which copies tell of their start and of the host's look; nothing arrives before that."""

    class LateCopy(generation.Fetched):
        def __init__(self, values: Tensor) -> None:
            assert not decoder.trace[-1].startswith("copy"), "one copy a step"
            decoder.trace.append("copy")
            self._late = values.clone()

        def wait(self) -> NDArray[np.int64]:
            decoder.trace.append("look")
            late = self._late.numpy()
            del self._late  # a second look at a step fails
            return late

    monkeypatch.setattr(generation, "Fetched", LateCopy)
    return decoder.trace


@pytest.fixture
def ragged() -> dict[str, Tensor]:
    """Four prompts of 7, 3, 1 and 5 tokens, left-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (4, 7), generator=generator)
    lengths = torch.tensor([7, 3, 1, 5])
    mask = (torch.arange(7) >= 7 - lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def expect_same(decoder: RecomputingDecoder, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    """Runs both; under the same global seed, so that sampling draws the same numbers. Returns the new tokens."""
    torch.manual_seed(7)
    wanted = decoder.model.generate(**prompt, **copy.deepcopy(options))
    torch.manual_seed(7)
    got = generate(decoder, **prompt, **options)
    assert isinstance(got, Tensor)
    assert got.dtype == wanted.dtype
    assert got.tolist() == wanted.tolist()
    return got[:, prompt["input_ids"].shape[1] :]


def ending_ids(decoder: RecomputingDecoder, prompt: dict[str, Tensor], **options: Any) -> list[int]:
    """Ids that end two rows of the batch at different steps, and perhaps others."""
    torch.manual_seed(7)
    new = decoder.model.generate(**prompt, max_new_tokens=24, **options)[:, 7:]
    return [int(new[0, 4]), int(new[1, 9])]


def test_greedy_ragged_batch(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    new = expect_same(decoder, ragged, max_new_tokens=24)
    assert new.shape == (4, 24)
    assert len(set(new.flatten().tolist())) > 8, "the model must not repeat one token, or the test shows nothing"
    assert decoder.log == ["begin", "end"]


@both_orders
def test_several_ends_pad_and_stop_early(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    ends = ending_ids(decoder, ragged)
    new = expect_same(decoder, ragged, max_new_tokens=40, eos_token_id=ends)
    assert (new == PAD).any()
    assert decoder.inactive > 0, "a finished row must not stay active"
    one = {name: value[:1] for name, value in ragged.items()}
    assert expect_same(decoder, one, max_new_tokens=40, eos_token_id=ends).shape[1] <= 5


def test_pad_need_not_be_in_the_vocabulary(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    ends = ending_ids(decoder, ragged)
    out = generate(decoder, **ragged, max_new_tokens=16, eos_token_id=ends, pad_token_id=-1)
    usual = generate(decoder, **ragged, max_new_tokens=16, eos_token_id=ends)
    assert (out[:, 7:] == -1).any()
    assert out[:, 7:].masked_fill(out[:, 7:] == -1, PAD).tolist() == usual[:, 7:].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 12},
        {"min_length": 20},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [11, 12], [30]]},
        {"suppress_tokens": [3, 4, 5, 6], "begin_suppress_tokens": [9, 10]},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (3, 1.3)},
        {"sequence_bias": [[[8], 2.0], [[9, 10], 4.0]]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [row + 2, len(ids) % 20 + 2, 40, 41]},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"watermarking_config": {"bias": 3.0, "seeding_scheme": "lefthash"}},
    ],
    ids="+".join,
)
def test_greedy_options(decoder: RecomputingDecoder, ragged: dict[str, Tensor], options: dict[str, Any]) -> None:
    ends = ending_ids(decoder, ragged)
    plain = generate(decoder, **ragged, max_new_tokens=20, eos_token_id=ends)
    new = expect_same(decoder, ragged, max_new_tokens=20, eos_token_id=ends, **options)
    if "renormalize_logits" not in options:
        assert new.tolist() != plain[:, 7:].tolist(), "the option must matter, or the test shows nothing"


@both_orders
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.7},
        {"top_k": None, "min_p": 0.1},
        {"typical_p": 0.6},
        {"top_h": 0.5},
        {"epsilon_cutoff": 0.03},
        {"eta_cutoff": 0.03},
        {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_sampling(decoder: RecomputingDecoder, ragged: dict[str, Tensor], options: dict[str, Any]) -> None:
    ends = ending_ids(decoder, ragged, do_sample=True)
    expect_same(decoder, ragged, max_new_tokens=24, do_sample=True, eos_token_id=ends, **options)


def test_num_return_sequences(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    new = expect_same(decoder, ragged, max_new_tokens=8, do_sample=True, num_return_sequences=3)
    assert new.shape == (12, 8)
    assert new[0].tolist() != new[1].tolist()


def test_seed_is_local_and_equals_the_global_one(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    torch.manual_seed(11)
    wanted = decoder.model.generate(**ragged, max_new_tokens=12, do_sample=True)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = generate(decoder, **ragged, max_new_tokens=12, do_sample=True, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert first.tolist() == wanted.tolist()
    assert generate(decoder, **ragged, max_new_tokens=12, do_sample=True, seed=11).tolist() == first.tolist()
    assert generate(decoder, **ragged, max_new_tokens=12, do_sample=True, seed=12).tolist() != first.tolist()


def test_configuration_priority(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    """Options over the given configuration over the decoder's, none of which is changed by the call."""
    decoder.generation_config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.7, pad_token_id=PAD)
    given = GenerationConfig(max_new_tokens=5, suppress_tokens=[3, 4])
    own, seen = copy.deepcopy(decoder.generation_config), copy.deepcopy(given)
    assert generate(decoder, **ragged).shape[1] == 7 + 9
    assert generate(decoder, **ragged, generation_config=given).shape[1] == 7 + 5
    both = generate(decoder, **ragged, generation_config=given, max_new_tokens=4)
    wanted = decoder.model.generate(
        **ragged, max_new_tokens=4, repetition_penalty=1.7, suppress_tokens=[3, 4], pad_token_id=PAD
    )
    assert both.tolist() == wanted.tolist()
    assert (decoder.generation_config, given) == (own, seen)


def test_runtime_hints_of_a_checkpoint_are_not_inherited(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor]
) -> None:
    decoder.generation_config = GenerationConfig(cache_implementation="static", use_cache=False, pad_token_id=PAD)
    assert generate(decoder, **ragged, max_new_tokens=3).shape == (4, 10)
    decoder.generation_config = GenerationConfig(num_beams=4)
    with pytest.raises(InputError, match="num_beams=4"):
        generate(decoder, **ragged, max_new_tokens=3)


def test_lengths(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    assert expect_same(decoder, ragged, max_length=12).shape == (4, 5)
    with pytest.warns(UserWarning, match="at most 20"):
        assert generate(decoder, **ragged).shape == (4, 27)
    long = torch.full((1, POSITIONS - 6), 5)
    with pytest.warns(UserWarning, match="at most 6"):
        assert generate(decoder, long).shape == (1, POSITIONS)
    assert generate(decoder, long, max_new_tokens=6).shape == (1, POSITIONS)
    padded = torch.cat([torch.zeros_like(long), long], dim=1)  # padding needs no positions
    assert (
        generate(decoder, padded, max_new_tokens=6)[:, long.shape[1] :].tolist()
        == generate(decoder, long, max_new_tokens=6).tolist()
    )


def test_prompt_forms(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    wanted = generate(decoder, **ragged, max_new_tokens=6).tolist()
    ids, mask = ragged["input_ids"], ragged["attention_mask"]
    expect_same(decoder, {"input_ids": ids}, max_new_tokens=6)  # the mask inferred from the pad token
    assert generate(decoder, ids, max_new_tokens=6).tolist() == wanted
    assert generate(decoder, ids.int(), attention_mask=mask.bool(), max_new_tokens=6).tolist() == wanted
    assert generate(decoder, ids, attention_mask=mask.float(), max_new_tokens=6).tolist() == wanted
    assert generate(decoder, max_new_tokens=6).tolist() == decoder.model.generate(max_new_tokens=6).tolist()
    # A pad token that also ends sequences says nothing about the prompt, as in transformers.
    expect_same(decoder, {"input_ids": ids}, max_new_tokens=6, eos_token_id=[PAD, 3])


def test_pad_defaults_to_the_first_end(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    ends = ending_ids(decoder, ragged)
    decoder.generation_config = GenerationConfig()
    with pytest.warns(UserWarning, match=f"filled with {ends[0]}"):
        out = generate(decoder, **ragged, max_new_tokens=30, eos_token_id=ends)
    filled = decoder.model.generate(**ragged, max_new_tokens=30, eos_token_id=ends, pad_token_id=ends[0])
    assert out.tolist() == filled.tolist()


class PreferOdd(transformers.LogitsProcessor):
    """Writes into the scores it gets, and looks at the ids as transformers shapes them."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.tolist())
        scores[:, ::2] -= 3.0
        return scores


class StopAt(transformers.StoppingCriteria):
    """Ends row r once the result has 10 + 2r columns."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append((input_ids.tolist(), scores is None or len(scores)))
        return input_ids.shape[1] >= 10 + 2 * torch.arange(len(input_ids))


@pytest.mark.parametrize("ends", [None, 2], ids=["no end id", "end id"])
def test_custom_processors_and_criteria(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], overlap: bool, ends: int | None
) -> None:
    """Without an end id transformers does not pad rows that a criterion ended: it lets them go on."""
    seen = []
    for run in (decoder.model.generate, lambda **options: generate(decoder, **options)):
        processor, criterion = PreferOdd(), StopAt()
        out = run(
            **ragged, max_new_tokens=30, logits_processor=[processor], stopping_criteria=[criterion], eos_token_id=ends
        )
        seen.append((out.tolist(), processor.seen, criterion.seen))
    assert seen[0] == seen[1]
    assert len(seen[1][0][0]) == 16
    assert decoder.inactive == (0 if ends is None else 6 + 4 + 2) + 4 * overlap


@both_orders
@pytest.mark.parametrize("sample", [False, True])
def test_scores_of_finished_rows_do_not_matter(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], sample: bool
) -> None:
    ends = ending_ids(decoder, ragged)

    def forbid_after_end(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.isin(input_ids[:, 7:], torch.tensor(ends)).any(1, keepdim=True), -torch.inf)

    options = {"max_new_tokens": 20, "eos_token_id": ends, "do_sample": sample, "seed": 3}
    wanted = generate(decoder, **ragged, **options)
    assert generate(decoder, **ragged, **options, logits_processor=[forbid_after_end]).tolist() == wanted.tolist()


@both_orders
def test_a_custom_object_replaces_the_standard_one(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    longer = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(15)])
    new = expect_same(decoder, ragged, max_new_tokens=3, stopping_criteria=longer)
    assert new.shape == (4, 8)
    cold = transformers.LogitsProcessorList([transformers.RepetitionPenaltyLogitsProcessor(3.0)])
    expect_same(decoder, ragged, max_new_tokens=12, repetition_penalty=1.1, logits_processor=cold)


@both_orders
def test_max_time(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    assert generate(decoder, **ragged, max_new_tokens=30, max_time=0.0).shape == (4, 8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the letter chr(65 + i), so that ids and text are one to one."""
    core = Tokenizer(models.WordLevel({chr(65 + i): i for i in range(VOCAB)}, unk_token="A"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@both_orders
def test_stop_strings(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast
) -> None:
    one = {name: value[:1] for name, value in ragged.items()}
    text = tokenizer.decode(generate(decoder, **one, max_new_tokens=20)[0, 7:])
    new = expect_same(decoder, one, max_new_tokens=20, stop_strings=[text[5:8]], tokenizer=tokenizer)
    assert new.shape[1] <= 8
    with pytest.raises(InputError, match="tokenizer="):
        generate(decoder, **one, max_new_tokens=20, stop_strings=["AB"])


@both_orders
def test_streamer_hears_what_transformers_says(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    ends = ending_ids(decoder, ragged)
    wanted, got = ListStreamer(), ListStreamer()
    decoder.model.generate(**ragged, max_new_tokens=20, eos_token_id=ends, streamer=wanted)
    generate(decoder, **ragged, max_new_tokens=20, eos_token_id=ends, streamer=got)
    assert got.heard == wanted.heard
    assert got.heard[-1] == "end"


def test_text_streamer(
    decoder: RecomputingDecoder,
    ragged: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = {name: value[:1] for name, value in ragged.items()}
    out = generate(decoder, **one, max_new_tokens=9, streamer=transformers.TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0]).strip()
    with pytest.raises(ValueError, match="batch size 1"):
        generate(decoder, **ragged, max_new_tokens=9, streamer=transformers.TextStreamer(tokenizer))
    assert decoder.log == ["begin", "end"]


@both_orders
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_return_dict(decoder: RecomputingDecoder, ragged: dict[str, Tensor], penalty: float) -> None:
    options = {"max_new_tokens": 6, "repetition_penalty": penalty, "return_dict_in_generate": True}
    wanted = decoder.model.generate(**ragged, **options, output_scores=True, output_logits=True)
    got = generate(decoder, **ragged, **options, output_scores=True, output_logits=True)
    assert type(got) is type(wanted)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(got[name]), torch.stack(wanted[name]), atol=1e-5, rtol=1e-5)
    assert torch.equal(got.scores[0], got.logits[0]) == (penalty == 1.0)
    bare = generate(decoder, **ragged, **options)
    assert (bare.scores, bare.logits) == (None, None)
    # Without return_dict_in_generate the output flags mean nothing, as in transformers.
    assert isinstance(generate(decoder, **ragged, max_new_tokens=2, output_scores=True), Tensor)


@both_orders
def test_progress_writes_to_stderr(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    generate(decoder, **ragged, max_new_tokens=5, progress=True)
    shown = capsys.readouterr()
    assert "20/20" in shown.err
    assert "tokens/s" in shown.err
    assert shown.out == ""
    generate(decoder, **ragged, max_new_tokens=5)
    assert capsys.readouterr().err == ""
    ends = ending_ids(decoder, ragged)
    out = generate(decoder, **ragged, max_new_tokens=20, eos_token_id=ends, pad_token_id=-1, progress=True)
    made = int((out[:, 7:] != -1).sum())
    assert f"{made}/80" in capsys.readouterr().err, "padding is not a token made"


@both_orders
@pytest.mark.parametrize("progress", [False, True])
def test_interruption_frees_the_cache(decoder: RecomputingDecoder, ragged: dict[str, Tensor], progress: bool) -> None:
    wanted = generate(decoder, **ragged, max_new_tokens=8).tolist()
    decoder.log.clear()
    decoder.faults = {3: KeyboardInterrupt()}
    streamer = ListStreamer()
    with pytest.raises(KeyboardInterrupt):
        generate(decoder, **ragged, max_new_tokens=8, streamer=streamer, progress=progress)
    assert decoder.log == ["begin", "end"]
    assert len(streamer.heard) == 1 + 3 + 1
    assert streamer.heard[-1] == "end", "a reader of the stream in another thread must not wait for ever"
    decoder.faults = {}
    assert generate(decoder, **ragged, max_new_tokens=8).tolist() == wanted


@pytest.mark.parametrize(("error", "log"), [(MemoryError, ["end"]), (KeyboardInterrupt, ["end"]), (InputError, [])])
def test_failed_begin(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], error: type[BaseException], log: list[str]
) -> None:
    """A begin that broke off is ended; one that was refused must not end the generation that holds the cache."""

    def begin(rows: int, prompt_lengths: Tensor, new_tokens: int) -> None:
        raise error

    decoder.begin = begin  # type: ignore[method-assign]
    with pytest.raises(error):
        generate(decoder, **ragged, max_new_tokens=8)
    assert decoder.log == log


@both_orders
@pytest.mark.parametrize("sample", [False, True])
def test_nan_names_row_and_step(decoder: RecomputingDecoder, ragged: dict[str, Tensor], sample: bool) -> None:
    decoder.faults = {4: 2}
    with pytest.raises(LetheError, match=r"row 2, step 5: the model's logits are not finite") as caught:
        generate(decoder, **ragged, max_new_tokens=8, do_sample=sample)
    assert not isinstance(caught.value, InputError)
    assert decoder.log == ["begin", "end"]
    assert generate(decoder, **ragged, max_new_tokens=8, remove_invalid_values=True).shape == (4, 15)


@both_orders
@pytest.mark.parametrize("sample", [False, True])
def test_processors_that_forbid_everything(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], sample: bool
) -> None:
    with pytest.raises(InputError, match="row 0, step 1: the logits processors leave no token"):
        generate(decoder, **ragged, max_new_tokens=8, do_sample=sample, suppress_tokens=list(range(VOCAB)))


def test_order_of_a_step(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], traced: list[str], overlap: bool
) -> None:
    generate(decoder, **ragged, max_new_tokens=3)
    step = ["copy", "decode 4", "look"] if overlap else ["copy", "look", "decode 4"]
    assert traced == ["prefill", *step, *step, "copy", "look"], "nothing follows the longest sequence"


@pytest.mark.parametrize("pad", [PAD, None])
def test_step_after_the_last_end_has_no_active_row(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], traced: list[str], overlap: bool, pad: int | None
) -> None:
    """`StopAt` ends the rows at their steps 3, 5, 7 and 9; without a pad they go on together."""
    eos = None if pad is None else VOCAB - 1
    options = {"max_new_tokens": 30, "eos_token_id": eos, "suppress_tokens": [VOCAB - 1]}
    new = generate(decoder, **ragged, **options, stopping_criteria=[StopAt()])[:, 7:]
    assert new.shape == (4, 9)
    left = [4, 4, 3, 3, 2, 2, 1, 1] if pad is not None else [4] * 8
    assert traced.count("copy") == traced.count("look") == 9
    assert [step for step in traced if step.startswith("decode")] == [f"decode {n}" for n in left + [0] * overlap]
    assert traced[-2:] == (["decode 0", "look"] if overlap else ["copy", "look"])


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 5}, {"do_sample": True, "top_k": None, "seed": 5}])
def test_tokens_do_not_depend_on_the_order(
    decoder: RecomputingDecoder,
    ragged: dict[str, Tensor],
    traced: list[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    ends = [int(generate(decoder, **ragged, max_new_tokens=10, **options)[row, 7 + 3 * row]) for row in (0, 1, 2)]
    heard: list[Any] = []
    for overlap in (False, True):
        monkeypatch.setattr(generation, "_overlaps", lambda device, value=overlap: value)
        streamer = ListStreamer()
        out = generate(decoder, **ragged, max_new_tokens=40, eos_token_id=ends, streamer=streamer, **options)
        heard.append((out.tolist(), streamer.heard))
    assert heard[0] == heard[1]
    assert len(set((out[:, 7:] != PAD).sum(1).tolist())) > 1, "rows must end at different steps"


@both_orders
def test_step_that_cannot_be_run_does_not_hide_the_one_before(
    decoder: RecomputingDecoder, ragged: dict[str, Tensor], traced: list[str]
) -> None:
    decoder.faults = {3: MemoryError("pages")}
    streamer = ListStreamer()
    with pytest.raises(MemoryError, match="pages"):
        generate(decoder, **ragged, max_new_tokens=8, streamer=streamer)
    assert len(streamer.heard) == 1 + 3 + 1
    decoder.faults = {2: 1, 3: MemoryError("pages")}
    with pytest.raises(LetheError, match="row 1, step 3: the model's logits"):
        generate(decoder, **ragged, max_new_tokens=8)


@both_orders
def test_streamer_may_keep_what_it_hears(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    kept: list[Tensor] = []
    streamer = ListStreamer()
    streamer.put = kept.append  # type: ignore[method-assign]
    out = generate(decoder, **ragged, max_new_tokens=8, streamer=streamer)
    assert torch.stack(kept[1:], dim=1).tolist() == out[:, 7:].tolist()


def test_ids_of_custom_code_are_contiguous_and_stay(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    """As from transformers: `view` works on them, they may be kept, and the result is a tensor of its own."""
    kept: list[Tensor] = []

    def flatten(input_ids: Tensor, scores: Tensor) -> Tensor:
        kept.append(input_ids.view(-1))
        return scores

    out = generate(decoder, **ragged, max_new_tokens=30, logits_processor=[flatten], stopping_criteria=[StopAt()])
    assert len(kept) == 9
    assert [ids.tolist() for ids in kept] == [out[:, : 7 + step].flatten().tolist() for step in range(9)]
    for criteria in ([], [StopAt()]):
        out = generate(decoder, **ragged, max_new_tokens=30, stopping_criteria=criteria)
        assert out.is_contiguous()
        assert out.untyped_storage().nbytes() == out.numel() * 8


@both_orders
def test_no_criterion_exceeds_what_was_begun(decoder: RecomputingDecoder, ragged: dict[str, Tensor]) -> None:
    longest = transformers.MaxLengthCriteria(12)

    def raise_limit(input_ids: Tensor, scores: Tensor) -> Tensor:
        longest.max_length = 40
        return scores

    out = generate(decoder, **ragged, max_new_tokens=3, stopping_criteria=[longest], logits_processor=[raise_limit])
    assert out.shape == (4, 12)
    assert decoder.new_tokens == 5


def rule(sample: bool, device: str = "cpu") -> generation._Rule:
    lists = transformers.LogitsProcessorList(), transformers.StoppingCriteriaList()
    return generation._Rule(*lists, None, sample, torch.Generator(device).manual_seed(1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("vocab", [1, 7, 48, 5003])
def test_soundness_is_that_of_the_best_score(vocab: int, sample: bool, device: str) -> None:
    """No reduction but the argmax is run, yet a NaN or inf anywhere in a row is seen."""
    scores = torch.randn(64, vocab, device=device)
    for row, column in enumerate(torch.randint(vocab, (64,)).tolist()):
        scores[row, column] = [torch.nan, torch.inf, -torch.inf, 3.0][row % 4]
    scores[3::8] = -torch.inf
    scores[0::8, 0] = -torch.inf if vocab > 1 else torch.nan
    tokens, sound = rule(sample, device).choose(scores)
    best = scores.amax(dim=-1)
    expected = best.isfinite() if sample else best > -torch.inf
    assert sound.tolist() == expected.tolist()
    assert 0 < int(expected.sum()) < 64 or vocab == 1
    assert (tokens >= 0).all() and (tokens < vocab).all()


class Launches(TorchDispatchMode):
    """Names of the operations that read or write a tensor as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(one, Tensor) and one.shape[-1:] == (VOCAB,) for one in (*args, out)):
            self.names.append(func.overloadpacket.__name__)
        return out


def test_greedy_step_reads_the_logits_once() -> None:
    record = generation._Record(GenerationConfig())
    with Launches() as launches:
        logits = torch.randn(4, VOCAB)
        launches.names.clear()
        scores, _ = generation._scores(rule(False), record, GOOD, logits, torch.ones(4, dtype=torch.bool))
        rule(False).choose(scores)
    assert launches.names == ["argmax", "gather"]


def tensor(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


GOOD = tensor([5, 6, 7])
BAD_CALLS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "empty batch": (lambda: {"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"not \[0, 4\]"),
    "empty prompt": (lambda: {"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"not \[2, 0\]"),
    "rank": (lambda: {"input_ids": torch.tensor([1, 2])}, r"\[rows, prompt\].*not \[2\]"),
    "float ids": (lambda: {"input_ids": GOOD.float()}, "torch.float32"),
    "list": (lambda: {"input_ids": [[1, 2]]}, "not list"),
    "id too large": (lambda: {"input_ids": tensor([5, 6], [7, VOCAB])}, rf"input_ids\[1, 1\] is {VOCAB}, outside"),
    "negative id": (lambda: {"input_ids": tensor([5, -1])}, r"input_ids\[0, 1\] is -1, outside"),
    "two prompts": (lambda: {"inputs": GOOD, "input_ids": GOOD}, "pass one"),
    "no prompt": (lambda: {"bos_token_id": None}, "no prompt"),
    "device": (lambda: {"input_ids": GOOD.to("meta")}, "is on meta and the model on cpu"),
    "mask device": (lambda: {"input_ids": GOOD, "attention_mask": torch.ones_like(GOOD, device="meta")}, "on meta"),
    "mask shape": (lambda: {"input_ids": GOOD, "attention_mask": torch.ones(1, 4)}, r"\[1, 3\], not \[1, 4\]"),
    "mask rank": (lambda: {"input_ids": GOOD, "attention_mask": torch.ones(1, 1, 3, 3)}, "must have the shape"),
    "mask values": (lambda: {"input_ids": GOOD, "attention_mask": tensor([0, 1, 2])}, "other values"),
    "masked row": (lambda: {"input_ids": tensor([5, 6], [7, 8]), "attention_mask": tensor([0, 1], [0, 0])}, "row 1: "),
    "right padding": (lambda: {"input_ids": tensor([5, 6], [7, 8]), "attention_mask": tensor([1, 1], [1, 0])}, "row 1"),
    "hole": (lambda: {"input_ids": GOOD, "attention_mask": tensor([1, 0, 1])}, "padded on the left only"),
    "inferred hole": (lambda: {"input_ids": tensor([5, PAD, 7])}, "row 0: the mask inferred from pad_token_id"),
    "no new tokens": (lambda: {"input_ids": GOOD, "max_new_tokens": 0}, "greater than 0"),
    "negative new tokens": (lambda: {"input_ids": GOOD, "max_new_tokens": -3}, "greater than 0"),
    "fractional length": (lambda: {"input_ids": GOOD, "max_new_tokens": 2.5}, "max_new_tokens must be an int"),
    "text length": (lambda: {"input_ids": GOOD, "max_new_tokens": "8"}, "generate: "),
    "max_length in the prompt": (lambda: {"input_ids": GOOD, "max_new_tokens": None, "max_length": 3}, "already"),
    "too long": (lambda: {"input_ids": GOOD, "max_new_tokens": 62}, rf"need 65 positions.*has {POSITIONS}: shorten"),
    "prompt too long": (
        lambda: {"input_ids": GOOD.repeat(1, 30), "max_new_tokens": None, "max_length": 20},
        "need 91 positions",
    ),
    "typo": (lambda: {"input_ids": GOOD, "max_new_token": 4}, r"\['max_new_token'\]; did you mean 'max_new_tokens'"),
    "temperature": (lambda: {"input_ids": GOOD, "do_sample": True, "temperature": 0.0}, "temperature"),
    "top_p": (lambda: {"input_ids": GOOD, "do_sample": True, "top_p": 1.5}, "top_p"),
    "greedy copies": (lambda: {"input_ids": GOOD, "num_return_sequences": 2}, "num_return_sequences"),
    "no copies": (lambda: {"input_ids": GOOD, "do_sample": True, "num_return_sequences": 0}, "positive int, not 0"),
    "bare processor": (lambda: {"input_ids": GOOD, "logits_processor": PreferOdd()}, "logits_processor must be a list"),
    "config type": (lambda: {"input_ids": GOOD, "generation_config": {"top_k": 3}}, "not dict"),
    "seed": (lambda: {"input_ids": GOOD, "seed": "0"}, "seed must be an int"),
    "end without padding": (
        lambda: {
            "input_ids": GOOD,
            "pad_token_id": None,
            "stopping_criteria": [transformers.EosTokenCriteria(3)],
        },
        "set pad_token_id",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_before_any_work(decoder: RecomputingDecoder, name: str) -> None:
    arguments, message = BAD_CALLS[name]
    with pytest.raises(InputError, match=message):
        generate(decoder, **{"max_new_tokens": 4, **arguments()})
    assert decoder.log == []


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2},
        {"num_beam_groups": 2},
        {"constraints": [object()]},
        {"force_words_ids": [[5]]},
        {"penalty_alpha": 0.6},
        {"guidance_scale": 1.5},
        {"negative_prompt_ids": GOOD},
        {"dola_layers": "low"},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"inputs_embeds": torch.zeros(1, 3, 32)},
        {"position_ids": GOOD},
        {"assistant_model": object()},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"use_mtp": True},
        {"token_healing": True},
        {"synced_gpus": True},
        {"custom_generate": "there"},
        {"past_key_values": object()},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 128},
        {"disable_compile": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_unsupported_options_are_named(decoder: RecomputingDecoder, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(InputError, match=f"does not support {name}="):
        generate(decoder, GOOD, max_new_tokens=4, **option)
    assert decoder.log == []


def test_neutral_values_are_accepted(decoder: RecomputingDecoder) -> None:
    neutral = {"num_beams": 1, "use_cache": True, "guidance_scale": 1, "assistant_model": None, "synced_gpus": False}
    assert generate(decoder, GOOD, max_new_tokens=2, **neutral).shape == (1, 5)


class TableDecoder:
    """On a GPU: the logits depend on the last token alone, so that a step is one lookup."""

    vocab_size = 1000
    max_positions = None
    device = torch.device("cuda")

    def __init__(self) -> None:
        self.table = torch.randn(1000, 1000, generator=torch.Generator("cuda").manual_seed(0), device="cuda")

    def begin(self, rows: int, prompt_lengths: Tensor, new_tokens: int) -> None: ...

    def end(self) -> None: ...

    def prefill(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        return self.table[input_ids.gather(1, lengths[:, None] - 1)[:, 0]]

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        return self.table[tokens]


@pytest.mark.gpu
def test_gpu_draws_what_multinomial_draws() -> None:
    decoder, prompt = TableDecoder(), torch.arange(5, 21, device="cuda")[:, None]
    torch.manual_seed(3)
    tokens, wanted = prompt[:, 0], [prompt[:, 0]]
    for _ in range(12):
        tokens = torch.multinomial(decoder.table[tokens].softmax(-1), 1)[:, 0]
        wanted.append(tokens)
    got = generate(decoder, prompt, max_new_tokens=12, do_sample=True, top_k=None, seed=3)
    assert got.tolist() == torch.stack(wanted, dim=1).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_gpu_never_waits_for_the_host(options: dict[str, Any]) -> None:
    decoder, prompt = TableDecoder(), torch.arange(5, 21, device="cuda")[:, None]

    def waits(new_tokens: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                generate(decoder, prompt, max_new_tokens=new_tokens, eos_token_id=1, pad_token_id=0, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    waits(2)
    assert waits(24) == waits(4)


def test_import_is_light() -> None:
    code = "import sys, lethe_compile.generation; print('transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"

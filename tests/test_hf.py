"""`as_hf`: transformers' loops over an optimized model, against the original model and `OptimizedModel.generate`."""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

import lethe_compile as lethe
from lethe_compile.hf_cache import LetheCache
from lethe_compile.models.plain_decoder import plain
from lethe_compile.models.tiny import tiny

PRUNING = lethe.LetheConfig(
    sparse_ratio=1.5, decay=0.9, prune_threshold=20, prune_interval=5, page_size=4, protect_prompt=False
)
LITERAL = lethe.LetheConfig(
    sparse_ratio=1.05, decay=0.8, score="sum", prune_threshold=18, prune_interval=3, paper_literal=True, page_size=2
)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Trio:
    """A model, what `optimize` made of it, and that as transformers sees it."""

    def __init__(self, name: str, config: lethe.LetheConfig) -> None:
        self.model: Any = tiny(name)
        self.fast = lethe.optimize(self.model, config)
        self.hf: Any = self.fast.as_hf()


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def full(request: pytest.FixtureRequest) -> Trio:
    """Nothing is evicted: all is as in transformers. Gemma has sliding layers, GPT-2 learned positions."""
    return Trio(request.param, lethe.LetheConfig(policy="full", page_size=4))


@pytest.fixture(scope="module")
def llama() -> Trio:
    return Trio("llama", lethe.LetheConfig(policy="full", page_size=4))


@pytest.fixture(scope="module")
def pruned() -> Trio:
    return Trio("llama", PRUNING)


def ragged(rows: int = 3, tokens: int = 14) -> dict[str, Tensor]:
    """Prompts of unequal length, padded on the left."""
    ids, mask = torch.randint(3, 97, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : row * tokens // rows] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def loop(model: Any, prompt: dict[str, Tensor], new: int) -> Tensor:
    """A decode loop as people write them, on nothing but `forward`; the new tokens ``[rows, new]``."""
    mask, ids, past, chosen = prompt["attention_mask"], prompt["input_ids"], None, []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for _ in range(new):
            out = model(
                ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True, logits_to_keep=1
            )
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            chosen.append(ids)
            mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions[:, -1:] + 1
    return torch.cat(chosen, 1)


# ---------------------------------------------------------------------------------------------------------- generation


def test_it_is_a_model_to_transformers(llama: Trio) -> None:
    assert isinstance(llama.hf, PreTrainedModel) and isinstance(llama.hf, GenerationMixin)
    assert llama.hf.can_generate() and llama.hf.config is llama.model.config
    assert llama.hf.device == llama.model.device and llama.hf.dtype == llama.model.dtype
    assert {p.data_ptr() for p in llama.hf.parameters()} == {p.data_ptr() for p in llama.model.parameters()}
    mine, its = llama.hf.generation_config.to_dict(), llama.model.generation_config.to_dict()
    assert {name for name in its if mine.get(name) != its[name]} <= {"use_cache"}


@pytest.mark.slow
def test_the_original_config_stays_as_it_was() -> None:
    model = tiny("llama", num_hidden_layers=1)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        before = copy.deepcopy(vars(model.config))
        lethe.optimize(model, verified=False).as_hf()
        assert vars(model.config) == before


@pytest.mark.parametrize("rows", [1, 3])
def test_every_way_to_generate_gives_transformers_tokens(full: Trio, rows: int) -> None:
    prompt = ragged(rows)
    expected = full.model.generate(**prompt, max_new_tokens=20, **GREEDY)
    assert torch.equal(full.hf.generate(**prompt, max_new_tokens=20, **GREEDY), expected)
    assert torch.equal(GenerationMixin.generate(full.hf, **prompt, max_new_tokens=20, **GREEDY), expected)
    assert torch.equal(loop(full.hf, prompt, 20), expected[:, -20:])
    assert torch.equal(loop(full.model, prompt, 20), expected[:, -20:]), "the loop itself must be right"


def test_sampling_draws_the_same_tokens(llama: Trio) -> None:
    prompt, ways = ragged(), []
    for way in (llama.model.generate, llama.hf.generate, lambda **o: GenerationMixin.generate(llama.hf, **o)):
        torch.manual_seed(5)
        ways.append(way(**prompt, max_new_tokens=15, do_sample=True, top_k=20, temperature=1.3, num_return_sequences=2))
    assert ways[0].shape[0] == 6
    assert torch.equal(ways[1], ways[0]) and torch.equal(ways[2], ways[0])


@pytest.mark.parametrize("config", [PRUNING, LITERAL], ids=["lethe", "literal"])
@pytest.mark.parametrize("ends", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transformers_loop_prunes_as_generate_does(config: lethe.LetheConfig, ends: bool) -> None:
    """Also where rows end early: in a literal batch, a row that goes on would change the others' keep-sets."""
    trio, prompt = Trio("llama", config), ragged()
    options: dict[str, Any] = {**prompt, **GREEDY, "max_new_tokens": 60, "repetition_penalty": 1.5}  # for varied tokens
    if ends:
        first, _, last = trio.fast.generate(**options)[:, 14:].tolist()
        options["eos_token_id"] = next(token for token in first[9:] if token not in last)
    expected = trio.fast.generate(**options)
    stats = trio.fast.cache_stats()
    written = stats.to_json()
    assert all(layer[2] >= 2 for layer in stats.rounds)
    assert torch.equal(GenerationMixin.generate(trio.hf, **options), expected)
    assert trio.fast.cache_stats().to_json() == written
    assert torch.equal(trio.hf.generate(**options), expected)
    assert not torch.equal(trio.model.generate(**options), expected), "evictions must show to prove anything"
    assert trio.fast.cache.bytes_in_use == 0
    if ends:
        assert expected[0, -1] == 0 != expected[2, -10]


def test_a_loop_of_ones_own_prunes(pruned: Trio) -> None:
    prompt = ragged()
    expected = pruned.fast.generate(**prompt, max_new_tokens=60, **GREEDY)
    stats = pruned.fast.cache_stats()
    assert torch.equal(loop(pruned.hf, prompt, 60), expected[:, -60:])
    assert pruned.fast.cache_stats().rounds == stats.rounds
    assert pruned.fast.cache.bytes_in_use == 0, "the session ended with the last object that could go on with it"


def test_scores_and_logits_are_returned(llama: Trio) -> None:
    options = {**ragged(), **GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    expected = llama.model.generate(**options, output_scores=True)
    for out in (
        llama.hf.generate(**options, output_scores=True),
        GenerationMixin.generate(llama.hf, **options, output_scores=True),
    ):
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


def test_a_custom_generate_runs_on_the_pruned_cache(pruned: Trio) -> None:
    def greedy(model: Any, input_ids: Tensor, generation_config: GenerationConfig, **options: Any) -> Tensor:
        new = loop(model, {"input_ids": input_ids, "attention_mask": options["attention_mask"]}, 40)
        return torch.cat([input_ids, new], 1)

    prompt = ragged()
    expected = pruned.fast.generate(**prompt, max_new_tokens=40, **GREEDY)
    assert torch.equal(pruned.hf.generate(**prompt, custom_generate=greedy, max_new_tokens=40), expected)


def test_defaults_come_from_its_own_generation_config() -> None:
    trio = Trio("llama", lethe.LetheConfig(policy="full"))
    trio.model.generation_config.cache_implementation = "static"
    hf: Any = trio.fast.as_hf()
    assert hf.generation_config.cache_implementation is None, "hints to transformers' runtime are not for this one"
    hf.generation_config.max_new_tokens, hf.generation_config.eos_token_id = 7, None
    ids = ragged(1)["input_ids"]
    expected = trio.model.generate(ids, max_new_tokens=7, cache_implementation="dynamic", **GREEDY)
    assert torch.equal(hf.generate(ids), expected)
    assert torch.equal(GenerationMixin.generate(hf, ids), expected)
    assert trio.model.generation_config.max_new_tokens is None


# ------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_gives_the_logits_of_every_token(full: Trio, use_cache: bool, side: str) -> None:
    prompt = ragged()
    mask = prompt["attention_mask"] if side == "left" else prompt["attention_mask"].flip(1)
    ids = torch.randint(97, mask.shape)  # padding may be any token
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"input_ids": ids, "attention_mask": mask, "use_cache": use_cache}
    with torch.no_grad():
        expected = full.model(**options, position_ids=positions).logits
    for given in ({}, {"position_ids": positions}):
        out = full.hf(**options, **given)
        torch.testing.assert_close(out.logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
        assert (out.past_key_values is not None) is use_cache


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4, 8])])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_to_keep(llama: Trio, keep: int | Tensor, use_cache: bool) -> None:
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        expected = llama.model(ids, logits_to_keep=keep).logits
    got = llama.hf(ids, logits_to_keep=keep, use_cache=use_cache).logits
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_labels_give_a_loss_and_tuples_are_returned_on_request(llama: Trio) -> None:
    ids = torch.randint(97, (2, 9))
    expected = llama.model(ids, labels=ids).loss
    for use_cache in (True, False):
        torch.testing.assert_close(llama.hf(ids, labels=ids, use_cache=use_cache).loss, expected.detach())
    loss, logits = llama.hf(ids, labels=ids, use_cache=False, return_dict=False)
    assert torch.equal(logits, llama.hf(ids, use_cache=False).logits) and loss.dim() == 0


def test_tokens_are_appended_several_at_a_time(full: Trio) -> None:
    ids = torch.randint(97, (2, 21))
    with torch.no_grad():
        expected = full.model(ids).logits
    out = full.hf(ids[:, :8])
    past, logits = out.past_key_values, [out.logits]
    assert isinstance(past, LetheCache) and past.get_seq_length() == 8 and len(past) == len(full.fast.sites)
    for start, stop in ((8, 15), (15, 16), (16, 21)):
        logits.append(full.hf(ids[:, start:stop], past_key_values=past).logits)
        assert past.get_seq_length() == stop
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_prefill_in_chunks(llama: Trio) -> None:
    ids = torch.randint(3, 97, (2, 20))
    expected = llama.model.generate(ids, max_new_tokens=9, **GREEDY)
    got = GenerationMixin.generate(llama.hf, ids, max_new_tokens=9, prefill_chunk_size=6, **GREEDY)
    assert torch.equal(got, expected)


def test_a_conversation_goes_on_from_its_cache(llama: Trio) -> None:
    """Two turns, the second without a prefill of the first; transformers with its own cache agrees."""
    first, second = torch.randint(3, 97, (1, 12)), torch.randint(3, 97, (1, 6))
    answers = []
    for model, past in ((llama.model, DynamicCache(config=llama.model.config)), (llama.hf, llama.hf.new_cache())):
        one = model.generate(first, past_key_values=past, max_new_tokens=8, **GREEDY)
        assert past.get_seq_length() == 19
        two = model.generate(torch.cat([one, second], 1), past_key_values=past, max_new_tokens=8, **GREEDY)
        answers.append(two.tolist())
    assert answers[0] == answers[1]
    out = GenerationMixin.generate(llama.hf, first, max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
    out = GenerationMixin.generate(
        llama.hf, torch.cat([out.sequences, second], 1), past_key_values=out.past_key_values, max_new_tokens=8, **GREEDY
    )
    assert out.tolist() == answers[0]


def test_rows_that_end_by_their_mask_free_their_cache(llama: Trio) -> None:
    ids = torch.randint(3, 97, (2, 6))
    past, mask = llama.hf(ids).past_key_values, torch.ones(2, 6, dtype=torch.int64)
    for _ in range(40):
        mask = torch.cat([mask, torch.tensor([[1], [0]])], 1)
        llama.hf(torch.tensor([[5], [500]]), attention_mask=mask, past_key_values=past)  # padding may be any id
    assert llama.fast.cache_stats().seen == [46, 6]
    with pytest.raises(lethe.InputError, match=r"row 1: .*a row that ended cannot go on"):
        llama.hf(ids[:, :1], attention_mask=torch.cat([mask, torch.ones(2, 1)], 1), past_key_values=past)


# ------------------------------------------------------------------------------------------------------------ sessions


def test_the_newest_session_has_the_cache(llama: Trio) -> None:
    ids = torch.randint(97, (2, 9))
    first = llama.hf(ids).past_key_values
    second = llama.hf(ids).past_key_values
    assert not first.is_open and second.is_open
    assert "ended, 2 rows, 9 columns" in repr(first)
    with pytest.raises(lethe.InputError, match="ended when another began"):
        llama.hf(ids[:, :1], past_key_values=first)
    llama.hf(ids[:, :1], past_key_values=second)
    llama.fast.generate(ids, max_new_tokens=2, **GREEDY)
    with pytest.raises(lethe.InputError, match="ended when another began"):
        llama.hf(ids[:, :1], past_key_values=second)
    assert llama.fast.cache.bytes_in_use == 0


def test_a_session_cannot_take_the_cache_of_generate(llama: Trio) -> None:
    ids = torch.randint(97, (1, 9))

    def nested(tokens: Tensor, scores: Tensor) -> Tensor:
        llama.hf(tokens)
        return scores

    def beside(tokens: Tensor, scores: Tensor) -> Tensor:
        llama.hf(tokens, use_cache=False)
        return scores

    with pytest.raises(lethe.InputError, match="generating already"):
        llama.hf.generate(ids, max_new_tokens=3, logits_processor=[nested], **GREEDY)
    with pytest.raises(lethe.InputError, match="ended when another began"):
        GenerationMixin.generate(llama.hf, ids, max_new_tokens=3, logits_processor=[nested], **GREEDY)
    for generate in (llama.hf.generate, lambda *a, **o: GenerationMixin.generate(llama.hf, *a, **o)):
        assert generate(ids, max_new_tokens=3, logits_processor=[beside], **GREEDY).shape == (1, 12)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_loop_frees_the_cache(llama: Trio, error: type[BaseException]) -> None:
    def fail(tokens: Tensor, scores: Tensor) -> Tensor:
        if tokens.shape[1] > 12:
            raise error
        return scores

    with pytest.raises(error):
        GenerationMixin.generate(llama.hf, torch.randint(97, (1, 9)), max_new_tokens=9, logits_processor=[fail])
    assert llama.fast.cache.bytes_in_use == 0
    llama.fast.generate(torch.randint(97, (1, 9)), max_new_tokens=2, **GREEDY)


def test_a_session_dies_with_its_object_and_can_be_reset(llama: Trio) -> None:
    ids = torch.randint(97, (2, 9))
    past = llama.hf(ids).past_key_values
    assert llama.fast.cache.bytes_in_use > 0
    past.reset()
    assert llama.fast.cache.bytes_in_use == 0 and past.get_seq_length() == 0
    again = llama.hf(ids, past_key_values=past).logits
    torch.testing.assert_close(again, llama.model(ids).logits, rtol=1e-4, atol=1e-4)
    del past
    gc.collect()
    assert llama.fast.cache.bytes_in_use == 0


def test_other_adapters_of_the_model_share_its_one_cache(llama: Trio) -> None:
    ids, other = torch.randint(97, (2, 9)), llama.fast.as_hf()
    first = llama.hf(ids).past_key_values
    assert first.is_open and other(ids).past_key_values.is_open
    assert not first.is_open


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "num_beams=2: beams would have to fork"),
        ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0}, "num_beams|num_beam_groups"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3: drafted tokens"),
        ({"assistant_model": tiny("llama", num_hidden_layers=1)}, "assistant_model|assisted"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"dola_layers": "high"}, "dola_layers"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
)
def test_what_needs_another_cache_is_refused(llama: Trio, options: dict[str, Any], reason: str) -> None:
    ids = torch.randint(97, (2, 9))
    with pytest.raises(lethe.InputError, match=reason):
        llama.hf.generate(ids, max_new_tokens=4, **options)
    with pytest.raises(lethe.InputError, match=reason):
        GenerationMixin.generate(llama.hf, ids, max_new_tokens=4, **options)
    assert llama.fast.cache.bytes_in_use == 0


def test_more_than_the_positions_is_refused(llama: Trio) -> None:
    past = llama.hf(torch.ones(1, 510, dtype=torch.int64), logits_to_keep=1).past_key_values
    llama.hf(torch.ones(1, 2, dtype=torch.int64), past_key_values=past)
    with pytest.raises(lethe.InputError, match="row 0: the model has 512 positions"):
        llama.hf(torch.ones(1, 1, dtype=torch.int64), past_key_values=past)


def test_a_batch_that_cannot_fit_is_refused_before_its_loop() -> None:
    fast = lethe.optimize(tiny("llama"), policy="full", verified=False, kv_memory=40_000)
    with pytest.raises(lethe.InputError, match="bytes are allowed"):
        GenerationMixin.generate(fast.as_hf(), torch.randint(97, (4, 9)), max_new_tokens=200)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"attention_mask": torch.ones(2, 1)}, r"attention_mask must be \[2, 10\].* not \[2, 1\]"),
        ({"attention_mask": torch.ones(2, 1, 1, 10)}, r"not \[2, 1, 1, 10\]"),
        ({"attention_mask": torch.arange(10).ne(4).repeat(2, 1)}, "row 0: .*cannot be changed"),
        ({"position_ids": torch.tensor([[9], [8]])}, "row 1: position_ids must go on counting"),
        ({"position_ids": torch.ones(2, 3)}, r"position_ids must be \[2, 1\]"),
        ({"input_ids": torch.ones(3, 1, dtype=torch.int64)}, "input_ids has 3 rows, and past_key_values 2"),
        ({"input_ids": torch.full((2, 1), 97)}, "outside the vocabulary"),
        ({"past_key_values": DynamicCache()}, r"new_cache\(\), not another DynamicCache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.ones(2, 1, 64)}, "inputs_embeds"),
        ({"input_ids": None}, "input_ids must be a tensor"),
    ],
)
def test_a_step_at_odds_with_its_session_is_refused(llama: Trio, call: dict[str, Any], reason: str) -> None:
    past = llama.hf(torch.randint(97, (2, 9))).past_key_values
    good = {"input_ids": torch.ones(2, 1, dtype=torch.int64), "past_key_values": past}
    with pytest.raises(lethe.InputError, match=reason):
        llama.hf(**{**good, **call})
    llama.hf(**good)
    assert past.get_seq_length() == 10, "a refusal changes nothing"


def test_a_padded_prompt_needs_its_mask_in_every_step(llama: Trio) -> None:
    past = llama.hf(**ragged()).past_key_values
    with pytest.raises(lethe.InputError, match="pass attention_mask with all 15 columns"):
        llama.hf(torch.ones(3, 1, dtype=torch.int64), past_key_values=past)
    with pytest.raises(lethe.InputError, match="row 0: attention_mask hides all 4 tokens"):
        llama.hf(torch.ones(1, 4, dtype=torch.int64), attention_mask=torch.zeros(1, 4))
    with pytest.raises(lethe.InputError, match="row 1: position_ids must count"):
        llama.hf(**ragged(), position_ids=torch.arange(14)[None])


def test_a_cache_is_neither_cropped_nor_forked(llama: Trio) -> None:
    past = llama.hf(torch.randint(97, (2, 9))).past_key_values
    index = torch.tensor([1, 0])
    for call in (
        lambda: past.crop(3),
        lambda: past.reorder_cache(index),
        lambda: past.batch_repeat_interleave(2),
        lambda: past.batch_select_indices(index),
        lambda: past.update(index, index, 0),
        past.activate_past_recording,
        lambda: copy.copy(past),
        lambda: copy.deepcopy(past),
    ):
        with pytest.raises(lethe.InputError, match="past_key_values"):
            call()
    assert not past.is_croppable and not past.is_compileable
    assert past.batch_size == 2 and past.get_max_length() == 512


def test_it_stays_where_it_was_compiled(llama: Trio) -> None:
    assert llama.hf.to("cpu") is llama.hf and llama.hf.float() is llama.hf
    for move in (lambda: llama.hf.to("meta"), llama.hf.half, lambda: llama.hf.to(torch.bfloat16)):
        with pytest.raises(lethe.InputError, match="optimize the model where it is to run"):
            move()
    with pytest.raises(lethe.InputError, match="save that"):
        llama.hf.save_pretrained("nowhere")
    with pytest.raises(lethe.InputError, match="continuous batching"):
        llama.hf.init_continuous_batching()


def test_only_a_transformers_model_can_be_one() -> None:
    with pytest.raises(lethe.InputError, match=r"optimize\(\) the transformers model itself"):
        lethe.optimize(plain(), verified=False).as_hf()


def test_transformers_finds_nothing_to_complain_about(llama: Trio, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        GenerationMixin.generate(llama.hf, **ragged(), max_new_tokens=3, **GREEDY)
        llama.hf.generate(**ragged(), max_new_tokens=3, **GREEDY)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.gpu
def test_transformers_loop_over_replayed_steps() -> None:
    """On a GPU a step overwrites the logits of the one before, and the cache has rows that no sequence fills."""
    fast = lethe.optimize(tiny("llama").cuda(), PRUNING)
    hf, prompt = fast.as_hf(), {name: value.cuda() for name, value in ragged().items()}
    expected = fast.generate(**prompt, max_new_tokens=60, **GREEDY)
    assert all(min(layer) >= 1 for layer in fast.cache_stats().rounds)
    assert torch.equal(GenerationMixin.generate(hf, **prompt, max_new_tokens=60, **GREEDY), expected)
    assert torch.equal(loop(hf, prompt, 60), expected[:, -60:])

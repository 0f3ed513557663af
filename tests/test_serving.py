"""`lethe.Engine`: tokens as alone, streaming, cancelling, refusals, ends, and failures that reach every request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.models.tiny import tiny
from lethe_compile.serving.loop import Loop
from tests.hybrids import CONFIGS as HYBRIDS
from tests.hybrids import hybrid

CONFIG = lethe.LetheConfig(sparse_ratio=5.0, prune_threshold=16, prune_interval=4, page_size=4)
CAPPED: dict[str, Any] = {"prune_interval": 4, "page_size": 4, "max_tokens": 24}
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
LENGTHS = ((1, 30), (9, 45), (25, 20), (14, 1), (30, 40))  # tokens of prompt, and new ones
SECONDS = 60.0


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 97, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(fast: lethe.OptimizedModel, ids: list[int], new: int, **options: Any) -> list[int]:
    chosen = {**GREEDY, "eos_token_id": None, **options}
    out: Tensor = fast.generate(torch.tensor([ids]), max_new_tokens=new, **chosen)
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def model() -> lethe.OptimizedModel:
    return lethe.optimize(tiny("llama"), CONFIG, verified=False)


@pytest.fixture
def fast(model: lethe.OptimizedModel) -> Iterator[lethe.OptimizedModel]:
    yield model
    model.take_back()


def check_as_alone(fast: lethe.OptimizedModel, **options: Any) -> list[lethe.Request]:
    prompts = [(prompt(tokens), new) for tokens, new in LENGTHS]
    right = [alone(fast, ids, new, **options) for ids, new in prompts]
    with lethe.Engine(fast, max_batch=3, prefill_chunk=8) as engine:
        chosen = {"do_sample": False, "ignore_eos": True, **options}
        requests = [engine.submit(ids, max_new_tokens=new, **chosen) for ids, new in prompts]
        assert [request.result(SECONDS).tokens for request in requests] == right
    assert all(request.finish_reason == "length" for request in requests)
    return requests


# --- tokens ---------------------------------------------------------------------------------------------


def test_tokens_are_those_of_each_prompt_alone(fast: lethe.OptimizedModel) -> None:
    requests = check_as_alone(fast)
    assert sum(request.stats.rounds for request in requests) >= 5, "what is never pruned shows nothing"


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 3},
        {"do_sample": True, "temperature": 1.3, "top_k": 0, "typical_p": 0.8, "seed": 4},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["vectorised", "typical", "penalties"],
)
def test_drawn_and_processed_tokens_are_those_of_generate(fast: lethe.OptimizedModel, options: dict[str, Any]) -> None:
    check_as_alone(fast, **options)


def test_parameters_are_each_requests_own(fast: lethe.OptimizedModel) -> None:
    ids, kinds = prompt(9), [
        {"do_sample": False},
        {"do_sample": True, "seed": 1, "temperature": 2.0},
        {"do_sample": True, "seed": 2, "temperature": 2.0, "top_p": 0.5},
        {"do_sample": True, "seed": 1, "temperature": 2.0, "top_k": 3},
        {"do_sample": False, "repetition_penalty": 2.0},
    ]  # fmt: skip
    right = [alone(fast, ids, 20, **kind) for kind in kinds]
    assert len({tuple(tokens) for tokens in right}) == len(kinds)
    with lethe.Engine(fast, max_batch=8) as engine:
        requests = [engine.submit(ids, max_new_tokens=20, ignore_eos=True, **kind) for kind in kinds]
        assert [request.result(SECONDS).tokens for request in requests] == right


@pytest.mark.parametrize("policy", ["full", "snapkv", "random"])
def test_policies(fast: lethe.OptimizedModel, policy: str) -> None:
    """Those that look at the newest queries alone clear scores before each row's own round."""
    settings = {**CAPPED, "max_tokens": None} if policy == "full" else CAPPED
    fast.reconfigure(lethe.LetheConfig(policy=policy, **settings))
    try:
        requests = check_as_alone(fast)
    finally:
        fast.reconfigure(CONFIG)
    assert (sum(request.stats.rounds for request in requests) > 5) == (policy != "full")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "qwen3", "deepseek_v3", "deepseek_v32", "gpt_oss", "bloom", "doge"])
def test_architectures(name: str) -> None:
    check_as_alone(lethe.optimize(tiny(name), CONFIG, verified=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HYBRIDS))
def test_other_state_joins_and_leaves_with_its_row(name: str) -> None:
    check_as_alone(lethe.optimize(hybrid(name), CONFIG, verified=False))


@pytest.mark.slow
def test_kv_heads_with_tokens_of_their_own() -> None:
    check_as_alone(lethe.optimize(tiny("llama"), CONFIG, policy="lethe-heads", verified=False))


def test_drawn_tokens_survive_a_preemption(fast: lethe.OptimizedModel) -> None:
    """What is fed again is not drawn again."""
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5}
    right = [alone(fast, prompt(20), 40, seed=seed, **options) for seed in range(4)]
    memory = fast.cache.bytes_for(np.full((len(fast.caches), 1), 60)) * 2
    with lethe.Engine(fast, kv_memory=memory, under_pressure="preempt") as engine:
        each = [engine.submit(prompt(20), max_new_tokens=40, ignore_eos=True, seed=n, **options) for n in range(4)]
        assert [request.result(SECONDS).tokens for request in each] == right
        stats = engine.stats()
    assert stats.preemptions and not stats.pressed and stats.recomputed_tokens


def test_stop_tokens_end_a_request_with_them(fast: lethe.OptimizedModel) -> None:
    ids = prompt(9)
    free = alone(fast, ids, 30)
    stop = next(token for token in free[5:] if token not in free[:5])
    with lethe.Engine(fast) as engine:
        done = engine.submit(ids, max_new_tokens=30, do_sample=False, ignore_eos=True, stop_token_ids=[stop]).result(
            SECONDS
        )
    assert done.finish_reason == "stop" and done.tokens == free[: free.index(stop) + 1]


def test_logprobs(fast: lethe.OptimizedModel) -> None:
    ids = prompt(9)
    with lethe.Engine(fast) as engine:
        done = engine.submit(ids, max_new_tokens=3, temperature=1.0, seed=1, logprobs=2, ignore_eos=True).result(
            SECONDS
        )
    first = fast(torch.tensor([ids]))[0, -1].log_softmax(0)
    assert [one.token for one in done.logprobs] == done.tokens and all(len(one.top) == 2 for one in done.logprobs)
    assert done.logprobs[0].logprob == pytest.approx(float(first[done.tokens[0]]), abs=1e-5)
    assert done.logprobs[0].top[0] == pytest.approx((int(first.argmax()), float(first.max())), abs=1e-5)


# --- consumers -----------------------------------------------------------------------------------------


def test_tokens_stream_to_threads_and_to_asyncio(fast: lethe.OptimizedModel) -> None:
    ids = prompt(5)
    right = alone(fast, ids, 25)

    async def consume(engine: lethe.Engine) -> list[list[int]]:
        async def stream(request: lethe.Request) -> list[int]:
            return [token async for token in request]

        requests = [engine.submit(ids, max_new_tokens=25, do_sample=False, ignore_eos=True) for _ in range(3)]
        tokens = list(await asyncio.gather(*map(stream, requests), stream(requests[0])))
        return [*tokens, (await requests[1]).tokens]

    with lethe.Engine(fast) as engine:
        assert asyncio.run(consume(engine)) == [right] * 5
        assert list(engine.submit(ids, max_new_tokens=25, do_sample=False, ignore_eos=True)) == right
        assert engine.stats().generated_tokens == 100 and len(engine.stats().ttft) == 4


def test_an_offline_batch_comes_in_order_or_as_it_completes(
    fast: lethe.OptimizedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [prompt(tokens) for tokens in (3, 4, 5)]
    lengths = (30, 2, 10)
    own = [(p, lethe.SamplingParams(max_new_tokens=n, ignore_eos=True)) for p, n in zip(prompts, lengths, strict=True)]
    with lethe.Engine(fast, max_batch=4) as engine:
        assert [len(done.tokens) for done in engine.run(own)] == [30, 2, 10]
        assert "3/3" in capsys.readouterr().err
        assert [len(done.tokens) for done in engine.run(iter(own), ordered=False, progress=False)] == [2, 10, 30]
        first = next(engine.run((prompts[0] for _ in range(1000)), max_new_tokens=3, progress=False))
        assert len(first.tokens) == 3 and engine.stats().submitted < 30, "a generator is not read to its end"


def test_a_cancelled_request_ends_and_its_pages_are_free(fast: lethe.OptimizedModel) -> None:
    with lethe.Engine(fast, max_batch=2) as engine:
        requests = [engine.submit(prompt(5), max_new_tokens=400, ignore_eos=True) for _ in range(3)]
        stream = iter(requests[0])
        head = [next(stream) for _ in range(3)]
        for request in requests:
            request.cancel()
        done = [request.result(SECONDS) for request in requests]
        assert [one.finish_reason for one in done] == ["cancelled"] * 3
        assert done[0].tokens[:3] == head and head + list(stream) == done[0].tokens
        stats = engine.stats()
        assert (stats.running, stats.pages_used, stats.cancelled) == (0, 0, 3)


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5, 97], {}, r"prompt\[1\] is 97: not an id of the vocabulary of 97"),
        ([5, -1], {}, r"prompt\[1\] is -1"),
        ([5, 1.5], {}, r"prompt\[1\] is 1.5"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, "a request is one prompt"),
        ([5] * 60, {"max_new_tokens": 5}, "65 tokens, and the limit is 64, the max_length of the engine"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens"),
        ([5], {"max_new_token": 5}, "did you mean 'max_new_tokens'"),
        ([5], {"num_beams": 2}, "does not support num_beams"),
        ([5], {"num_return_sequences": 2}, "num_return_sequences"),
        ([5], {"output_logits": True}, "output_logits"),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"logprobs": -1}, "logprobs=-1"),
        ([5], {"seed": "x"}, "seed must be an int"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    limited: lethe.Engine, ids: Any, options: dict[str, Any], message: str
) -> None:
    before = limited.stats()
    with pytest.raises(lethe.InputError, match=message):
        limited.submit(ids, **{"max_new_tokens": 3, **options})
    after = limited.stats()
    assert (after.refused, after.submitted) == (before.refused + 1, before.submitted)


@pytest.fixture
def limited(fast: lethe.OptimizedModel) -> Iterator[lethe.Engine]:
    with lethe.Engine(fast, max_length=64) as engine:
        yield engine


def test_more_than_the_pool_holds_is_refused(fast: lethe.OptimizedModel) -> None:
    with fast.unpruned(), lethe.Engine(fast, kv_memory=100_000) as engine:
        with pytest.raises(lethe.InputError, match=r"need \d+ bytes of KV cache under policy 'full', .* 100000 in all"):
            engine.submit(prompt(30), max_new_tokens=400)
        assert len(engine.submit(prompt(30), max_new_tokens=4, ignore_eos=True).result(SECONDS).tokens) == 4


def test_a_full_queue_says_so(fast: lethe.OptimizedModel) -> None:
    with lethe.Engine(fast, max_batch=1, max_queue=1) as engine:
        first = engine.submit(prompt(3), max_new_tokens=300, ignore_eos=True)
        next(iter(first))
        engine.submit(prompt(3), max_new_tokens=2)
        with pytest.raises(lethe.EngineBusyError, match="1 requests wait already"):
            engine.submit(prompt(3), max_new_tokens=2)
        first.cancel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_queue": 1.5}, "max_queue=1.5"),
        ({"under_pressure": "panic"}, "under_pressure='panic'"),
        ({"kv_memory": -1}, "kv_memory=-1"),
    ],
)
def test_settings_are_checked(fast: lethe.OptimizedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(lethe.ConfigError, match=message):
        lethe.Engine(fast, **options)
    assert alone(fast, prompt(3), 2), "the model is not held"


def test_a_policy_that_couples_rows_is_refused(fast: lethe.OptimizedModel) -> None:
    fast.reconfigure(lethe.LetheConfig(paper_literal=True, page_size=4))
    try:
        with pytest.raises(lethe.ConfigError, match="paper_literal"):
            lethe.Engine(fast)
        assert alone(fast, prompt(3), 2), "the model is given back"
    finally:
        fast.reconfigure(CONFIG)


# --- ends ----------------------------------------------------------------------------------------------


def test_the_model_is_the_engines_until_it_closes(fast: lethe.OptimizedModel) -> None:
    with lethe.Engine(fast) as engine:
        with pytest.raises(lethe.InputError, match="an Engine has this model"):
            fast.generate(torch.tensor([prompt(3)]), max_new_tokens=2)
        with pytest.raises(lethe.InputError, match="an Engine has this model"):
            lethe.Engine(fast)
        assert torch.isfinite(fast(torch.tensor([prompt(3)]))).all(), "a forward needs no cache of the model's"
        last = engine.submit(prompt(3), max_new_tokens=9, ignore_eos=True)
    assert len(last.result(0).tokens) == 9, "leaving the context drains"
    assert engine.closed and len(alone(fast, prompt(3), 2)) == 2
    with pytest.raises(lethe.EngineClosedError, match="is closed"):
        engine.submit(prompt(3))
    engine.close()


def test_an_abort_cancels_what_is_left(fast: lethe.OptimizedModel) -> None:
    engine = lethe.Engine(fast, max_batch=1)
    requests = [engine.submit(prompt(3), max_new_tokens=400, ignore_eos=True) for _ in range(3)]
    next(iter(requests[0]))
    assert not engine.drain(timeout=0.01)
    engine.close(abort=True)
    assert [request.result(0).finish_reason for request in requests] == ["cancelled"] * 3


def test_a_failing_engine_fails_every_request(fast: lethe.OptimizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lethe.Engine(fast, max_batch=1)
    requests = [engine.submit(prompt(3), max_new_tokens=400, ignore_eos=True) for _ in range(2)]
    next(iter(requests[0]))

    def broken(loop: Loop) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(Loop, "step", broken)
    for request in requests:
        with pytest.raises(lethe.EngineClosedError, match="device lost"):
            request.result(SECONDS)
        with pytest.raises(lethe.EngineClosedError):
            list(request)
    with pytest.raises(lethe.EngineClosedError, match="has failed") as refused:
        engine.submit(prompt(3))
    assert isinstance(refused.value.__cause__, RuntimeError) and isinstance(engine.failure, RuntimeError)
    engine.close()
    assert alone(fast, prompt(3), 2), "the model is given back"


def test_a_request_that_fails_fails_alone(fast: lethe.OptimizedModel) -> None:
    def wrong(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 8:
            raise ZeroDivisionError("mine")
        return scores

    def nothing(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.fill_(-torch.inf)

    with lethe.Engine(fast) as engine:
        options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "ignore_eos": True}
        bad = engine.submit(prompt(5), logits_processor=[wrong], **options)
        empty = engine.submit(prompt(5), logits_processor=[nothing], **options)
        good = engine.submit(prompt(5), **options)
        assert len(good.result(SECONDS).tokens) == 20
        with pytest.raises(ZeroDivisionError, match="mine"):
            bad.result(SECONDS)
        with pytest.raises(lethe.InputError, match=r"token 1: no token can be chosen"):
            empty.result(SECONDS)
        assert len(bad.tokens) == 3 and engine.failure is None and engine.stats().failed == 2


def test_many_threads_submit(fast: lethe.OptimizedModel) -> None:
    right = {tokens: alone(fast, prompt(tokens), 12) for tokens in (2, 7)}
    wrong: list[Any] = []

    def user(engine: lethe.Engine, tokens: int) -> None:
        for _ in range(3):
            got = engine.submit(prompt(tokens), max_new_tokens=12, do_sample=False, ignore_eos=True).result(SECONDS)
            if got.tokens != right[tokens]:
                wrong.append(got)

    with lethe.Engine(fast, max_batch=3) as engine:
        threads = [threading.Thread(target=user, args=(engine, tokens)) for tokens in (2, 7) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and engine.stats().finished == 18


def test_timeouts_and_times(fast: lethe.OptimizedModel) -> None:
    with lethe.Engine(fast, max_batch=1) as engine:
        request = engine.submit(prompt(3), max_new_tokens=200, ignore_eos=True)
        with pytest.raises(TimeoutError, match="it goes on"):
            request.result(0.001)
        stats = request.result(SECONDS).stats
        assert stats.queued is not None and stats.first_token is not None and stats.per_token is not None
        assert 0 <= stats.queued <= stats.first_token <= (stats.total or 0) <= time.monotonic() - request.submitted
        assert stats.retained_peak > 0 and engine.stats().tpot == [stats.per_token]

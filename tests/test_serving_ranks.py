"""An engine on two ranks: the tokens of one, whatever requests do, and ends and failures that reach both."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile import distributed, memory
from lethe_compile.errors import ConfigError, EngineClosedError, InputError, LetheError, OutOfPagesError
from lethe_compile.models.tiny import tiny
from lethe_compile.serving import lockstep
from lethe_compile.serving.loop import Loop
from tests.ranks import run_ranks
from tests.test_serving_properties import imitate_a_gpu

COMMON: dict[str, Any] = {"prune_interval": 4, "page_size": 4}
CONFIG = lethe.LetheConfig(sparse_ratio=5.0, prune_threshold=16, **COMMON)
POLICIES = {name: lethe.LetheConfig(policy=name, max_tokens=24, **COMMON) for name in ("h2o", "rkv", "snapkv")} | {
    "lethe": CONFIG,
    "capped": lethe.LetheConfig(sparse_ratio=5.0, prune_threshold=16, max_tokens=24, **COMMON),
}
LENGTHS = ((1, 30), (9, 45), (25, 20), (14, 1), (30, 40), (24, 40), (11, 40))  # tokens of prompt, and new ones
GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True}
SECONDS = 120.0


def prompt(tokens: int) -> list[int]:
    return torch.randint(3, 97, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def small(**overrides: Any) -> Any:
    return tiny("llama", num_hidden_layers=1, **overrides)


def optimized(config: lethe.LetheConfig = CONFIG, name: str = "llama", **options: Any) -> lethe.OptimizedModel:
    model = small() if name == "llama" else tiny(name)
    return lethe.optimize(model, config, tp=distributed.init(), verified=False, **options)


class Doubled:
    """A logits processor of a user's own, which keeps a state: it would differ between ranks that ran it."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.seen += 1
        return scores.roll(self.seen % 3, dims=1)


def mixed(engine: lethe.Engine) -> dict[str, Any]:
    """Requests of every kind that end as they should, and what each of them wrote."""
    kinds: dict[str, dict[str, Any]] = {
        "greedy": GREEDY,
        "drawn": {"do_sample": True, "temperature": 1.5, "top_k": 20, "seed": 3, "ignore_eos": True},
        "typical": {"do_sample": True, "typical_p": 0.8, "seed": 4, "ignore_eos": True},
        "penalties": {**GREEDY, "repetition_penalty": 1.3},
        "own": {**GREEDY, "logits_processor": [Doubled()]},
    }
    asked = [(name, n, new) for at, (n, new) in enumerate(LENGTHS) for name in kinds if name == "greedy" or at == 1]
    made = [(name, engine.submit(prompt(n), max_new_tokens=new, **kinds[name])) for name, n, new in asked]
    return {f"{at} {name}": request.result(SECONDS).tokens for at, (name, request) in enumerate(made)}


def some(engine: lethe.Engine) -> list[list[int]]:
    requests = [engine.submit(prompt(tokens), max_new_tokens=new, **GREEDY) for tokens, new in LENGTHS]
    return [request.result(SECONDS).tokens for request in requests]


def memory_of(fast: lethe.OptimizedModel, tokens: int) -> int:
    """Bytes of so many tokens in every layer, of this rank's heads."""
    heads = fast.keep_sets.heads
    return fast.new_cache().bytes_for(np.full((len(fast.caches), heads), tokens))


# --- one start of the processes for all that goes well --------------------------------------------------------


def well() -> dict[str, Any]:
    lockstep.HEARTBEAT = 0.2
    fast, found = optimized(), dict[str, Any]()
    rank = fast.ranks.rank if fast.ranks else 0
    with lethe.Engine(fast, max_batch=5, prefill_chunk=8) as engine:
        assert engine.leads == (rank == 0)
        if engine.leads:
            found["mixed"] = mixed(engine)
            found["stats"] = engine.stats()
            with pytest.raises(InputError, match="nobody to follow"):
                engine.follow()
            time.sleep(1.0)  # several turns of nothing
            found["later"] = engine.submit(prompt(9), max_new_tokens=45, **GREEDY).result(SECONDS).tokens
            found["ends"] = ends(engine)
        else:
            with pytest.raises(InputError, match="rank 1 follows rank 0: submit requests there"):
                engine.submit(prompt(3))
            with pytest.raises(InputError, match="ranks take one step at a time"):
                fast(torch.tensor([prompt(3)]))
            assert not engine.drain(0.01)
            engine.follow()
            found["stats"] = engine.stats()
    found["failure"] = engine.failure
    found["generate"] = fast.generate(torch.tensor([prompt(9)]), max_new_tokens=45, do_sample=False, eos_token_id=None)
    with pytest.raises(ConfigError, match="differ in the engine's max_batch"):
        lethe.Engine(fast, max_batch=2 + rank)
    scarcely: tuple[dict[str, Any], ...] = ({"under_pressure": "prune"}, {"under_pressure": "preempt"})
    for given, tokens in zip(scarcely, (40, 60), strict=True):
        room = memory_of(fast, tokens) * (2 + rank)  # rank 1's device has more than rank 0's
        memory.available_bytes = lambda _: room  # noqa: B023  (used at once)
        with lethe.Engine(fast, max_batch=4, kv_memory=1.0, prefill_chunk=8, **given) as engine:
            found[given["under_pressure"]] = some(engine) if engine.leads else None
        found[f"{given['under_pressure']} stats"] = engine.stats()
    with lethe.Engine(fast, max_batch=4, under_pressure="preempt") as engine:
        if rank:
            grant_less(engine)
        found["scarce"] = some(engine) if engine.leads else None
    found["scarce stats"] = engine.stats()
    engine = lethe.Engine(fast, max_batch=1)
    if engine.leads:
        requests = [engine.submit(prompt(3), max_new_tokens=400, **GREEDY) for _ in range(3)]
        next(iter(requests[0]))
        engine.close(abort=True)
        found["aborted"] = [request.result(0).finish_reason for request in requests]
    engine.close()
    found["failed"] = failing("step", fast)
    return found


def grant_less(engine: lethe.Engine) -> None:
    """This rank's device has no memory for every fifth reserve that needs some."""
    loop, asked = engine._loop, [0]
    cache = loop.batch.cache
    reserve = cache.reserve_rows

    def scarce(tokens: Any) -> None:
        if len(loop.scheduler.rows) > 1 and (cache.pages_for(cache.lengths + tokens) > cache.pages_held()).any():
            asked[0] += 1
            if asked[0] % 5 == 0:
                raise OutOfPagesError("the device has no memory")
        reserve(tokens)

    cache.reserve_rows = scarce  # type: ignore[method-assign, assignment]


def ends(engine: lethe.Engine) -> dict[str, Any]:
    """Cancelled, stopped by a token, failed by its own processor, and a neighbour that goes on."""

    def wrong(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 12:
            raise ZeroDivisionError("mine")
        return scores

    neighbour = engine.submit(prompt(9), max_new_tokens=45, **GREEDY)
    bad = engine.submit(prompt(9), max_new_tokens=45, logits_processor=[wrong], **GREEDY)
    gone = engine.submit(prompt(9), max_new_tokens=400, **GREEDY)
    tokens = neighbour.result(SECONDS).tokens
    gone.cancel()
    stop = engine.submit(prompt(9), max_new_tokens=45, stop_token_ids=[tokens[7]], **GREEDY).result(SECONDS)
    with pytest.raises(ZeroDivisionError, match="mine"):
        bad.result(SECONDS)
    end = gone.result(SECONDS)
    assert end.tokens[:40] == tokens[:40] and bad.tokens == tokens[:3]
    return {"neighbour": tokens, "stop": stop.tokens, "reasons": (end.finish_reason, stop.finish_reason)}


def test_two_ranks_serve_as_one(tmp_path: Path) -> None:
    first, second = run_ranks(well, tmp_path)
    assert not isinstance(first, Exception), first
    assert not isinstance(second, Exception), second
    fast = lethe.optimize(small(), CONFIG, verified=False)
    with lethe.Engine(fast, max_batch=5, prefill_chunk=8) as engine:
        right, plain = mixed(engine), some(engine)
    assert first["mixed"] == right and first["stats"].rounds > 20
    counted = ("rounds", "steps", "step_rows", "prompt_tokens", "generated_tokens")
    assert all(getattr(second["stats"], name) >= getattr(first["stats"], name) for name in counted)
    assert first["failure"] is second["failure"] is None
    assert first["later"] == plain[1] == first["ends"]["neighbour"] == first["generate"][0, 9:].tolist()
    assert first["ends"]["stop"] == plain[1][: plain[1].index(plain[1][7]) + 1]
    assert first["ends"]["reasons"] == ("cancelled", "stop")
    assert second["generate"].tolist() == first["generate"].tolist()
    assert first["preempt"] == plain and first["preempt stats"].preemptions and not first["preempt stats"].pressed
    assert first["prune stats"].pressed and [len(tokens) for tokens in first["prune"]] == [new for _, new in LENGTHS]
    for kind in ("prune stats", "preempt stats"):
        one, other = first[kind], second[kind]
        figures = ("bytes_allowed", "preemptions", "pressed", "rounds", "steps", "generated_tokens", "finished")
        assert [getattr(one, name) for name in figures] == [getattr(other, name) for name in figures]
    assert first["scarce"] == plain and first["scarce stats"].preemptions == second["scarce stats"].preemptions > 0
    assert first["aborted"] == ["cancelled"] * 3
    check_failed(first["failed"], second["failed"], "device lost")


# --- policies, architectures, and how steps run on a GPU ------------------------------------------------------


def served(name: str, pruning: str, like_a_gpu: bool = False) -> dict[str, Any]:
    """Tokens of a full pool, and of one with room for two requests, where rows are preempted."""
    with pytest.MonkeyPatch.context() as patch:
        fast = optimized(POLICIES[pruning], name)
        if like_a_gpu:
            imitate_a_gpu(patch)
        with lethe.Engine(fast, max_batch=5, prefill_chunk=8) as engine:
            roomy = some(engine) if engine.leads else None
        room = memory_of(fast, 60) * 2
        with lethe.Engine(fast, max_batch=5, kv_memory=room, prefill_chunk=8, under_pressure="preempt") as engine:
            tight = some(engine) if engine.leads else None
            if like_a_gpu:
                assert engine._loop._overlap and engine._loop.batch._graphs
        return {"roomy": roomy, "tight": tight, "stats": engine.stats()}


CASES = [
    ("qwen3", "lethe", False),
    ("llama", "capped", False),
    ("llama", "h2o", False),  # KV heads keep tokens of their own: ranks hold unlike numbers
    ("llama", "rkv", False),  # looks at the keys of all heads
    ("llama", "snapkv", False),  # counts the newest queries alone
    ("gpt_bigcode", "lethe", False),  # both ranks hold its one KV head
    ("gemma2", "lethe", True),
    ("llama", "h2o", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pruning", "like_a_gpu"), CASES)
def test_policies_and_architectures(name: str, pruning: str, like_a_gpu: bool, tmp_path: Path) -> None:
    first, second = run_ranks(served, tmp_path, name, pruning, like_a_gpu)
    assert not isinstance(first, Exception), first
    assert not isinstance(second, Exception), second
    fast = lethe.optimize(small() if name == "llama" else tiny(name), POLICIES[pruning], verified=False)
    with lethe.Engine(fast, max_batch=5, prefill_chunk=8) as engine:
        right = some(engine)
    assert first["roomy"] == right and first["tight"] == right
    assert first["stats"].preemptions == second["stats"].preemptions


# --- failures ---------------------------------------------------------------------------------------------------


def failing(kind: str, fast: lethe.OptimizedModel | None = None) -> tuple[Any, ...]:
    """What an engine ends with whose rank 1 fails, after how long, and what comes of the next one."""
    fast = fast or optimized()
    assert fast.ranks is not None
    second = fast.ranks.rank == 1
    engine, begun = lethe.Engine(fast), time.monotonic()
    request = engine.submit(prompt(5), max_new_tokens=400, **GREEDY) if engine.leads else None
    if second:
        while kind != "idle" and not engine.stats().running and engine.failure is None:
            time.sleep(0.01)
        begun = time.monotonic()
        if kind == "step":
            Loop.step = broken  # type: ignore[method-assign]
        elif kind == "within":
            engine._loop.batch.round = broken  # type: ignore[method-assign, assignment]
        else:
            with pytest.raises(KeyboardInterrupt), engine:
                raise KeyboardInterrupt
    with pytest.raises(EngineClosedError) as caught:
        request.result(SECONDS) if request is not None else engine.follow()
    engine.close()
    seconds = time.monotonic() - begun
    with pytest.raises(LetheError) as again:
        lethe.Engine(fast)
    return str(caught.value), str(engine.failure), seconds, str(again.value)


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("device lost")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cause"), [("within", "device lost"), ("idle", "rank 1 has left the engine before")])
def test_a_rank_that_fails_ends_all(kind: str, cause: str, tmp_path: Path) -> None:
    first, second = run_ranks(failing, tmp_path, kind)
    assert not isinstance(first, Exception), first
    assert not isinstance(second, Exception), second
    check_failed(first, second, cause)


def check_failed(first: tuple[Any, ...], second: tuple[Any, ...], cause: str) -> None:
    assert "rank 1 failed: " in first[0] and cause in first[0] and cause in first[1]
    assert cause in second[0] and cause in second[1]
    assert max(first[2], second[2]) < 30.0
    assert "start the processes anew" in first[3] and "start the processes anew" in second[3]

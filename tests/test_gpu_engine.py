"""The engine on a GPU: tokens as alone, rows that join and leave without a compilation, pressure, failures, memory.

On a CPU the same bodies run under ``-m slow``, where nothing is compiled or recorded in the first place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lethe_compile as lethe
from lethe_compile.models.tiny import tiny
from tests.hybrids import hybrid

CONFIG = lethe.LetheConfig(sparse_ratio=5.0, prune_threshold=16, prune_interval=4, page_size=16)
FULL = lethe.LetheConfig(policy="full", prune_interval=4, page_size=16)
LENGTHS = ((1, 60), (9, 90), (25, 40), (14, 1), (30, 80), (40, 50), (3, 70))  # tokens of prompt, and new ones
SECONDS = 300.0


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """With float32 products in float32: TF32 would drown what these tests compare."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before)


def prompt(tokens: int) -> list[int]:
    return torch.randint(3, 97, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def alone(fast: lethe.OptimizedModel, ids: list[int], new: int, **options: Any) -> list[int]:
    chosen = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    out = fast.generate(torch.tensor([ids], device=fast.device), max_new_tokens=new, **chosen)
    return out[0, len(ids) :].tolist()


def check_as_alone(fast: lethe.OptimizedModel, engine: dict[str, Any], **options: Any) -> list[lethe.Request]:
    prompts = [(prompt(tokens), new) for tokens, new in LENGTHS]
    right = [alone(fast, ids, new, **options) for ids, new in prompts]
    with lethe.Engine(fast, prefill_chunk=16, **engine) as serving:
        chosen = {"do_sample": False, "ignore_eos": True, **options}
        requests = [serving.submit(ids, max_new_tokens=new, **chosen) for ids, new in prompts]
        for request, tokens in zip(requests, right, strict=True):
            done = request.result(SECONDS)
            assert done.stats.pressed or done.tokens == tokens
        assert serving.stats().pages_used == 0
    return requests


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["lethe", "full"])
def test_tokens_are_those_of_each_prompt_alone(device: torch.device, config: lethe.LetheConfig, backend: str) -> None:
    fast = lethe.optimize(tiny("llama").to(device), config, backend=backend, verified=False)
    requests = check_as_alone(fast, {"max_batch": 5, "kv_memory": 64 << 20})
    assert (sum(request.stats.rounds for request in requests) > 10) == (config is CONFIG)


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "bamba"])
def test_other_architectures(device: torch.device, name: str) -> None:
    model = hybrid(name) if name == "bamba" else tiny(name)
    fast = lethe.optimize(model.to(device), CONFIG, backend="eager", verified=False)
    check_as_alone(fast, {"max_batch": 5, "kv_memory": 64 << 20})


def test_drawn_tokens_are_those_of_generate(device: torch.device) -> None:
    fast = lethe.optimize(tiny("llama").to(device), CONFIG, backend="eager", verified=False)
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 3}
    check_as_alone(fast, {"max_batch": 5, "kv_memory": 64 << 20}, **drawn)
    check_as_alone(fast, {"max_batch": 5, "kv_memory": 64 << 20}, repetition_penalty=1.3)


def test_rows_join_and_leave_without_compiling_or_recording(device: torch.device) -> None:
    """After the engine has been made, no graph is recorded, and no region compiled, whoever comes and goes."""
    from torch._dynamo.utils import counters

    fast = lethe.optimize(tiny("llama").to(device), CONFIG, verified=False)
    with lethe.Engine(fast, max_batch=8, kv_memory=64 << 20, max_length=256) as engine:
        batch = engine._loop.batch
        recorded, compiled = batch.captures, counters["stats"]["unique_graphs"]
        assert (recorded > 0) == (device.type == "cuda")
        requests = [engine.submit(prompt(n), max_new_tokens=new, ignore_eos=True) for n, new in LENGTHS * 3]
        requests[2].cancel()
        for request in requests:
            request.result(SECONDS)
        assert engine.stats().steps > 100
        assert (batch.captures, counters["stats"]["unique_graphs"]) == (recorded, compiled)


@pytest.mark.parametrize("under_pressure", ["prune", "preempt"])
@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["lethe", "full"])
def test_pressure(device: torch.device, config: lethe.LetheConfig, under_pressure: str) -> None:
    fast = lethe.optimize(tiny("llama").to(device), config, verified=False)
    token = sum(fast.token_bytes) + 8 * len(fast.caches)  # with its position and score
    requests = check_as_alone(
        fast, {"max_batch": 7, "kv_memory": 200 * token, "under_pressure": under_pressure, "max_length": 128}
    )
    preempted, pressed = (sum(getattr(r.stats, name) for r in requests) for name in ("preemptions", "pressed"))
    assert preempted or pressed
    assert not pressed or (config is CONFIG and under_pressure == "prune")


@pytest.mark.gpu
def test_memory_is_given_back() -> None:
    """A closed engine holds no pool, also while somebody holds the engine."""
    fast = lethe.optimize(tiny("llama").to("cuda"), CONFIG, verified=False)
    with lethe.Engine(fast, max_batch=4, kv_memory=64 << 20) as first:  # what libraries set aside once and keep
        first.submit(prompt(5), max_new_tokens=20).result(SECONDS)
    before = torch.cuda.memory_allocated()
    engine = lethe.Engine(fast, max_batch=4, kv_memory=512 << 20)
    assert torch.cuda.memory_allocated() - before > 400 << 20
    engine.submit(prompt(5), max_new_tokens=20).result(SECONDS)
    engine.close()
    assert torch.cuda.memory_allocated() - before < 64 << 20

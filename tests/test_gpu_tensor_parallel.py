"""One model on two GPUs through NCCL: the tokens of one GPU in fp32, CUDA graphs with the collectives inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lethe_compile as lethe
from lethe_compile import distributed
from lethe_compile.models import reasoner
from lethe_compile.models.tiny import tiny
from tests.oracle import PRUNING
from tests.ranks import run_ranks
from tests.test_serving_ranks import memory_of, some
from tests.test_tensor_parallel import GREEDY, assert_as_one, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks need two GPUs"),
]


def build(name: str, device: torch.device) -> Any:
    torch.set_float32_matmul_precision("highest")  # TF32 would drown what is compared
    return (reasoner.load_model() if name == "reasoner" else tiny(name)).to(device)


def facts(fast: Any) -> dict[str, Any]:
    """Twice, so that graphs are replayed that were captured before."""
    given = {key: value.to(fast.device) for key, value in prompts(min(97, fast.vocab_size)).items()}
    outputs = [fast.generate(**given, **GREEDY).tolist() for _ in range(2)]
    assert outputs[0] == outputs[1]
    stats = fast.cache_stats()
    return {
        "tokens": outputs[0],
        "evicted": None,
        "rounds": stats.rounds,
        "peak": fast.cache.bytes_peak,
        "retained": stats.retained,
        "backend": fast.backend[0],
    }


def on_gpu(name: str, backend: str) -> dict[str, Any]:
    mesh = distributed.init()
    device = torch.device("cuda", torch.cuda.current_device())
    return facts(lethe.optimize(build(name, device), PRUNING["lethe"], tp=mesh, backend=backend))


def half_precision() -> tuple[list[Any], int]:
    """Sampled in bfloat16, from generators that differ: alike on all ranks."""
    mesh = distributed.init()
    fast = lethe.optimize(tiny("llama").to("cuda", torch.bfloat16), PRUNING["lethe"], tp=mesh, kv_memory=1 << 20)
    torch.manual_seed(mesh.get_local_rank())
    given = {key: value.cuda() for key, value in prompts().items()}
    return fast.generate(**given, **{**GREEDY, "do_sample": True}).tolist(), fast.cache.max_bytes


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "auto"),
        ("gemma2", "auto"),
        ("llama", "inductor"),
        ("gpt2", "eager"),
        ("qwen3", "eager"),
        ("reasoner", "auto"),
    ],
)
def test_two_gpus_write_the_tokens_of_one(name: str, backend: str, tmp_path: Path) -> None:
    expected = facts(
        lethe.optimize(build(name, torch.device("cuda")), PRUNING["lethe"], backend=backend, verified=False)
    )
    found = run_ranks(on_gpu, tmp_path, name, backend)
    assert_as_one(found, expected, share=0.5)
    assert [one["backend"] for one in found] == [expected["backend"]] * 2


def test_ranks_draw_the_same_tokens(tmp_path: Path) -> None:
    first, second = run_ranks(half_precision, tmp_path)
    assert not isinstance(first, Exception) and first == second


def engine(backend: str) -> tuple[Any, ...]:
    """More requests than rows, in a pool that is allocated at once, with and without pressure."""
    mesh = distributed.init()
    device = torch.device("cuda", torch.cuda.current_device())
    fast = lethe.optimize(build("llama", device), PRUNING["lethe"], tp=mesh, backend=backend)
    found = []
    for room in (1 << 24, memory_of(fast, 66)):
        with lethe.Engine(fast, max_batch=4, kv_memory=room, prefill_chunk=16, under_pressure="preempt") as serving:
            found.append(some(serving) if serving.leads else None)
    return (*found, serving.stats().preemptions)


@pytest.mark.parametrize("backend", ["auto", "inductor", "eager"])
def test_an_engine_on_two_gpus_writes_the_tokens_of_one(backend: str, tmp_path: Path) -> None:
    fast = lethe.optimize(build("llama", torch.device("cuda")), PRUNING["lethe"], verified=False)
    with lethe.Engine(fast, max_batch=4, kv_memory=1 << 24, prefill_chunk=16) as serving:
        right = some(serving)
    first, second = run_ranks(engine, tmp_path, backend)
    assert not isinstance(first, Exception) and not isinstance(second, Exception), (first, second)
    assert first[:2] == (right, right) and first[2] == second[2] > 0

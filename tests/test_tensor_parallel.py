"""One model on two processes: the tokens of one, the same tokens kept on both, half the cache on each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lethe_compile as lethe
from lethe_compile import distributed
from lethe_compile.errors import ConfigError, InputError, LetheError
from lethe_compile.models import reasoner
from lethe_compile.models.tiny import tiny
from lethe_compile.tools._replay import Evictions
from tests.oracle import POLICIES, PRUNING
from tests.ranks import run_ranks

NEW = 60
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": NEW}


def prompts(vocabulary: int = 97) -> dict[str, Tensor]:
    """Three of unequal length, padded on the left."""
    ids = torch.randint(3, vocabulary, (3, 23), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :9], mask[2, :15] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def build(name: str, **overrides: Any) -> Any:
    return reasoner.load_model() if name == "reasoner" else tiny(name, **overrides)


def config_of(name: str) -> lethe.LetheConfig:
    return {**PRUNING, **POLICIES}[name]


def facts(fast: Any, **options: Any) -> dict[str, Any]:
    """Tokens, every round's keep-sets, and figures of a generation."""
    evictions = Evictions()
    fast.on_round.append(evictions)
    out = fast.generate(**prompts(min(97, fast.vocab_size)), **{**GREEDY, **options})
    fast.on_round.remove(evictions)
    stats = fast.cache_stats()
    return {
        "tokens": out.tolist(),
        "evicted": {str(key): value for key, value in evictions.first.items()},
        "rounds": stats.rounds,
        "peak": stats.bytes_peak,
        "retained": stats.retained,
        "sparsity": stats.sparsity,
    }


def generated(name: str, pruning: str, backend: str = "auto") -> dict[str, Any]:
    fast = lethe.optimize(build(name), config_of(pruning), tp=distributed.init(), backend=backend)
    return facts(fast)


def alone(name: str, pruning: str, **overrides: Any) -> dict[str, Any]:
    return facts(lethe.optimize(build(name, **overrides), config_of(pruning), verified=False))


def assert_as_one(found: list[Any], expected: dict[str, Any], share: float) -> None:
    for one in found:
        assert not isinstance(one, Exception), one
        assert one["tokens"] == expected["tokens"]
        assert one["evicted"] == expected["evicted"] and one["retained"] == expected["retained"]
        assert one["rounds"] == expected["rounds"]
        assert one["peak"] == share * expected["peak"]
    assert all(min(layer) >= 2 for layer in expected["rounds"]), "every layer and row must have been pruned repeatedly"


def in_turn() -> dict[str, Any]:
    """What the quick test looks at, in one start of the processes."""
    mesh, rank = distributed.init(), int(distributed.init().get_local_rank())
    model = tiny("llama", num_hidden_layers=1)
    fast = lethe.optimize(model, PRUNING["lethe"], tp=mesh)
    found: dict[str, Any] = {"greedy": facts(fast)}
    torch.manual_seed(rank)  # each draws from a generator of its own, and rank 0's word counts
    found["sampled"] = fast.generate(**prompts(), **{**GREEDY, "do_sample": True, "max_new_tokens": 20}).tolist()
    for what, work in {
        "prompt": lambda: fast.generate(torch.full((1, 5), 7 + rank), **GREEDY),
        "config": lambda: lethe.optimize(model, replace(PRUNING["lethe"], decay=0.5 + rank / 4), tp=mesh),
        "weights": lambda: lethe.optimize(other(rank), PRUNING["lethe"], tp=mesh),
        "failure": lambda: broken(mesh, rank),
        "hf": fast.as_hf,
    }.items():
        with pytest.raises(LetheError) as caught:
            work()
        found[what] = (type(caught.value), str(caught.value))
    found["after"], found["twin"] = facts(fast)["tokens"], facts(fast.twin())["tokens"]
    return found


def other(rank: int) -> Any:
    model = tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight += rank
    return model


def broken(mesh: Any, rank: int) -> None:
    ranks = distributed.Ranks(mesh)
    with ranks.together("do their part"):
        if rank == 1:
            raise InputError("no room")


def test_two_processes_run_one_model(tmp_path: Path) -> None:
    first, second = run_ranks(in_turn, tmp_path)
    assert not isinstance(first, Exception), first
    assert_as_one([first["greedy"], second["greedy"]], alone("llama", "lethe", num_hidden_layers=1), share=0.5)
    assert first["sampled"] == second["sampled"]
    assert first["after"] == first["twin"] == first["greedy"]["tokens"]
    for found in (first, second):
        assert found["prompt"][0] is ConfigError and "inputs" in found["prompt"][1]
        assert found["config"][0] is ConfigError and "the configuration" in found["config"][1]
        assert found["weights"][0] is ConfigError and "the weight model.norm.weight" in found["weights"][1]
        assert found["hf"][0] is InputError
    assert first["failure"] == (LetheError, "rank 1 failed to do their part: InputError: no room")
    assert second["failure"] == (InputError, "no room")


CASES = [
    ("qwen3", "lethe", 0.5),
    ("gpt2", "lethe", 0.5),  # queries, keys and values in one weight, stored by rows
    ("gemma2", "capped", 0.5),  # windows, softcap, tied embeddings
    ("mixtral", "lethe", 0.5),  # experts, each of them cut
    ("phi3", "literal", 0.5),  # fused gates
    ("gpt_oss", "lethe", 0.5),  # sinks, interleaved gates
    ("bloom", "lethe", 0.5),  # ALiBi, heads folded into the batch
    ("gpt_bigcode", "lethe", 1),  # both ranks hold its one KV head
    ("deepseek_v3", "lethe", 1),  # and its latent
    ("olmo2", "lethe", 0.5),  # norms over all heads
    ("llama", "rkv", 0.5),  # looks at the keys of all heads
    ("llama", "lethe-uniform", 0.5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pruning", "share"), CASES)
def test_architectures_and_policies(name: str, pruning: str, share: float, tmp_path: Path) -> None:
    assert_as_one(run_ranks(generated, tmp_path, name, pruning), alone(name, pruning), share)


@pytest.mark.slow
def test_compiled_regions_hold_the_collectives(tmp_path: Path) -> None:
    assert_as_one(run_ranks(generated, tmp_path, "qwen3", "lethe", "inductor"), alone("qwen3", "lethe"), 0.5)


@pytest.mark.slow
def test_four_ranks_share_two_kv_heads(tmp_path: Path) -> None:
    assert_as_one(run_ranks(generated, tmp_path, "llama", "lethe", size=4), alone("llama", "lethe"), 0.5)


def per_head() -> dict[str, Any]:
    return facts(lethe.optimize(tiny("llama"), POLICIES["h2o"], tp=distributed.init()))


@pytest.mark.slow
def test_heads_that_keep_tokens_of_their_own(tmp_path: Path) -> None:
    """Each rank's heads keep what they would keep in one process."""
    expected = facts(lethe.optimize(tiny("llama"), POLICIES["h2o"], verified=False))
    for found in run_ranks(per_head, tmp_path):
        assert not isinstance(found, Exception), found
        assert found["tokens"] == expected["tokens"] and found["peak"] < expected["peak"]


def reasoned() -> Any:
    fast = lethe.optimize(reasoner.load_model(), tp=2, kv_memory=6 << 20)
    return facts(fast, max_new_tokens=400), fast.cache.max_bytes


@pytest.mark.slow
def test_reasoner_with_a_limit_of_memory(tmp_path: Path) -> None:
    expected = facts(lethe.optimize(reasoner.load_model(), verified=False), max_new_tokens=400)
    for found in run_ranks(reasoned, tmp_path):
        assert not isinstance(found, Exception), found
        assert found[0]["tokens"] == expected["tokens"] and found[1] == 6 << 20


def test_tp_needs_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="torchrun --nproc-per-node"):
        lethe.optimize(tiny("llama"), tp=2)
    for value in (0, True):
        with pytest.raises(InputError, match="must be a DeviceMesh"):
            lethe.optimize(tiny("llama"), tp=value)
    for name, text in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match="4 processes"):
        distributed.init(2)
    assert not dist.is_initialized()

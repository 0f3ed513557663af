"""Whole generations under every policy: caps hold, pages come back, and a row does in a batch what it does alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.capture import Captured, capture
from lethe_compile.models import reasoner
from lethe_compile.models.tiny import tiny
from tests.oracle import POLICIES, assert_original_agrees
from tests.policies.states import NAMES, kept, made, random_state

QUICK = ("h2o", "pyramid", "rkv")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
Optimize = Callable[[lethe.LetheConfig], Any]


def optimizer(model: Any) -> Iterator[Optimize]:
    """`optimize` of a model that is exported once for all configs."""
    exported = capture(model)

    def again(model: Any, example: Any) -> Captured:
        return replace(exported, program=replace(exported.program, module=copy.deepcopy(exported.program.module)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lethe_compile.api.capture", again)
        yield partial(lethe.optimize, model, verified=False)


@pytest.fixture(scope="module")
def llama() -> Iterator[Optimize]:
    yield from optimizer(tiny("llama"))


@pytest.fixture(scope="module")
def solver() -> Iterator[Optimize]:
    yield from optimizer(reasoner.load_model())


def ragged() -> tuple[Tensor, Tensor]:
    mask = (torch.arange(14) >= torch.tensor([[9], [0], [4]])).long()
    return torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(2)) * mask, mask


@pytest.mark.parametrize("name", POLICIES)
def test_caps_hold_and_rows_do_as_they_do_alone(llama: Optimize, name: str) -> None:
    config = POLICIES[name]
    fast = llama(config)
    ids, mask = ragged()
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=40, **GREEDY)
    stats = fast.cache_stats()
    pages = -(-24 // 4) * fast.compiled.row_bytes[0, 0] * fast.page_size  # of a layer and set that holds 24 tokens
    if config.max_tokens is not None:
        assert max(map(max, stats.retained)) <= config.max_tokens
        pages *= 1 if stats.heads is None else len(stats.heads[0][0])
        assert max(map(max, stats.bytes_held)) <= pages
        assert stats.bytes_peak <= 2 * pages * len(stats.retained) * len(ids), "while pages move"
    assert min(map(min, stats.rounds)) >= 2 and min(map(min, stats.bytes_freed)) > 0
    assert fast.cache.bytes_in_use == 0, "all pages came back"
    row = list(POLICIES).index(name) % 3
    alone = fast.generate(ids[row : row + 1, 14 - int(mask[row].sum()) :], max_new_tokens=40, **GREEDY)
    assert alone[0, -40:].tolist() == out[row, -40:].tolist()
    assert [layer[0] for layer in fast.cache_stats().retained] == [layer[row] for layer in stats.retained]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_a_limit_on_memory_prunes_harder(llama: Optimize, name: str) -> None:
    """Pages run out long before the cap would prune: rounds come with a limit, and the generation ends well."""
    fast = llama(replace(POLICIES[name], max_tokens=400))
    ids, mask = ragged()
    fast.kv_memory = fast.cache.bytes_for(torch.full((len(fast.caches), 3), 32).numpy())
    fast.generate(ids, attention_mask=mask, max_new_tokens=50, **GREEDY)
    assert fast.cache_stats().pressed > 0
    assert fast.cache.pool_bytes <= fast.kv_memory


def test_full_after_another_policy_is_transformers(llama: Optimize) -> None:
    """What a policy asks of the runtime, such as a prompt in two parts, goes with it."""
    model = tiny("llama")
    fast = llama(POLICIES["snapkv"])
    ids, mask = ragged()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=30, **GREEDY)
    with fast.unpruned():
        assert fast.generate(ids, attention_mask=mask, max_new_tokens=30, **GREEDY).tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_reasoner_runs_within_a_budget(solver: Optimize, name: str) -> None:
    """A share of the full cache: kept to within the least that a layer holds and an interval."""
    capped = {"max_tokens": None, "budget": 0.5, "prune_interval": 16, "page_size": 8, "sink_tokens": 4}
    fast = solver(lethe.LetheConfig(policy=name, **capped))
    problems = reasoner.problems(2, seed=1, family="walk", min_tokens=1000, max_tokens=1200)
    ids = torch.tensor([problems.prompt(row)[:40] for row in range(2)])
    fast.generate(ids, max_new_tokens=100, **GREEDY)
    stats = fast.cache_stats()
    for row, seen in enumerate(stats.seen):
        held = [layer[row] for layer in stats.retained]
        assert sum(held) <= max(0.5 * seen, 28) * len(held)
        assert sum(held) >= 0.5 * (seen - 2 * 16) * len(held) - 8 or name.startswith("lethe")


def test_the_report_names_the_policy_its_settings_and_caps(llama: Optimize) -> None:
    config = lethe.LetheConfig(policy="rkv", policy_options={"importance": 0.2}, max_tokens=64, budget=0.25)
    report = llama(config).report()
    assert "policy rkv (importance 0.2, max_tokens 64, budget 0.25);" in " ".join(str(report).split())
    assert report.to_dict()["config"]["policy_options"] == {"importance": 0.2}


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_chooses_what_a_cpu_does(name: str) -> None:
    for seed in range(6):
        state = random_state(seed, layers=4, rows=6, longest=300, windows=seed % 2 == 0)
        for caps in ({"max_tokens": 60}, {"budget": 300}, {"budget": 0.25}):
            expected = kept(made(name, {}, 4, 6, **caps), state)
            there = replace(
                state,
                **{key: value.cuda() for key, value in vars(state).items() if isinstance(value, Tensor)},
                key_source=lambda layer, keys=state.keys: keys(layer).cuda(),
            )
            assert torch.equal(kept(made(name, {}, 4, 6, **caps), there).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_not_waited_for_in_a_round(name: str) -> None:
    state = random_state(0, longest=100)
    there = replace(
        state,
        **{key: value.cuda() for key, value in vars(state).items() if isinstance(value, Tensor)},
        key_source=[state.keys(layer).cuda() for layer in range(3)].__getitem__,
    )
    policy = made(name, {}, 3, 4, max_tokens=40)
    policy.round(there)  # what is sent once is sent here
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.round(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "eager") for name in POLICIES), ("rkv", "auto"), ("tova", "auto")]
)
def test_generations_on_a_gpu_match_the_oracle(name: str, backend: str) -> None:
    """Compiling for CUDA graphs takes long: two go that way, with windows of one query and of more, and with keys."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        model = tiny("llama").cuda()
        assert_original_agrees(model, POLICIES[name], tolerance=1e-3, evictions_show=True, backend=backend)
    finally:
        torch.set_float32_matmul_precision(before)

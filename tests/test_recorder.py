"""Recorder and reconfiguration, against what a step-by-step look at the cache says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lethe_compile as lethe
from lethe_compile.errors import ConfigError, InputError
from lethe_compile.kernels.select.reference import hoyer_sparsity
from lethe_compile.models.tiny import tiny
from lethe_compile.runtime import OptimizedModel

CONFIG = lethe.LetheConfig(max_tokens=24, prune_interval=5, page_size=4, protect_prompt=False, decay=0.9)
PROMPTS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3]])
LENGTHS = torch.tensor([7, 4, 7])
STEPS = (40, 23, 31)  # decode steps that each row takes part in


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return lethe.optimize(tiny("llama"), CONFIG, verified=False)


def generate(fast: OptimizedModel) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [steps, layers, rows] and pages behind every step, as the cache says; NaN where a row took no part."""
    fast.begin(3, LENGTHS, max(STEPS))
    fast.prefill(PROMPTS, LENGTHS)
    first = fast.cache.length.numpy().copy()
    seen = [(first, fast.cache.pages_for(first.astype(np.int64)))]  # before pages for the next steps are taken
    for step in range(max(STEPS)):
        active = torch.tensor([step < n for n in STEPS])
        fast.decode(torch.full((3,), 1 + step % 7), active)
        part = np.where(active.numpy(), 1.0, np.nan)
        seen.append((fast.cache.length.numpy() * part, fast.cache.pages_held() * part))
    fast.end()
    tokens, pages = zip(*seen, strict=True)
    return np.stack(tokens), np.stack(pages)


def test_usage_is_what_the_cache_held_at_each_step(fast: OptimizedModel) -> None:
    with fast.recorded() as recorder:
        tokens, pages = generate(fast)
    assert fast.recorder is None
    token_bytes = fast._token_bytes
    kv, pool = (tokens * token_bytes).sum(1), (pages * token_bytes * fast.page_size).sum(1)  # [steps, rows]
    usage = recorder.usage()
    np.testing.assert_allclose(usage.kv_mean, np.nanmean(kv, 0))
    np.testing.assert_allclose(usage.kv_peak, np.nanmax(kv, 0))
    np.testing.assert_allclose(usage.pool_mean, np.nanmean(pool, 0))
    np.testing.assert_allclose(usage.pool_peak, np.nanmax(pool, 0))
    assert (usage.kv_peak < usage.pool_peak + 1).all() and (usage.kv_mean < usage.kv_peak).all()


def test_samples_tell_every_round(fast: OptimizedModel) -> None:
    with fast.recorded() as recorder:
        generate(fast)
    steps, retained, sparsity = recorder.by_layer()
    assert steps == list(range(0, 40, 5))
    assert retained.shape == sparsity.shape == (8, len(fast.caches))
    assert retained[0].tolist() == [6.0] * len(fast.caches), "means of 7, 4 and 7 tokens"
    assert any((sample.after < sample.before).any() for sample in recorder.samples), "the cap was reached"
    assert [int(sample.active.sum()) for sample in recorder.samples] == [3, 3, 3, 3, 3, 2, 2, 1]
    assert ((sparsity >= 0) & (sparsity <= 1)).all()


def test_sparsity_is_hoyers_of_the_scores(fast: OptimizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = []
    round_ = type(fast.policy).round

    def spy(policy: object, state: object, limit: object = None) -> object:
        shape = state.length.shape  # type: ignore[attr-defined]
        flat = hoyer_sparsity(state.mass.flatten(0, 1), state.length.flatten())  # type: ignore[attr-defined]
        expected.append(flat.view(shape).numpy())
        return round_(policy, state, limit)  # type: ignore[arg-type]

    monkeypatch.setattr(type(fast.policy), "round", spy)
    with fast.recorded() as recorder:
        generate(fast)
    for sample, value in zip(recorder.samples, expected, strict=True):
        assert sample.sparsity is not None
        np.testing.assert_allclose(sample.sparsity, value, rtol=1e-6)


def test_another_configuration_is_as_good_as_another_capture(fast: OptimizedModel) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    other = lethe.LetheConfig(
        score="sum", sparse_ratio=1.3, decay=0.7, prune_threshold=10, prune_interval=4, page_size=8
    )
    expected = lethe.optimize(tiny("llama"), other, verified=False)
    wanted = expected.generate(ids, max_new_tokens=40, do_sample=False)
    first = fast.generate(ids, max_new_tokens=40, do_sample=False)
    fast.reconfigure(other)
    try:
        assert torch.equal(fast.generate(ids, max_new_tokens=40, do_sample=False), wanted)
        assert fast.cache_stats().retained == expected.cache_stats().retained
        assert fast.config == expected.config and fast.page_size == 8
        fast.reconfigure(lethe.LetheConfig(policy="full"))
        fast.generate(ids, max_new_tokens=40, do_sample=False)
        assert fast.cache_stats().retained == [[44]] * len(fast.caches)
    finally:
        fast.reconfigure(CONFIG)
    assert torch.equal(fast.generate(ids, max_new_tokens=40, do_sample=False), first)


def test_no_configuration_in_the_middle_or_that_cannot_serve(fast: OptimizedModel) -> None:
    fast.begin(1, LENGTHS[:1], 4)
    with pytest.raises(InputError, match="generating"):
        fast.reconfigure(CONFIG)
    fast.end()
    with pytest.raises(ConfigError, match="budget=60"):
        fast.reconfigure(lethe.LetheConfig(budget=60))
    assert fast.config == CONFIG, "what was refused changed nothing"


def test_full_keeps_no_scores_to_measure(fast: OptimizedModel) -> None:
    fast.reconfigure(lethe.LetheConfig(policy="full"))
    try:
        with fast.recorded() as recorder:
            generate(fast)
    finally:
        fast.reconfigure(CONFIG)
    assert all(sample.sparsity is None for sample in recorder.samples)
    assert np.isnan(recorder.by_layer()[2]).all()

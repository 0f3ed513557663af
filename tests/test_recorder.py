"""Recorder and reconfiguration, against what a step-by-step look at the cache says."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import lethe_compile as lethe
from lethe_compile.cache import KVCache
from lethe_compile.errors import ConfigError, InputError
from lethe_compile.keep_sets import KeepSets
from lethe_compile.kernels.select.reference import hoyer_sparsity
from lethe_compile.models.tiny import tiny
from lethe_compile.recorder import Sample
from lethe_compile.recorder_stream import StreamRecorder, load_recorder
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
    token_bytes = fast.compiled.row_bytes
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


def test_a_file_holds_every_round(fast: OptimizedModel, tmp_path: Path) -> None:
    with fast.recorded(tokens=True) as held:
        generate(fast)
    path = tmp_path / "recording.jsonl"
    with fast.recorded(tokens=True, path=path) as streamed:
        generate(fast)
        generate(fast)  # the latest counts
        np.testing.assert_allclose(streamed.by_layer()[1], held.by_layer()[1])
    assert streamed.samples == [] and streamed.evictions == [], "nothing is held"
    np.testing.assert_array_equal(streamed.usage().kv_mean, held.usage().kv_mean)
    read = load_recorder(path)
    assert len(read.samples) == len(held.samples) == 8 and len(read.evictions) == len(held.evictions) > 0
    for mine, theirs in zip(read.samples, held.samples, strict=True):
        assert mine.step == theirs.step
        for name in ("active", "before", "after", "seen", "threshold", "sparsity"):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=1e-6)
    for one, other in zip(read.evictions, held.evictions, strict=True):
        for name in ("layer", "row", "position"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    text = path.read_text()
    path.write_text(text[:-20])  # as a kill leaves it
    assert len(load_recorder(path).samples) == 7
    path.write_text(text.replace('"round"', '"rnd"', 1))
    with pytest.raises(InputError, match=r"line 3: not a recording .*unknown line 'rnd'"):
        load_recorder(path)
    path.write_text("")
    with pytest.raises(InputError, match="is empty"):
        load_recorder(path)
    with pytest.raises(InputError, match="cannot be written: No such file"), fast.recorded(path=tmp_path / "no" / "x"):
        pass


def test_a_long_recording_takes_no_more_memory(tmp_path: Path) -> None:
    """A MB of rounds leaves as much memory in use as 200 KB of them."""
    layers, rows = 8, 4
    sets, token_bytes = KeepSets([1] * layers), np.full((layers, 1), 64)
    recorder = StreamRecorder(tmp_path / "long.jsonl", token_bytes, 8, sets, True, False)
    counts = np.full((layers, rows), 500)
    recorder.begin(counts[0], counts, counts)
    used = []
    tracemalloc.start()
    try:
        for step in range(1500):
            seen = counts[0] + step
            recorder.read(seen, counts, counts)
            sample = Sample(step, seen > 0, counts + step, counts, np.full((layers, rows), 0.5), seen, counts)
            recorder.round(sample)
            if step in (300, 1499):
                used.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        recorder.close()
    assert (tmp_path / "long.jsonl").stat().st_size > 1_000_000
    assert used[1] - used[0] < 20_000, used
    assert len(load_recorder(tmp_path / "long.jsonl").samples) == 1500


def test_a_round_gathers_scores_once(fast: OptimizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    scores = KVCache.scores
    monkeypatch.setattr(KVCache, "scores", lambda *given: gathered.append(1) or scores(*given))
    with fast.recorded() as recorder:
        generate(fast)
    assert len(gathered) == len(recorder.samples)

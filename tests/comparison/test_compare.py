"""`compare` on a tiny model: against what the model does by itself, with a pruned graph and with artifacts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import lethe_compile as lethe
from lethe_compile.artifact import open_artifact
from lethe_compile.comparison import Progress
from lethe_compile.errors import ConfigError, InputError
from lethe_compile.models.tiny import tiny
from lethe_compile.runtime import OptimizedModel

CONFIG = lethe.LetheConfig(max_tokens=20, prune_interval=5, page_size=4, protect_prompt=False, decay=0.9)
PROMPTS = [{"ids": [5, 6, 7, 8, 9, 10, 11], "max_new_tokens": 40}, {"ids": [3, 4, 5, 6], "max_new_tokens": 33}]


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return lethe.optimize(tiny("llama"), CONFIG, verified=False)


@pytest.fixture(scope="module")
def compared(fast: OptimizedModel) -> lethe.Comparison:
    return lethe.compare(fast, PROMPTS, repeats=2)


def test_free_running_is_generation(fast: OptimizedModel, compared: lethe.Comparison) -> None:
    for prompt, result in zip(PROMPTS, compared.prompts, strict=True):
        ids, new = torch.tensor([prompt["ids"]]), prompt["max_new_tokens"]
        pruned = fast.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()
        stats = fast.cache_stats()
        whole = tiny("llama").generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()
        assert result.free is not None and result.forced is not None
        assert (list(result.free.unpruned.tokens), list(result.free.pruned.tokens)) == (whole, pruned)
        token_bytes = fast.report().layers[0].bytes_per_token
        assert result.free.pruned.kv_mean == pytest.approx(token_bytes * sum(row[0] for row in stats.retained_mean))
        assert result.free.unpruned.kv_peak == 3 * token_bytes * (ids.shape[1] + new - 1)
        assert result.forced.steps == len(whole)
    assert compared["memory_saving"] > 0.2 and compared["kl"] > 1e-3 and compared["speedup"] > 0
    first = compared.prompts[0].free
    assert first is not None and first.first_divergence == next(
        step
        for step, pair in enumerate(zip(first.unpruned.tokens, first.pruned.tokens, strict=True))
        if len({*pair}) > 1
    )
    assert compared["first_divergence"] >= first.first_divergence - 40


def test_a_comparison_leaves_the_model_as_it_was(fast: OptimizedModel, compared: lethe.Comparison) -> None:
    assert fast.config == CONFIG and fast.policy.name == "lethe" and fast.recorder is None
    again = lethe.compare(fast, PROMPTS, batch_size=1, config=lethe.LetheConfig(policy="full"), forced=False)
    assert again["same_outputs"] == 1.0 and again["memory_saving"] == 0.0 and again.facts["config"]["policy"] == "full"
    assert fast.config == CONFIG


def test_a_graph_is_summed_up(compared: lethe.Comparison) -> None:
    graph = compared.graph
    assert graph is not None and graph.before is not None and graph.unexpected == ()
    assert graph.after.ops["lethe::attention"] == graph.attention_layers == 3
    assert "lethe::attention" not in graph.before.ops and graph.before.nodes > graph.after.nodes
    assert [one.name for one in graph.after.inputs][:3] == ["input_ids", "positions", "new_lengths"]
    assert graph.before.inputs[0].dtype == "int64" and len(graph.before.outputs) == 1


def test_teacher_forcing_alone_is_fed_what_the_unpruned_graph_writes(
    fast: OptimizedModel, compared: lethe.Comparison
) -> None:
    told: list[Progress] = []
    one = lethe.compare(fast, PROMPTS, free=False, progress=told.append)
    assert [result.free for result in one.prompts] == [None, None]
    assert one["kl"] == pytest.approx(compared["kl"], rel=1e-6)
    assert told[-1] == Progress("teacher-forced", 2, 2) and told[0] == Progress("text to compare on", 0, 2)


def test_a_completion_is_what_is_fed(fast: OptimizedModel) -> None:
    given = [{**PROMPTS[0], "completion_ids": [9, 8, 7] * 8, "id": "a"}]
    one = lethe.compare(fast, given, free=False)
    assert one.prompts[0].forced is not None and one.prompts[0].forced.steps == 24
    ppl = next(m for m in one.metrics if m.metric.name == "ppl_increase")
    with torch.no_grad():
        logits = tiny("llama")(torch.tensor([[*PROMPTS[0]["ids"], *[9, 8, 7] * 8]])).logits[0, 6:-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([9, 8, 7] * 8))
    assert ppl.unpruned == pytest.approx(math.exp(loss), rel=1e-4)


def test_what_cannot_be_compared_is_refused_before_any_work(fast: OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prompts\[0\]: the id 999"):
        lethe.compare(fast, [[999]])
    with pytest.raises(ConfigError, match="forced=False and free=False"):
        lethe.compare(fast, PROMPTS, forced=False, free=False)
    with pytest.raises(ConfigError, match="max_accuracy_drop=0 needs answers"):
        lethe.compare(fast, PROMPTS, thresholds=lethe.Thresholds(max_accuracy_drop=0))
    with pytest.raises(InputError, match="there is no baseline"):
        lethe.compare(fast, PROMPTS, baseline=tmp_path / "none.json")
    with pytest.raises(ConfigError, match="batch_size=0"):
        lethe.compare(fast, PROMPTS, batch_size=0)


def test_heads_that_keep_their_own_tokens() -> None:
    config = lethe.LetheConfig(policy="h2o", max_tokens=20, prune_interval=5, page_size=4, protect_prompt=False)
    one = lethe.compare(tiny("llama"), PROMPTS, config=config)
    assert one["memory_saving"] > 0.2 and one["kl"] > 1e-3
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0]["ids"]])
        whole = tiny("llama").generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    assert one.prompts[0].free is not None and list(one.prompts[0].free.unpruned.tokens) == whole


@pytest.mark.slow
def test_an_artifact_is_as_the_graph_it_came_from(
    fast: OptimizedModel, compared: lethe.Comparison, tmp_path: Path
) -> None:
    lethe.export(fast, tmp_path / "artifact", "pt2")
    one = lethe.compare(fast, PROMPTS, artifact=tmp_path / "artifact")
    for mine, theirs in zip(one.prompts, compared.prompts, strict=True):
        assert mine.free is not None and theirs.free is not None and mine.forced is not None
        assert mine.free.pruned.tokens == theirs.free.pruned.tokens, "each row by its own limit, too"
        assert mine.free.pruned.kv_mean == pytest.approx(theirs.free.pruned.kv_mean)
        assert mine.free.pruned.kv_peak == theirs.free.pruned.kv_peak
        assert mine.free.unpruned.tokens == theirs.free.unpruned.tokens
        assert theirs.forced is not None and mine.forced.kl_of_step == pytest.approx(theirs.forced.kl_of_step, abs=1e-5)
    assert one.facts["candidate"] == f"pt2 artifact {tmp_path / 'artifact'}"
    assert one.graph is not None and one.graph.unexpected == () and one.graph.after.ops["lethe::attention"] == 3
    other = lethe.optimize(tiny("gpt2"), verified=False)
    with pytest.raises(InputError, match="is of another model: its caches"):
        lethe.compare(other, PROMPTS, artifact=open_artifact(tmp_path / "artifact"))

"""The adapter to lm-evaluation-harness: a local task on the reasoner, and figures against the original model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lethe_compile as lethe
from lethe_compile.errors import InputError
from lethe_compile.models import reasoner
from lethe_compile.models.reasoner.task import render

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install 'lethe-compile[harness]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lethe_compile.harness import LetheLM  # noqa: E402

CAPPED = lethe.LetheConfig(max_tokens=48, prune_interval=8, protect_prompt=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return reasoner.load_model()


@pytest.fixture(scope="module")
def fast(model: Any) -> lethe.OptimizedModel:
    return lethe.optimize(model, policy="full", verified=False)


@pytest.fixture
def adapter(fast: lethe.OptimizedModel) -> LetheLM:
    return LetheLM(fast, reasoner.load_tokenizer(), batch_size=3)


def instance(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def texts(n: int, tokens: int) -> list[tuple[str, str]]:
    """Prompts, of different lengths, and the first `tokens` words of their traces, a space in front."""
    problems = reasoner.problems(n, seed=3, min_tokens=300, max_tokens=400)
    return [(render(problems.prompt(row)), " " + render(problems.trace(row)[:tokens])) for row in range(n)]


def reference(model: Any, adapter: LetheLM, context: str, text: str) -> tuple[float, bool]:
    """By one forward of the original."""
    before, after = adapter.tok_encode(context), adapter.tok_encode(text, add_special_tokens=False)
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    target = torch.tensor(after)
    return float(logits.gather(1, target[:, None]).sum()), bool((logits.argmax(-1) == target).all())


def test_log_likelihoods_are_the_models(model: Any, adapter: LetheLM) -> None:
    pairs = texts(4, 12)
    pairs[1] = (pairs[1][0], " k1 3 k2 3")  # not what the model would write
    pairs[2] = (pairs[2][0], pairs[2][1].rsplit(" ", 4)[0])  # shorter
    found = adapter.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (value, greedy), pair in zip(found, pairs, strict=True):
        expected = reference(model, adapter, *pair)
        assert value == pytest.approx(expected[0], abs=1e-3) and greedy == expected[1]
    assert [greedy for _, greedy in found] == [True, False, True, True]


def test_rolling_log_likelihood_in_one_window_and_in_several(model: Any, adapter: LetheLM) -> None:
    text = texts(1, 0)[0][0]
    requests = [instance("loglikelihood_rolling", text)]
    ids = adapter.tok_encode(text, add_special_tokens=False)
    with torch.no_grad():
        logits = model(torch.tensor([[adapter.prefix_token_id, *ids]])).logits[0, :-1].log_softmax(-1)
    each = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert adapter.loglikelihood_rolling(requests, disable_tqdm=True) == [pytest.approx(float(each.sum()), abs=1e-3)]
    adapter.max_length = 21
    (windowed,) = adapter.loglikelihood_rolling(requests, disable_tqdm=True)
    assert windowed != pytest.approx(float(each.sum()), abs=1e-1), "later windows see less"
    with torch.no_grad():
        start = model(torch.tensor([[adapter.prefix_token_id, *ids[:19]]])).logits[0].log_softmax(-1)
    assert windowed < float(start.gather(1, torch.tensor(ids[:20])[:, None]).sum()) + 1e-3


def test_a_pruned_cache_is_pruned_while_it_scores(fast: lethe.OptimizedModel, adapter: LetheLM) -> None:
    context, text = texts(1, 40)[0]
    (whole,) = adapter.loglikelihood([instance("loglikelihood", context, text)], disable_tqdm=True)
    fast.reconfigure(CAPPED)
    try:
        (pruned,) = adapter.loglikelihood([instance("loglikelihood", context, text)], disable_tqdm=True)
        stats = fast.cache_stats()
    finally:
        fast.reconfigure(lethe.LetheConfig(policy="full"))
    assert max(map(max, stats.retained)) <= 48 < stats.seen[0]
    assert pruned[0] != pytest.approx(whole[0], abs=1e-3)


def test_generation_stops_at_stop_strings(adapter: LetheLM) -> None:
    pairs = texts(3, 30)
    requests = [
        instance("generate_until", context, {"until": [" go"], "max_gen_toks": 20, "do_sample": False})
        for context, _ in pairs
    ]
    requests[1].arguments[1]["max_gen_toks"] = 2
    found = adapter.generate_until(requests, disable_tqdm=True)
    expected = [trace.split(" go")[0] for _, trace in pairs]
    expected[1] = " ".join(expected[1].split()[:2])
    assert [text.strip() for text in found] == [text.strip() for text in expected]


def test_a_local_task_of_the_harness(adapter: LetheLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reasoner writes before its first iteration, exactly; and which of two constants it would take."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": prompt, "start": trace.split(" go")[0].strip()} for prompt, trace in texts(3, 30)]
    for row in rows:
        first = row["start"].split()[1]
        row["choices"] = [f"k1 {int(first) ^ 1}", f"k1 {first}"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
    (tmp_path / "start.yaml").write_text(
        f'task: reasoner_start\n{shared}output_type: generate_until\ndoc_to_target: "{{{{start}}}}"\n'
        'generation_kwargs: {until: [" go"], max_gen_toks: 16, do_sample: false}\n'
        "filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: reasoner_choice\n{shared}output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: 1\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = lm_eval.simple_evaluate(
        adapter,
        tasks=["reasoner_start", "reasoner_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    assert found["results"]["reasoner_start"]["exact_match,strip"] == 1.0
    assert found["results"]["reasoner_choice"]["acc,none"] == 1.0


def test_what_cannot_be_run_is_refused(fast: lethe.OptimizedModel, adapter: LetheLM) -> None:
    with pytest.raises(InputError, match="batch_size=0"):
        LetheLM(fast, reasoner.load_tokenizer(), batch_size=0)
    with pytest.raises(InputError, match="pretrained="):
        LetheLM.create_from_arg_string("policy=full")
    adapter.max_length = 10
    with pytest.raises(InputError, match="leaves no"):
        adapter.loglikelihood([instance("loglikelihood", "loop", " n0" * 10)], disable_tqdm=True)


@pytest.mark.slow
def test_the_command_line_of_the_harness_makes_one() -> None:
    made = LetheLM.create_from_arg_string(f"pretrained={reasoner.path()},policy=lethe,max_tokens=128,batch_size=2")
    assert (made.fast.config.policy, made.fast.config.max_tokens, made.batch_size) == ("lethe", 128, 2)
    assert made.max_length == made.fast.max_positions

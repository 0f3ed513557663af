"""A comparison of made-up figures, for what is done with one."""

from __future__ import annotations

from typing import Any

from lethe_compile.comparison.result import Comparison, Forced, Free, PromptResult, Side
from lethe_compile.comparison.summary import summarize
from lethe_compile.passes.summary import GraphChange, GraphSummary, Unexpected, Value

FACTS = {
    "model": "tiny", "candidate": "pruned graph", "config": {"policy": "lethe", "max_tokens": 20}, "device": "cpu",
    "dtype": "float32", "backend": "eager", "seconds": 1.5, "prompts": 2, "prompts_sha256": "abc", "torch": "2.13",
}  # fmt: skip


def forced(kl: list[float], top1: list[bool], nll: tuple[float, float] = (1.0, 1.1)) -> Forced:
    worst = max(range(len(kl)), key=kl.__getitem__)
    return Forced(len(kl), sum(kl) / len(kl), kl[worst], worst, sum(top1) / len(top1), nll, tuple(kl), tuple(top1))


def free(left: list[int], right: list[int], scores: tuple[float | None, float | None] = (1.0, 1.0)) -> Free:
    sides = [
        Side(tuple(tokens), tokens[-1] == 2, kv, int(2 * kv), score, "")
        for tokens, kv, score in zip((left, right), (1000.0, 400.0), scores, strict=True)
    ]
    return Free(*sides)


def graph(
    *unexpected: Unexpected, ops: dict[str, int] | None = None, inputs: tuple[str, ...] = ("ids",)
) -> GraphChange:
    def summary(nodes: int) -> GraphSummary:
        values = tuple(Value(name, "int64", ("s0", "4")) for name in inputs)
        return GraphSummary(nodes, ops or {"aten::mm": 7, "lethe::attention": 2}, values, values)

    return GraphChange(summary(20), summary(12), 2, unexpected)


PROMPTS = (
    PromptResult("first", "p.jsonl:1", 3, "one [bold]two", forced([0.0, 0.2], [True, True]), free([5, 2], [5, 2])),
    PromptResult(
        "second", "p.jsonl:2", 4, "two", forced([0.1, 0.5, 0.6, 0.0], [True, False, False, True], (2.0, 2.5)),
        free([5, 6, 2], [5, 7, 7, 7], (1.0, 0.0)),
    ),
)  # fmt: skip


def comparison(limits: dict[str, float] | None = None, **options: Any) -> Comparison:
    prompts = options.pop("prompts", PROMPTS)
    metrics = summarize(prompts, (2.0, 1.0), limits or {})
    return Comparison(options.pop("facts", FACTS), prompts, metrics, options.pop("graph", graph()), **options)

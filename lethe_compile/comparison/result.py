"""What a comparison came to: figures of each prompt, of all together, and which limits hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

from lethe_compile.comparison.metrics import Metric
from lethe_compile.passes.summary import GraphChange
from lethe_compile.printing import Printable

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = "lethe-comparison/1"


@dataclass(frozen=True)
class Forced:
    """One prompt, teacher-forced: both graphs are fed the same tokens, and prune or not as in generation.

    Step s predicts the s-th token after the prompt; step 0 is the prefill. KL(unpruned ‖ pruned) is in nats.
    """

    steps: int
    kl: float  # mean over steps
    kl_max: float
    kl_max_step: int
    top1: float  # share of steps at which both find the same token most likely
    nll: tuple[float, float]  # mean negative log-likelihood of the fed tokens, unpruned and pruned
    kl_of_step: tuple[float, ...]  # [steps]
    top1_of_step: tuple[bool, ...]  # [steps]


@dataclass(frozen=True)
class Side:
    """One prompt, continued freely by one of the two graphs; bytes are of this sequence's keys and values."""

    tokens: tuple[int, ...]  # new ones, the end-of-sequence id included
    terminated: bool  # it ended by itself
    kv_mean: float  # over its own steps
    kv_peak: int
    score: float | None  # of its answer, in 0..1; None where nothing was given to grade by
    answer: str  # what was read out of the output


@dataclass(frozen=True)
class Free:
    """One prompt, continued freely by both graphs."""

    unpruned: Side
    pruned: Side

    @property
    def first_divergence(self) -> int | None:
        """Step of the first new token that differs; None where the outputs are the same."""
        left, right = self.unpruned.tokens, self.pruned.tokens
        if left == right:
            return None
        shorter = min(len(left), len(right))
        return next((step for step in range(shorter) if left[step] != right[step]), shorter)


@dataclass(frozen=True)
class PromptResult:
    """One prompt: `id` is unique, `where` says where it came from, such as ``prompts.jsonl:3``."""

    id: str
    where: str
    prompt_tokens: int
    text: str  # the beginning of the prompt, as far as a tokenizer can say
    forced: Forced | None = None
    free: Free | None = None


@dataclass(frozen=True)
class Worst:
    """The prompt that a metric is worst on."""

    id: str
    where: str
    value: float


@dataclass(frozen=True)
class Measured:
    """One metric over all prompts, with its limit, if there is one.

    `unpruned` and `pruned` are the figures behind a `value` that compares two, else None.
    """

    metric: Metric
    value: float
    unpruned: float | None = None
    pruned: float | None = None
    worst: Worst | None = None
    limit: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the limit holds; None without one. A value that is not a number holds none."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.metric.lower_is_better else self.value >= self.limit

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("value", "unpruned", "pruned", "limit", "passed")}
        worst = None if self.worst is None else asdict(self.worst)
        return {**asdict(self.metric), **values, "worst": worst}


@dataclass(frozen=True)
class Regression:
    """A metric that is worse than in the baseline by more than its tolerance, or a graph that has changed."""

    name: str
    title: str
    baseline: float | str
    now: float | str
    tolerance: float | None

    def __str__(self) -> str:
        if self.tolerance is None:
            return f"{self.title}: {self.baseline} in the baseline, {self.now} now"
        return f"{self.title}: {self.baseline:.4g} in the baseline, {self.now:.4g} now (tolerance {self.tolerance:.2g})"


@dataclass(frozen=True)
class BaselineCheck:
    """This comparison beside a recorded one; `notes` say what else differs, such as the machine."""

    file: str
    regressions: tuple[Regression, ...]
    notes: tuple[str, ...] = ()
    values: dict[str, float] = field(default_factory=dict)  # of the baseline, by metric


@dataclass(frozen=True)
class Comparison(Printable):
    """The pruned graph beside the unpruned one, on the same prompts. Prints as tables; `passed` is the verdict.

    `to_dict` gives, JSON-ready, with null for what was not measured and for numbers that are not finite::

        format       "lethe-comparison/1"
        passed       bool: all limits hold, nothing regressed, no unexpected op
        facts        {model, candidate, config, device, dtype, backend, torch, lethe, date, seconds, prompts (a count),
                     prompts_sha256, batch_size, …}; candidate is "pruned graph" or "onnx artifact DIR";
                     config is LetheConfig.to_dict()
        metrics      [{name, title, unit, lower_is_better, value, unpruned, pruned, limit, passed, worst}]: of all
                     prompts together; the last five may be null; worst is {id, where, value}. `name` is one of
                     kl, kl_p99, kl_max (nats), top1, same_outputs (shares), ppl_increase (relative: 0.02 is 2%),
                     accuracy_drop (0.02 is 2 points), memory_saving (1 - kv_mean_ratio), kv_mean_ratio,
                     kv_peak_ratio, speedup (tokens/s over tokens/s), length_ratio, terminated_drop,
                     first_divergence (median step of the outputs that differ)
        by_step      {step [B], kl [B], top1 [B], prompts [B]} or null: teacher-forced, means over prompts, in at most
                     256 buckets of equally many steps; `step` is the first of a bucket
        prompts      [{id, where, prompt_tokens, text,
                       forced {steps, kl, kl_max, kl_max_step, top1, nll [2], kl_by_step {step, kl}} or null,
                       free {first_divergence, unpruned, pruned: {new_tokens, terminated, kv_mean, kv_peak, score,
                             answer}} or null}]
        graph        {before, after: {nodes, ops {name: count}, inputs, outputs: [{name, dtype, shape [text]}]},
                      attention_layers, unexpected [{op, count, reason}]} or null
        baseline     {file, values {name: value}, regressions [{name, title, baseline, now, tolerance}], notes [text]}
                     or null
        failures     [text]: one line for whatever keeps `passed` from being true
    """

    facts: dict[str, Any]
    prompts: tuple[PromptResult, ...]
    metrics: tuple[Measured, ...]
    graph: GraphChange | None
    baseline: BaselineCheck | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """One line for whatever failed."""
        missed = [one for one in self.metrics if one.passed is False]
        lines = [f"{m.metric.title}: {m.metric.show(m.value)}, limit {m.metric.show_limit(m.limit)}" for m in missed]
        if self.graph is not None:
            lines += [f"unexpected op: {one}" for one in self.graph.unexpected]
        return lines + ([] if self.baseline is None else [str(one) for one in self.baseline.regressions])

    def __getitem__(self, name: str) -> float:
        """The value of a metric; raises `KeyError` for one that was not measured."""
        for one in self.metrics:
            if one.metric.name == name:
                return one.value
        raise KeyError(f"{name!r} was not measured: {', '.join(one.metric.name for one in self.metrics)} were")

    def worst_first(self) -> list[PromptResult]:
        """The prompts by what pruning costs them: a right answer first, then KL, then an early divergence."""
        return sorted(self.prompts, key=_cost, reverse=True)

    def with_baseline(self, baseline: BaselineCheck | None) -> Comparison:
        return replace(self, baseline=baseline)

    def to_dict(self) -> dict[str, Any]:
        from lethe_compile.comparison.plain import plain

        return plain(self)

    def __rich__(self) -> RenderableType:
        from lethe_compile.comparison.show import Shown

        return Shown(self)


def _cost(one: PromptResult) -> tuple[float, float, float]:
    lost, step = 0.0, None
    if one.free is not None:
        lost = (one.free.unpruned.score or 0.0) - (one.free.pruned.score or 0.0)
        step = one.free.first_divergence
    return lost, one.forced.kl if one.forced is not None else 0.0, -inf if step is None else -step

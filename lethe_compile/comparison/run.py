"""`compare`: prompts through the unpruned and the pruned graph, teacher-forced and free-running, top to bottom."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lethe_compile.api import optimize
from lethe_compile.artifact import open_artifact
from lethe_compile.artifact.loop import Runner
from lethe_compile.comparison.artifacts import artifact_graph, check_artifact
from lethe_compile.comparison.baseline import check_baseline, read_baseline
from lethe_compile.comparison.cases import MAX_NEW_TOKENS, Case, as_cases, check_cases, digest
from lethe_compile.comparison.forced import force
from lethe_compile.comparison.free import ArtifactWriter, GraphWriter, Writer, run_batch
from lethe_compile.comparison.result import Comparison, Forced, Free, PromptResult
from lethe_compile.comparison.sides import ArtifactDecoder, reference
from lethe_compile.comparison.summary import summarize
from lethe_compile.comparison.thresholds import Thresholds
from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.evaluation.engine import end_tokens
from lethe_compile.passes.summary import GraphChange, GraphSummary, unexpected_ops
from lethe_compile.policies.full import FullPolicy
from lethe_compile.runtime import OptimizedModel

_PACKAGES = ("torch", "transformers", "triton", "onnxruntime")


@dataclass(frozen=True)
class Progress:
    """Told before and after every piece of work: what it is, and how many pieces are done of how many."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Options:
    """How a comparison is run; see `compare`."""

    batch_size: int = 8
    forced: bool = True
    free: bool = True
    repeats: int = 1
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed: must be at least 1")
        if not (self.forced or self.free):
            raise ConfigError("forced=False and free=False contradict each other: nothing would be compared")


def compare(
    model: Any,
    prompts: Iterable[Any],
    *,
    config: LetheConfig | None = None,
    artifact: str | Path | Runner | None = None,
    tokenizer: Any = None,
    thresholds: Thresholds | None = None,
    baseline: str | Path | None = None,
    tolerance: Mapping[str, float] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    forced: bool = True,
    free: bool = True,
    repeats: int = 1,
    max_prompt_tokens: int | None = None,
    name: str = "",
    progress: Callable[[Progress], object] = lambda _: None,
) -> Comparison:
    """Compare a pruned graph, or an exported artifact, with the unpruned graph, on the same prompts.

    Free-running, both continue each prompt greedily. Teacher-forced, both are fed what the unpruned graph wrote, or a
    prompt's own completion, a token a step and with rounds as in generation, and their next-token distributions are
    compared at every step. The unpruned graph is the same rewritten graph with nothing evicted, which `optimize` has
    verified against the model.

    Args:
        model: what `optimize` takes, or what it returned; the latter is left as it was.
        prompts: strings, lists of token ids, mappings as lines of a prompts file, or `Case`s; see `comparison.cases`.
        config: how to prune; the default is the model's own, if it is optimized, else `LetheConfig()`.
        artifact: a directory that `export` wrote, or its runner, in place of the pruned graph.
        tokenizer: for prompts and answers that are text.
        thresholds: limits; the result's `passed` says whether they hold.
        baseline: a file that `write_baseline` wrote; the result's `baseline` names what became worse since.
        tolerance: how much worse a metric may be than in the baseline; see `comparison.baseline`.
        max_new_tokens: of prompts that do not say.
        batch_size: prompts that run together.
        forced, free: which of the two runs to make.
        repeats: of the free-running generations, for the time alone: the median counts.
        max_prompt_tokens: refuse longer prompts.
        name: what to call the model.
        progress: hears of every batch.

    Raises:
        InputError: no prompts, or some that cannot be run; an artifact of another model; a baseline of other prompts.
        ConfigError: limits that contradict each other, or are on what is not measured.
        ArtifactError: the artifact cannot be loaded.
        LetheError: what `optimize` raises, or NaN.
    """
    options = Options(batch_size, forced, free, repeats, max_prompt_tokens)
    limits = thresholds or Thresholds()
    cases = as_cases(prompts, tokenizer, max_new_tokens)
    recorded = None if baseline is None else read_baseline(Path(baseline), digest(cases))
    graded = any(case.grader is not None for case in cases)
    wanted = config or (model.config if isinstance(model, OptimizedModel) else LetheConfig())
    evicts = artifact is not None or wanted.policy != FullPolicy.name
    limits.check(forced=forced, free=free, graded=graded, evicts=evicts)
    start = time.monotonic()
    runner = open_artifact(artifact) if isinstance(artifact, (str, Path)) else artifact
    with ExitStack() as stack:
        fast = _prepare(model, config, runner, stack)
        check_cases(cases, fast.vocab_size, fast.max_positions, max_prompt_tokens)
        if runner is not None:
            check_artifact(runner.manifest, fast)
            check_cases(cases, fast.vocab_size, runner.manifest.model["max_positions"], max_prompt_tokens)
        work = _Work(fast, runner, cases, tokenizer, options, progress)
        results = work.run()
        graph = _graph(fast, runner)
        facts = _facts(work, name, time.monotonic() - start)
    metrics = summarize(results, work.seconds if free else None, limits.limits())
    comparison = Comparison(facts, tuple(results), metrics, graph)
    if recorded is None:
        return comparison
    return comparison.with_baseline(check_baseline(comparison, recorded, tolerance or {}))


def _prepare(model: Any, config: LetheConfig | None, runner: Runner | None, stack: ExitStack) -> OptimizedModel:
    """The optimized model, in a configuration that `stack` undoes. Beside an artifact it only serves unpruned."""
    if not isinstance(model, OptimizedModel):
        return optimize(model, config, policy=None if runner is None else FullPolicy.name)
    if config is not None and config != model.config:
        before, policy = model.config, model.policy

        def restore() -> None:
            model.reconfigure(before)
            model.policy = policy

        model.reconfigure(config)
        stack.callback(restore)
    return model


@dataclass
class _Work:
    """The batches of one comparison, and what they have come to so far."""

    fast: OptimizedModel
    runner: Runner | None
    cases: Sequence[Case]
    tokenizer: Any
    options: Options
    progress: Callable[[Progress], object]
    seconds: tuple[float, float] = (0.0, 0.0)
    done: int = 0
    total: int = 0
    free: dict[str, Free] = field(default_factory=dict)
    forced: dict[str, Forced] = field(default_factory=dict)

    def run(self) -> list[PromptResult]:
        """All batches; results in the order of the cases."""
        batches = list(self._batches())
        runs = 2 * self.options.repeats if self.options.free else 0
        self.total = sum(runs + self._pieces(batch) for batch in batches)
        end, config = end_tokens(self.fast, self.tokenizer), self.fast.config
        unpruned = GraphWriter(self.fast, self.tokenizer, end, pruned=False)
        pruned: Writer = GraphWriter(self.fast, self.tokenizer, end, pruned=True)
        if self.runner is not None:
            pruned = ArtifactWriter(self.runner, self.tokenizer, end)
        for index, batch in enumerate(batches):
            if self.options.free:
                self._free((unpruned, pruned), batch, index)
            if self.options.forced:
                self._forced(unpruned, batch)
        assert self.fast.config == config, "a comparison leaves the configuration as it was"
        return [self._result(case) for case in self.cases]

    def _batches(self) -> Iterator[list[Case]]:
        """Cases of like length share a batch, long ones first."""
        ordered = sorted(self.cases, key=lambda c: -len(c.problem.prompt) - _expected(c))
        for first in range(0, len(ordered), self.options.batch_size):
            yield ordered[first : first + self.options.batch_size]

    def _pieces(self, batch: Sequence[Case]) -> int:
        """Pieces of a batch's teacher forcing: itself, and what is written for it first."""
        if not self.options.forced:
            return 0
        return 1 if self.options.free or all(case.completion for case in batch) else 2

    def _tell(self, stage: str, done: int = 0) -> None:
        self.done += done
        self.progress(Progress(stage, self.done, self.total))

    def _free(self, writers: tuple[Writer, Writer], batch: Sequence[Case], index: int) -> None:
        self._tell("free-running")
        written = run_batch(writers, batch, self.options.repeats, index % 2, lambda: self._tell("free-running", 1))
        left, right = written.seconds
        self.seconds = (self.seconds[0] + left, self.seconds[1] + right)
        for case, *sides in zip(batch, written.unpruned, written.pruned, strict=True):
            self.free[case.problem.id] = Free(*sides)

    def _forced(self, unpruned: Writer, batch: Sequence[Case]) -> None:
        targets = [case.completion for case in batch]
        if not all(targets):
            if self.options.free:
                texts = [self.free[case.problem.id].unpruned.tokens for case in batch]
            else:
                self._tell("text to compare on")
                texts = [side.tokens for side in unpruned(batch)[0]]
                self._tell("text to compare on", 1)
            targets = [given or text for given, text in zip(targets, texts, strict=True)]
        self._tell("teacher-forced")
        candidate = self.fast if self.runner is None else ArtifactDecoder(self.runner)
        with reference(self.fast) as whole:
            results = force(whole, candidate, [case.problem.prompt for case in batch], targets)
        self.forced.update(zip((case.problem.id for case in batch), results, strict=True))
        self._tell("teacher-forced", 1)

    def _result(self, case: Case) -> PromptResult:
        name, length = case.problem.id, len(case.problem.prompt)
        return PromptResult(name, case.where, length, case.text, self.forced.get(name), self.free.get(name))


def _expected(case: Case) -> int:
    return len(case.completion) or case.problem.expected_tokens or case.problem.max_new_tokens


def _graph(fast: OptimizedModel, runner: Runner | None) -> GraphChange | None:
    before = None if fast.captured is None else fast.captured.summary
    if runner is not None:
        return artifact_graph(runner.manifest, before)
    after = GraphSummary.of(fast.program.graph)
    return GraphChange(before, after, len(fast.sites), unexpected_ops(fast.program, before))


def _facts(work: _Work, name: str, seconds: float) -> dict[str, Any]:
    """What the figures depend on, JSON-ready."""
    import lethe_compile

    fast, runner = work.fast, work.runner
    config = fast.config.to_dict()
    candidate = "pruned graph"
    if runner is not None:
        config = {"policy": runner.manifest.policy["name"], **runner.manifest.policy.get("config", {})}
        candidate = f"{runner.manifest.kind} artifact {runner.manifest.directory}"
    return {
        "model": name or type(fast.hf_config).__name__.removesuffix("Config") if fast.hf_config else name or "model",
        "candidate": candidate,
        "config": config,
        "device": str(fast.device),
        "machine": platform.machine(),
        "dtype": str(fast.dtype).removeprefix("torch."),
        "backend": fast.backend[0],
        "lethe": lethe_compile.__version__,
        **{package: _version(package) for package in _PACKAGES},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(seconds, 2),
        "prompts": len(work.cases),
        "prompts_sha256": digest(work.cases),
        "batch_size": work.options.batch_size,
        "repeats": work.options.repeats,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

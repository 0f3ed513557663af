"""The optimized model, as a user meets it: whole sequences, generations on its cache, and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lethe_compile import generation
from lethe_compile.cache import KVCache
from lethe_compile.comparable import comparable
from lethe_compile.compiled import CompiledGraph, padded
from lethe_compile.config import LetheConfig
from lethe_compile.distributed import Ranks
from lethe_compile.errors import InputError, OutOfPagesError
from lethe_compile.executor import Executor
from lethe_compile.inspection import GraphFacts, Inspection
from lethe_compile.ledger import Counts
from lethe_compile.listeners import Listeners, Round
from lethe_compile.memory_limit import MemoryLimit
from lethe_compile.passes.base import PassRecord
from lethe_compile.passes.insert_attention import set_score
from lethe_compile.passes.program import Program
from lethe_compile.past import Past
from lethe_compile.policies import make_policy
from lethe_compile.policies.base import Policy
from lethe_compile.policies.full import FullPolicy
from lethe_compile.prompt import right_pad
from lethe_compile.recorder import Recorder
from lethe_compile.recorder_stream import StreamRecorder
from lethe_compile.report import CacheStats, Report
from lethe_compile.session import Session
from lethe_compile.states import States
from lethe_compile.whole import check_past, logits_after, logits_of

if TYPE_CHECKING:
    from lethe_compile.hf import LetheForCausalLM


class OptimizedModel(nn.Module):
    """A decoder compiled by `optimize`: same inputs, same outputs, and a cache that is pruned while it generates.

    Attributes:
        compiled: the graph and what runs it, without a cache.
        program: what the passes made of the model.
        sites, caches: the attentions of the graph, and those of them that have a cache of their own.
        graph_module: the rewritten graph; its weights are the original model's own tensors.
        device, dtype, windows, token_bytes, keep_sets: see `CompiledGraph`.
        config: the `LetheConfig` in force.
        policy: decides at each round what stays. Between generations another may take its place, `per_head` as it is.
        cache: pages, tables and figures of the generation under way, or of the last one.
        states: what layers other than attention carry along, of the same generation.
        session: that generation.
        kv_memory: most bytes of the cache, or fraction of what is free; see `optimize`. Holds from the next generation.
        hf_config: the original's transformers config, where it has one.
        give_way: ends the session of `as_hf()` that holds the cache; None while another generation does, or none.
        vocab_size, max_positions: limits on inputs; `max_positions` is None where the model has none.
        needs_content: whether masks depend on the tokens.
        ranks: the processes that run this model together, of `optimize`'s `tp`; None for one alone.
        restart_at: tokens beyond which a generation computes all keys and values anew, once, as transformers does where
            rotary frequencies change with the length; None where they do not.
        captured: the graph before the passes, as `optimize` saw it; None where nobody noted it.
    """

    def __init__(
        self,
        program: Program,
        config: LetheConfig,
        *,
        records: list[PassRecord],
        vocab_size: int,
        max_positions: int | None,
        generation_config: Any = None,
        hf_config: Any = None,
        backend: tuple[str, str] = ("eager", "asked for"),
        ranks: Ranks | None = None,
        executor: Executor | None = None,
    ) -> None:
        super().__init__()
        self.compiled = compiled = CompiledGraph(program, backend, ranks, executor)
        self.program, self.ranks, self.device, self.dtype = program, ranks, compiled.device, compiled.dtype
        self.graph_module, self.sites, self.caches = program.module, program.sites, compiled.caches
        self.windows, self.token_bytes = compiled.windows, compiled.token_bytes
        self.keep_sets, self.needs_content = compiled.keep_sets, compiled.content
        self.stateful = program.stateful
        self.stateful_modules = nn.ModuleList(call.module for call in program.stateful)
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.generation_config, self.hf_config = generation_config, hf_config
        self.kv_memory: int | float | None = None
        self.restart_at: int | None = None
        self.captured: GraphFacts | None = None
        self.give_way: Callable[[], object] | None = None
        self._records = records
        self._listeners = Listeners(program.sites, compiled.keep_sets)
        self._limit = MemoryLimit(compiled)
        self.states = compiled.new_states()
        self._generating = False
        self._lent_to: str | None = None
        self._configure(config)

    def _configure(self, config: LetheConfig) -> None:
        config = replace(config, prune_interval=config.interval_on(self.device.type))
        self.config, self.policy = config, make_policy(config)
        self.compiled.scored = self.policy.decay is not None
        self.page_size = config.page_size_on(self.device.type)
        self.begin_policy(self.policy, 0)
        self._hold_nothing()

    def _hold_nothing(self) -> None:
        """A new cache, and a session of no sequence."""
        self.cache = self.new_cache()
        self.session = self._new_session(0, torch.zeros(0, dtype=torch.int64))

    def _new_session(self, rows: int, prompt_lengths: Tensor, new_tokens: int | None = None) -> Session:
        return Session(
            self.compiled,
            self.cache,
            self.states,
            self.policy,
            self._listeners,
            rows=rows,
            prompt_lengths=prompt_lengths,
            interval=self.config.interval,
            new_tokens=new_tokens,
            restart_at=self.restart_at,
        )

    def reconfigure(self, config: LetheConfig) -> None:
        """Prune by another policy, or with other settings, from the next generation on; nothing is captured anew.

        What a score gathers and how it decays is part of the graph, and is changed there; CUDA graphs are recorded
        again by the next generation.

        Raises:
            ConfigError: an unknown policy, or settings that this model cannot serve.
            InputError: a generation is under way.
        """
        if self.give_way is not None:
            self.give_way()
        if self._generating:
            who = "generating" if self._lent_to is None else f"lent to {self._lent_to}"
            raise InputError(f"this model is {who}: end that before another configuration")
        rule = make_policy(config)
        self.compiled.check_heads(rule)
        self.begin_policy(rule, 0)
        set_score(self.program, rule.decay, rule.peak)
        self.compiled.forget_decode_graphs()
        self._configure(config)

    @property
    def backend(self) -> tuple[str, str]:
        """How the graph runs, and why; see `executor.choose_backend`."""
        return self.compiled.backend

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.compiled.check_heads(policy)
        self._policy = policy

    @property
    def on_round(self) -> list[Callable[[Round], None]]:
        """Callables that get a `Round` for each layer a round changed."""
        return self._listeners.on_round

    @property
    def recorder(self) -> Recorder | None:
        """Listens to every round while there is one; see `recorded`."""
        return self._listeners.recorder

    # ------------------------------------------------------------------------------------------------- whole sequences

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits ``[rows, T, vocab_size]`` of whole sequences, nothing evicted; a generation under way is untouched.

        input_ids are int64 ``[rows, T]``; `attention_mask` is 0 on padding, left or right, where logits mean nothing;
        `position_ids` default to counting each row's own tokens.

        Raises:
            InputError: ids outside the vocabulary, an empty batch, or more tokens than the model has positions; several
                ranks run this model, and an Engine has it.
        """
        if self.ranks is not None and self._lent_to is not None:
            raise InputError(f"{self._lent_to} has this model, and ranks take one step at a time: close it first")
        lengths, order = right_pad(input_ids, attention_mask, self.vocab_size, self.max_positions, self.device)
        ids = input_ids.gather(1, order)
        positions = None if position_ids is None else position_ids.expand_as(ids).gather(1, order)
        logits = logits_of(self.compiled, self.new_cache(), ids, lengths, positions)
        return torch.empty_like(logits).scatter_(1, order[:, :, None].expand_as(logits), logits)

    @torch.no_grad()
    def forward_after(self, past: Past, input_ids: Tensor) -> Tensor:
        """Logits ``[R, T, vocab_size]`` of tokens ``[R, T]`` after a past; a generation under way is untouched.

        Raises:
            InputError: masks read more of earlier tokens than a past holds, or layers cache something else.
        """
        return logits_after(self.compiled, self.new_cache(), past, input_ids)

    # ------------------------------------------------------------------------------------------------------ generation

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """Continue prompts as transformers' `generate` does: same arguments, same shapes; see `generation.generate`.

        With a fixed `policy="full"` the tokens are transformers' own; with Lethe the cache is pruned along the way.
        `KeyboardInterrupt` frees the cache and leaves the model ready for the next call.
        """
        if self.ranks is not None:
            self.ranks.same(comparable({"inputs": inputs, **options}))
        return generation.generate(self, inputs, **options)

    def as_hf(self) -> LetheForCausalLM:
        """This model for what expects transformers' models: `pipeline("text-generation")`, and loops of one's own.

        Raises:
            InputError: it was optimized from something else than a transformers model, or several ranks run it.
        """
        if self.ranks is not None:
            raise InputError("transformers' own loop lets each rank draw its tokens: call generate() of this model")
        from lethe_compile.hf import LetheForCausalLM

        return LetheForCausalLM(self)

    def begin(self, rows: int, prompt_lengths: Tensor, new_tokens: int | None = None) -> None:
        """Start a generation of `rows` sequences with an empty cache. Part of `generation.Decoder`.

        With `new_tokens`, the most that each row gets, a batch is refused here that might not fit later.
        """
        if self.give_way is not None:
            self.give_way()  # whoever goes on with that session is told
        self._refuse_second()
        hint = self._limit.admit(
            self.cache, self.kv_memory, self.policy, prompt_lengths, new_tokens, self.config.cap_floor
        )
        prompt_lengths = padded(prompt_lengths, self.compiled.bucket(rows))
        self._open_cache(rows, len(prompt_lengths), hint)
        self._generating = True
        self.begin_policy(self.policy, self.cache.rows)
        self.session = self._new_session(rows, prompt_lengths, new_tokens)

    def _open_cache(self, rows: int, sequences: int, hint: int | Counts) -> None:
        """Begin the cache, and other state, for `sequences`, of which `rows` hold something."""
        cache_rows = sequences * self.keep_sets.heads
        if not isinstance(hint, int):  # rows that fill the bucket hold nothing
            hint = np.pad(hint, ((0, 0), (0, cache_rows - hint.shape[1])))
        with self.compiled.together("begin a generation"):
            try:
                self.cache.begin(cache_rows, hint)
            except OutOfPagesError as error:
                raise InputError(f"{rows} sequences do not fit: {error}") from error
        self.states.begin(sequences)

    def lend(self, borrower: str) -> Executor:
        """What runs the graph, for a `borrower` with a cache of its own; no generation begins until `take_back`.

        Raises:
            InputError: the model is generating, or lent already.
        """
        if self.give_way is not None:
            self.give_way()
        self._refuse_second()
        self._generating, self._lent_to = True, borrower
        if self.device.type == "cuda":  # memory for the borrower's cache
            self.compiled.forget_decode_graphs()
            self._hold_nothing()
        return self.compiled.executor

    def take_back(self) -> None:
        """The borrower is done; does nothing where there is none."""
        if self._lent_to is not None:
            self._generating, self._lent_to = False, None

    def _refuse_second(self) -> None:
        if self._lent_to is not None:
            raise InputError(f"{self._lent_to} has this model: ask it, or close it first")
        if self._generating:
            raise InputError("this model is generating already: it has one cache; optimize() again for a second one")

    def begin_policy(self, policy: Policy, rows: int) -> None:
        """Let a policy forget its last generation, and know what the caches of this model take."""
        self.compiled.begin_policy(policy, rows)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, lengths: Tensor, *, whole: bool = False) -> Tensor:
        """Run right-padded prompts ``[rows, T]``; logits ``[rows, vocab_size]`` of each row's last token.

        With `whole`, logits ``[rows, T, vocab_size]`` of all tokens.
        """
        return self.session.prefill(input_ids, lengths, whole)

    @torch.no_grad()
    def adopt(self, past: Past) -> None:
        """Start a generation from what another cache holds, in place of `begin` and `prefill`.

        What attention went to in the past is not known: its scores begin at zero, and the first round comes after an
        interval of steps, which will have told.

        Raises:
            InputError: masks read more of earlier tokens than a past holds, or layers cache something else.
        """
        check_past(self.compiled)
        self.begin(len(past.lengths), past.lengths)
        try:
            self.session.adopt(past)
        except BaseException:
            self.end()
            raise

    @torch.no_grad()
    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        """Append one token ``[rows]`` to each row that is `active`; logits ``[rows, vocab_size]``.

        A row that was not active once must not be so again: between rounds the host does not ask.
        """
        return self.session.decode(tokens, active)

    def end(self) -> None:
        """Give all pages back. Part of `generation.Decoder`."""
        self._generating = False
        try:
            self.session.observe()
        finally:
            self.cache.end()

    def new_cache(self) -> KVCache:
        """An empty cache of this model's layers."""
        return self.compiled.new_cache(self.page_size)

    def graph_state(
        self, cache: KVCache, states: States, rows: int, *, first: int = 0, furthest: int = 0
    ) -> dict[str, Tensor]:
        """See `CompiledGraph.graph_state`."""
        return self.compiled.graph_state(cache, states, rows, first=first, furthest=furthest)

    # ----------------------------------------------------------------------------------------------------- for a while

    def interpreted(self) -> AbstractContextManager[None]:
        """Inside this context the graph runs node by node, with the same kernels, and nothing is compiled."""
        return self.compiled.interpreted()

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Generations inside this context evict nothing: the same graph as a baseline."""
        pruning = self._policy
        # Of any graph: it evicts nothing from any head.
        self._policy = FullPolicy(replace(self.config, policy=FullPolicy.name, policy_options={}))
        try:
            yield
        finally:
            self._policy = pruning

    def twin(self) -> OptimizedModel:
        """The same graph with a cache of its own: for two generations side by side. `reconfigure` changes both."""
        twin = OptimizedModel(
            self.program,
            self.config,
            records=self._records,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
            generation_config=self.generation_config,
            hf_config=self.hf_config,
            backend=self.backend,
            ranks=self.ranks,
            executor=self.compiled.executor,
        )
        twin.restart_at, twin.captured = self.restart_at, self.captured
        return twin.eval()

    @contextmanager
    def recorded(
        self, *, sparsity: bool = True, tokens: bool = False, path: str | Path | None = None
    ) -> Iterator[Recorder]:
        """Generations inside this context are followed round by round; the recorder tells of the latest.

        With `tokens`, also which tokens each round evicted. With `path`, rounds go to that file and none is held in
        memory; `recorder_stream.load_recorder` reads them back.
        """
        before, given = self.recorder, (self.compiled.row_bytes, self.page_size, self.keep_sets, sparsity, tokens)
        stream = None if path is None else StreamRecorder(Path(path), *given)
        self._listeners.recorder = recorder = stream or Recorder(*given)
        try:
            yield recorder
        finally:
            self._listeners.recorder = before
            if stream is not None:
                stream.close()

    # --------------------------------------------------------------------------------------------------------- reports

    def report(self) -> Report:
        """What the compiler found, rewrote and refused; prints as a table, `to_dict` gives JSON."""
        where = (self.dtype, self.device, self.backend, self.page_size)
        return Report.of(self._records, self.sites, self.stateful, self.config, *where)

    def inspection(self, model: str = "") -> Inspection:
        """The graph as it was captured and as it is now, with `report`, under the name `model`; prints, and dumps."""
        return Inspection(model, self.captured, tuple(self._records), GraphFacts.of(self.program), self.report())

    def cache_stats(self) -> CacheStats:
        """Per layer and sequence: tokens seen and retained, rounds, threshold, Hoyer sparsity, bytes held and freed.

        Of the generation under way, or of the last one; a finished sequence shows what it held when it finished.
        """
        if self._generating and self._lent_to is None:
            self.session.observe()
        return self.session.stats()

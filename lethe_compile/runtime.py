"""The optimized model: a rewritten graph, its paged cache, and the rounds between decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lethe_compile import generation
from lethe_compile.cache import Geometry, KVCache
from lethe_compile.config import LetheConfig
from lethe_compile.distributed import Ranks, digest
from lethe_compile.errors import ConfigError, InputError, OutOfPagesError
from lethe_compile.executor import DecodeGraph, Executor
from lethe_compile.inspection import GraphFacts, Inspection
from lethe_compile.keep_sets import KeepSets
from lethe_compile.kernels.ops import hoyer_sparsity
from lethe_compile.ledger import Counts, Ledger
from lethe_compile.memory import allowance, available_bytes
from lethe_compile.observation import fill_observed
from lethe_compile.passes.base import PassRecord
from lethe_compile.passes.insert_attention import set_score
from lethe_compile.passes.program import Program
from lethe_compile.past import Past
from lethe_compile.policies import make_policy
from lethe_compile.policies.base import NEVER, Policy, RoundState
from lethe_compile.policies.full import FullPolicy
from lethe_compile.prompt import check_ids
from lethe_compile.recorder import Recorder, Sample
from lethe_compile.recorder_stream import StreamRecorder
from lethe_compile.report import CacheStats, Report
from lethe_compile.restart import Text, text_of
from lethe_compile.states import States

if TYPE_CHECKING:
    from lethe_compile.hf import LetheForCausalLM

Scores = tuple[Tensor, Tensor, Tensor]  # masses, positions, lengths: see `KVCache.scores`
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
_ATTEMPTS = 4  # to reserve pages; each but the first after a round that prunes harder


@dataclass(frozen=True)
class Round:
    """What one round did to one layer: handed to the callbacks in `OptimizedModel.on_round`."""

    layer: int  # an attention of the graph; those that share a cache hear of the same
    position: Tensor  # [rows, N] int32 stored positions before the round, -1 beyond a row's length
    keep: Tensor  # [rows, N] bool: what stays
    next_position: Tensor  # [rows] int64: the first position whose query sees the result
    heads: int = 1  # rows of one sequence: its KV heads, where each keeps tokens of its own, else 1


class OptimizedModel(nn.Module):
    """A decoder compiled by `optimize`: same inputs, same outputs, and a cache that is pruned while it generates.

    Attributes:
        sites, caches: the attentions of the graph, and those of them that have a cache of their own.
        graph_module: the rewritten graph; its weights are the original model's own tensors.
        backend: how it runs, and why; see `executor.choose_backend`.
        config: the `LetheConfig` in force.
        policy: decides at each round what stays. Between generations another may take its place, `per_head` as it is.
        cache: pages, tables and figures of the generation under way, or of the last one.
        states: what layers other than attention carry along, of the same generation.
        kv_memory: most bytes of the cache, or fraction of what is free; see `optimize`. Holds from the next generation.
        on_round: callables that get a `Round` for each layer a round changed.
        recorder: listens to every round while there is one; see `recorded`.
        hf_config: the original's transformers config, where it has one.
        give_way: ends the session of `as_hf()` that holds the cache; None while another generation does, or none.
        vocab_size, max_positions: limits on inputs; `max_positions` is None where the model has none.
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
    ) -> None:
        super().__init__()
        self._dtype: torch.dtype = program.sites[0].node.meta["val"].dtype
        self._device: torch.device = program.input_ids.meta["val"].device
        self.backend, self.ranks = backend, ranks
        self._program, self._executor = program, Executor(program, compiled=backend[0] != "eager")
        self._graphs: dict[int, DecodeGraph] = {}  # by rows
        self.graph_module, self.sites, self.caches = program.module, program.sites, program.caches
        self.stateful, self._content = program.stateful, program.content
        self.stateful_modules = nn.ModuleList(call.module for call in program.stateful)
        self._keep_sets = KeepSets([site.keep_sets for site in program.caches])
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.generation_config, self.hf_config = generation_config, hf_config
        self.kv_memory: int | float | None = None
        self._allowed_by: int | float | None = None  # the `kv_memory` behind `cache.max_bytes`
        self.restart_at: int | None = None
        self.captured: GraphFacts | None = None
        self.on_round: list[Callable[[Round], None]] = []
        self.recorder: Recorder | None = None
        self.give_way: Callable[[], object] | None = None
        self._records = records
        tokens = [geometry.bytes_per_token(self._dtype) for geometry in self._geometries()]
        self._token_bytes = np.array(tokens, np.int64)[:, None]  # [layers, 1]
        self.states = States(self.stateful, self._device)
        self._generating, self._rows = False, 0
        self._lent_to: str | None = None
        self._configure(config)

    def _configure(self, config: LetheConfig) -> None:
        config = replace(config, prune_interval=config.interval_on(self._device.type))
        self.config, self.policy = config, make_policy(config)
        self._scored = self.policy.decay is not None
        self.page_size = config.page_size_on(self._device.type)
        self.cache = self.new_cache()
        self._rows = 0
        self.begin_policy(self.policy, 0)
        self._reset(torch.zeros(0, dtype=torch.int64))

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
        self._check_heads(rule)
        self.begin_policy(rule, 0)
        set_score(self._program, rule.decay, rule.peak)
        self._graphs.clear()
        self._configure(config)

    @property
    def device(self) -> torch.device:
        """Where inputs must be; the graph was captured there and stays there."""
        return self._device

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._check_heads(policy)
        self._policy = policy

    def _check_heads(self, policy: Policy) -> None:
        sharing = [site.layer for site in self.caches if self.ranks and site.kv_parts < self.ranks.size]
        if sharing and policy.per_head:
            raise ConfigError(
                f"policy {policy.name!r} keeps other tokens for each KV head, and ranks share those of layers {sharing}"
            )
        several = [site.layer for site in self.caches if site.kv_heads > 1]
        if several and policy.per_head != (self._keep_sets.heads > 1):
            kinds = ["keeps the same tokens for all KV heads of a layer", "keeps other tokens for each KV head"]
            raise ConfigError(
                f"policy {policy.name!r} {kinds[policy.per_head]}, and this model was compiled for one that"
                f" {kinds[not policy.per_head]} (layers {several} have several): optimize the model again with it"
            )

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
        lengths, order = self._right_pad(input_ids, attention_mask)
        ids = input_ids.gather(1, order)
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        if position_ids is not None:
            positions = position_ids.expand_as(ids).gather(1, order)
        cache, states = self.new_cache(), States(self.stateful, self._device)
        cache.begin(len(ids) * self._keep_sets.heads)
        cache.reserve_rows(self._host(lengths))
        states.begin(len(ids))
        furthest = ids.shape[1] if position_ids is None else self._checked(positions, lengths)
        logits = self._run(cache, states, ids, positions, lengths, furthest)
        return torch.empty_like(logits).scatter_(1, order[:, :, None].expand_as(logits), logits)

    def _checked(self, positions: Tensor, lengths: Tensor) -> int:
        """One more than the furthest position; masks by content need positions [rows, T] that tell tokens apart."""
        real = torch.arange(1, positions.shape[1], device=positions.device) < lengths[:, None]
        if self._content and bool(((positions.diff(dim=1) <= 0) & real).any() | (positions < 0).any()):
            raise InputError("position_ids must increase within each row: this model's masks tell tokens apart by them")
        return int(positions.max()) + 1

    def _right_pad(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Real tokens of each row [rows], and the columns [rows, T] in an order that brings them to the front."""
        ids = check_ids(ids, self.vocab_size, self.device)
        if self.max_positions is not None and ids.shape[1] > self.max_positions:
            raise InputError(f"{ids.shape[1]} tokens are more than the model's {self.max_positions} positions")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if real.shape != ids.shape:
            raise InputError(f"attention_mask must be {list(ids.shape)} as input_ids, not {list(real.shape)}")
        return real.sum(1), real.int().argsort(dim=1, descending=True, stable=True)

    # ------------------------------------------------------------------------------------------------------ generation

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """Continue prompts as transformers' `generate` does: same arguments, same shapes; see `generation.generate`.

        With a fixed `policy="full"` the tokens are transformers' own; with Lethe the cache is pruned along the way.
        `KeyboardInterrupt` frees the cache and leaves the model ready for the next call.
        """
        if self.ranks is not None:
            self.ranks.same(_shown({"inputs": inputs, **options}))
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
        self._rows = rows
        hint = self._admit(prompt_lengths, new_tokens)
        prompt_lengths = _padded(prompt_lengths, self._bucket(rows))
        cache_rows = len(prompt_lengths) * self._keep_sets.heads
        if not isinstance(hint, int):  # rows that fill the bucket hold nothing
            hint = np.pad(hint, ((0, 0), (0, cache_rows - hint.shape[1])))
        with self._together("begin a generation"):
            try:
                self.cache.begin(cache_rows, hint)
            except OutOfPagesError as error:
                raise InputError(f"{rows} sequences do not fit: {error}") from error
        self.states.begin(len(prompt_lengths))
        self._generating = True
        self.begin_policy(self.policy, cache_rows)
        self._reset(prompt_lengths, new_tokens)

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
            self._graphs.clear()
            self.cache, self._rows = self.new_cache(), 0
            self._reset(torch.zeros(0, dtype=torch.int64))
        return self._executor

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
        policy.begin(len(self.caches), rows, self.token_bytes)

    def _bucket(self, rows: int) -> int:
        """Sequences that the cache is made for: captured graphs serve a few sizes, and what is over stays empty."""
        return bucket(rows) if self.backend[0] == "cudagraphs" else rows

    def _admit(self, prompt_lengths: Tensor, new_tokens: int | None) -> int | Counts:
        """Tokens [layers, rows] that the cache should have room for at once; refuses what cannot be made to fit."""
        cache = self.cache
        last = cache.max_bytes if self._allowed_by == self.kv_memory else None
        cache.max_bytes = self._least(allowance(self.kv_memory, self.device, cache.pool_bytes, last))
        self._allowed_by = self.kv_memory
        if new_tokens is None:
            return 0
        prompts = self._host(prompt_lengths)
        least = self.policy.least_tokens(prompts, new_tokens, self._windows)
        allowed = cache.max_bytes
        if allowed is None and self.device.type == "cuda":
            allowed = self._least(available_bytes(self.device) + cache.pool_bytes)
        need = cache.bytes_for(least)
        if allowed is not None and need > allowed:
            raise InputError(
                f"{len(prompt_lengths)} sequences of up to {prompts.max(initial=0)} prompt and {new_tokens} new tokens"
                f" need {need} bytes of KV cache under policy {self.policy.name!r}, and {allowed} bytes are allowed"
                f" (kv_memory={self.kv_memory}): run fewer or shorter sequences at a time, raise kv_memory, or prune"
                " with a policy that needs less"
            )
        if cache.contiguous:
            return 0
        return least if cache.max_bytes is not None else np.minimum(least, prompts + self.config.cap_floor)

    def _reset(self, prompt_lengths: Tensor, new_tokens: int | None = None) -> None:
        self._prompt_lengths = prompt_lengths.to(self.device)
        rows = len(prompt_lengths)
        self._graph: DecodeGraph | None = None
        if self.backend[0] == "cudagraphs" and rows:
            if rows not in self._graphs:
                self._graphs[rows] = DecodeGraph.of_rows(self._executor, rows, self.device)
            self._graph = self._graphs[rows]
            self._next_position = self._graph.next_position.zero_()
        else:
            self._next_position = torch.zeros_like(self._prompt_lengths)
        self._new_tokens = new_tokens
        cache_rows = rows * self._keep_sets.heads
        self._live = np.zeros(cache_rows, np.int64)  # 1 for a row that may take part in the next steps
        self._ledger = Ledger(len(self.caches), cache_rows, self.recorder)
        self._text: Text | None = None
        self._until_round = self._furthest = 0
        self._cleared_at = -1  # steps before a round at which masses are cleared

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, lengths: Tensor, *, whole: bool = False) -> Tensor:
        """Run right-padded prompts ``[rows, T]``; logits ``[rows, vocab_size]`` of each row's last token.

        With `whole`, logits ``[rows, T, vocab_size]`` of all tokens.
        """
        padded = _padded(lengths, self._sequences)
        prompts = self._host(padded)
        logits = self._fill(input_ids, lengths, prompts, whole)
        self._next_position.copy_(padded)
        self._ledger.prefill(prompts, self.cache.pages_held())
        self._text = text_of(input_ids, int(prompts.max(initial=0)), self.restart_at)
        self._round(padded > 0)
        return logits if whole else logits[:, 0]

    def _fill(self, ids: Tensor, lengths: Tensor, tokens: Counts, whole: bool) -> Tensor:
        """Fill an empty cache from right-padded ids ``[R, T]`` of `lengths` [R], as `tokens` [rows] has them, too.

        Returns logits ``[R, T, vocab]``, or with `whole` False those of each row's last token, ``[R, 1, vocab]``.
        """
        self.cache.reserve_rows(tokens)
        self.cache.assume(tokens)
        self._furthest = ids.shape[1]

        def run(ids: Tensor, positions: Tensor, lengths: Tensor, last: Tensor | None) -> Tensor:
            logits = self._run(self.cache, self.states, ids, positions, lengths, self._furthest, last).float()
            self.states.has_previous_state = True
            return logits

        window = self.policy.observation_window
        if window is not None and ids.shape[1] > 1:
            return fill_observed(run, self.cache.clear_mass, ids, lengths, window, whole)
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        return run(ids, positions, lengths, None if whole else (lengths - 1).clamp(min=0))

    @torch.no_grad()
    def adopt(self, past: Past) -> None:
        """Start a generation from what another cache holds, in place of `begin` and `prefill`.

        What attention went to in the past is not known: its scores begin at zero, and the first round comes after an
        interval of steps, which will have told.

        Raises:
            InputError: masks read more of earlier tokens than a past holds, or layers cache something else.
        """
        self._check_past()
        self.begin(len(past.lengths), past.lengths)
        padded = _padded(past.lengths.to(self.device), self._sequences)
        prompts = self._host(padded)
        try:
            past.fill(self.cache, prompts)
            self._next_position.copy_(padded)
            self._furthest = int(prompts.max(initial=0))
            self._ledger.prefill(prompts, self.cache.pages_held(), self.cache.lengths)
            self._live = (prompts > 0).astype(np.int64)
            self._until_round = self.config.interval
            self._reserve(padded > 0)
            self._observe_from()
        except BaseException:
            self.end()
            raise

    @torch.no_grad()
    def forward_after(self, past: Past, input_ids: Tensor) -> Tensor:
        """Logits ``[R, T, vocab_size]`` of tokens ``[R, T]`` after a past; a generation under way is untouched.

        Raises:
            InputError: masks read more of earlier tokens than a past holds, or layers cache something else.
        """
        self._check_past()
        cache, states = self.new_cache(), States(self.stateful, self._device)
        rows, tokens = input_ids.shape
        cache.begin(rows * self._keep_sets.heads)
        past.fill(cache, self._host(past.lengths))
        cache.reserve(tokens)
        states.begin(rows)
        positions = past.lengths[:, None] + torch.arange(tokens, device=input_ids.device)
        furthest = int(past.lengths.max()) + tokens
        return self._run(cache, states, input_ids, positions, torch.full_like(past.lengths, tokens), furthest)

    def _check_past(self) -> None:
        if self.ranks is not None:
            raise InputError("a past from elsewhere holds the keys of all heads, and a rank its own: generate from ids")
        if latent := [site.layer for site in self.sites if site.latent]:
            raise InputError(
                f"layers {latent} cache the latent of their keys and values, and a cache from elsewhere holds these:"
                " generate from the prompt, or optimize with LetheConfig(cache_latent=False)"
            )
        layers = [site.layer for site in self.sites if site.columns]
        if layers:
            raise InputError(
                f"the masks of layers {layers} read more of earlier tokens than keys and values, which a cache from"
                " elsewhere does not hold: generate from the prompt"
            )

    @torch.no_grad()
    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        """Append one token ``[rows]`` to each row that is `active`; logits ``[rows, vocab_size]``.

        A row that was not active once must not be so again: between rounds the host does not ask.
        """
        if self._text is not None and self._text.add(tokens.masked_fill(~active, 0), self._next_position[: self._rows]):
            return self._restart(self._text.ids, active)
        if self._until_round == 0:
            self._round(_padded(active, self._sequences))
        if self._until_round == self._cleared_at:
            self.cache.clear_mass()
        self._until_round -= 1
        self.cache.assume(self._live)
        self._furthest += 1
        if self._graph is not None:
            self._graph.tokens[: self._rows].copy_(tokens)
            self._graph.active[: self._rows].copy_(active)
            logits = self._graph.replay({**self.cache.inputs(), **self.states.inputs()})[: self._rows]
        else:
            ids = tokens.masked_fill(~active, 0)[:, None]
            positions = self._next_position[:, None]
            logits = self._run(self.cache, self.states, ids, positions, active, self._furthest)[:, 0].float()
            self._next_position += active
        self._ledger.step()
        return logits

    def _restart(self, ids: Tensor, active: Tensor) -> Tensor:
        """Fill the cache anew from the whole text ``[rows, T]`` of rows that are `active`, as `decode` would go on."""
        self._observe()
        lengths = (self._next_position[: self._rows] + 1).masked_fill(~active, 0)
        filled = _padded(lengths, self._sequences)
        tokens = self._host(filled)
        self.cache.end()
        self.states.begin(self._sequences)
        self.begin_policy(self.policy, self.cache.rows)
        logits = self._fill(ids, lengths, tokens, whole=False)
        self._next_position += filled > 0
        self._text = None
        self._ledger.step()
        if self.recorder is not None:
            self.recorder.refilled(self._ledger.decoded)
        self._round(filled > 0)
        return logits[:, 0]

    def end(self) -> None:
        """Give all pages back. Part of `generation.Decoder`."""
        self._generating = False
        try:
            self._observe()
        finally:
            self.cache.end()

    def _run(
        self,
        cache: KVCache,
        states: States,
        ids: Tensor,
        positions: Tensor,
        new_lengths: Tensor,
        furthest: int,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits of `ids` [rows, T], the cache's first rows, as `Executor.run`; all positions are below `furthest`."""
        state = self.graph_state(cache, states, len(ids), furthest=furthest)
        return self._executor.run(ids, positions, new_lengths.to(torch.int32), state, last)

    def graph_state(
        self, cache: KVCache, states: States, rows: int, *, first: int = 0, furthest: int = 0
    ) -> dict[str, Tensor]:
        """The graph's state inputs, of `rows` sequences from the `first` on; all positions are below `furthest`."""
        state, heads = {**cache.inputs(), **states.inputs(rows, first)}, self._keep_sets.heads
        if self._content:
            state["seen"] = torch.arange(furthest, device=self._device)
        for name in ("page_table", "length"):
            state[name] = state[name][:, first * heads : (first + rows) * heads]
        return state

    @contextmanager
    def interpreted(self) -> Iterator[None]:
        """Inside this context the graph runs node by node, with the same kernels, and nothing is compiled."""
        backend, executor = self.backend, self._executor
        self.backend, self._executor = ("eager", "for now"), executor.interpreted()
        try:
            yield
        finally:
            self.backend, self._executor = backend, executor

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
            self._program,
            self.config,
            records=self._records,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
            generation_config=self.generation_config,
            hf_config=self.hf_config,
            backend=self.backend,
        )
        twin._executor, twin.restart_at, twin.captured = self._executor, self.restart_at, self.captured
        return twin.eval()

    @contextmanager
    def recorded(
        self, *, sparsity: bool = True, tokens: bool = False, path: str | Path | None = None
    ) -> Iterator[Recorder]:
        """Generations inside this context are followed round by round; the recorder tells of the latest.

        With `tokens`, also which tokens each round evicted. With `path`, rounds go to that file and none is held in
        memory; `recorder_stream.load_recorder` reads them back.
        """
        before, given = self.recorder, (self._token_bytes, self.page_size, self._keep_sets, sparsity, tokens)
        stream = None if path is None else StreamRecorder(Path(path), *given)
        self.recorder = stream or Recorder(*given)
        try:
            yield self.recorder
        finally:
            self.recorder = before
            if stream is not None:
                stream.close()

    # ---------------------------------------------------------------------------------------------------------- rounds

    def _round(self, active: Tensor) -> None:
        """Let the policy choose what stays, compact, free what finished rows held, and reserve the next interval.

        Waits for the device once, behind the compaction; more often only where pages run out.
        """
        held, scores = self.cache.pages_held(), self._scores()
        sparsity = self._sparsity(scores) if self.recorder is not None and self.recorder.sparsity else None
        before, seen, on = self._evict(active, scores)
        self._ledger.read(seen, before, held)
        if self.recorder is not None:
            measured = None if sparsity is None else sparsity.double().cpu().numpy()
            after, threshold = self.cache.lengths.copy(), self.policy.thresholds.cpu().numpy()
            self.recorder.round(Sample(self._ledger.decoded, on > 0, before, after, measured, seen, threshold))
        self._live = on
        self.cache.free_rows(np.flatnonzero((on == 0) & self.cache.pages_held().any(0)).tolist())
        self._until_round = self.config.interval
        left = None if self._new_tokens is None else self._new_tokens - self._ledger.decoded
        if left is not None and left > 0:  # no page for tokens that nobody asked for
            self._until_round = min(self._until_round, left)
        self._reserve(active)
        self._observe_from()
        if on.any():
            counted = self._keep_sets.there(self.cache.rows) & (on > 0)
            self._ledger.timeline.append(self.cache.lengths.mean(1, where=counted).tolist())

    def _observe_from(self) -> None:
        """Set how many steps before the next round masses are cleared; never, if the policy wants every query."""
        window = self.policy.observation_window
        self._cleared_at = -1 if window is None else min(window, self._until_round)

    def _evict(self, active: Tensor, scores: Scores, limit: Tensor | None = None) -> list[Counts]:
        """Prune and compact every layer and row; the lengths before, the next positions and `active`, as read back.

        `scores` are those of the cache as it is, of all ranks' heads.
        """
        sets = self._keep_sets
        prompts, following, on_now = map(sets.spread, (self._prompt_lengths, self._next_position, active))
        rows = (prompts, following, on_now)
        state = RoundState(*scores, self._windows, *rows, key_source=self._keys, heads=sets.heads)
        keep = self.policy.round(state, limit)
        if keep is not None and self.on_round:
            self._tell(state, keep)
        if keep is not None and self.recorder is not None and self.recorder.tokens:
            self.recorder.evicted(self._ledger.decoded, state.position, keep)
        before, seen, on = self.cache.compact(keep, self._next_position, active)
        after = self.cache.lengths
        self._ledger.evicted(before - after, self.cache.pages_for(before) - self.cache.pages_for(after))
        return [before, sets.repeat(seen), sets.repeat(on)]

    def _scores(self) -> Scores:
        """The cache's scores, of all ranks' heads: what a round chooses by.

        What the cache holds stays this rank's own part: both rules by which it goes on, sum and peak, commute with the
        reduction. Rows that are KV heads are one rank's alone.
        """
        mass, position, length = self.cache.scores()
        return self.scores_of_all(mass, self.policy), position, length

    def scores_of_all(self, mass: Tensor, policy: Policy) -> Tensor:
        """What `policy` chooses by, from the scores of this rank's heads: those of all, where a row is a sequence."""
        if self.ranks is None or policy.decay is None or policy.per_head:
            return mass
        return self.ranks.reduced(mass, peak=policy.peak)

    def _keys(self, layer: int) -> Tensor:
        """[rows, slots, KV heads, k_dim] of one layer, of all ranks' heads where a row is a sequence."""
        return self.keys_of_all(layer, self.cache.keys(layer), self.policy)

    def keys_of_all(self, layer: int, keys: Tensor, policy: Policy) -> Tensor:
        """The same from `keys` of this rank's heads, as `policy` looks at them."""
        if self.ranks is None or policy.per_head:
            return keys
        return self.ranks.all_heads(keys, self.caches[layer].kv_parts)

    def _least(self, value: int | None) -> int | None:
        """The least of all ranks: what must fit on each."""
        return value if self.ranks is None else self.ranks.least(value)

    def _together(self, what: str) -> AbstractContextManager[None]:
        return nullcontext() if self.ranks is None else self.ranks.together(what)

    def _sparsity(self, scores: Scores) -> Tensor | None:
        """[layers, rows] Hoyer sparsity of the cache's `scores`; None where the graph keeps none."""
        if not self._scored:
            return None
        mass, _, length = scores
        return hoyer_sparsity(mass.flatten(0, 1), length.flatten()).view_as(length)

    def _tell(self, state: RoundState, keep: Tensor) -> None:
        lost = (keep.sum(2) < state.length).any(1).tolist()
        for site in [site for site in self.sites if lost[site.cache]]:
            shown = (state.position[site.cache], keep[site.cache], state.next_position.clone())
            position, kept, following = (self._keep_sets.own(each, site.cache) for each in shown)
            event = Round(site.layer, position, kept, following, site.keep_sets)
            for callback in self.on_round:
                callback(event)

    def _reserve(self, active: Tensor) -> None:
        """Pages until the next round, pruning harder where there are too few; see `Policy.round` on limits."""
        tokens = self._live * self._until_round
        for attempt in range(1, _ATTEMPTS + 1):
            failed: OutOfPagesError | None = None
            try:
                self.cache.reserve_rows(tokens)
            except OutOfPagesError as error:
                failed = error
            if self.ranks.everywhere(failed is None) if self.ranks is not None else failed is None:
                return
            if attempt == _ATTEMPTS:
                raise failed or OutOfPagesError("another rank has no room for the next steps")
            self.cache.trim()
            with self._together("find room for the next steps"):
                limit = self.cache.limit(tokens)
            limit = self._least(limit) or limit
            over = bool((self.cache.lengths > limit).any())
            if self.ranks is not None:  # rows of a rank's own heads may be shorter than another's
                over = not self.ranks.everywhere(not over)
            if over:
                self._ledger.pressed += 1
                limits = torch.full(self.cache.lengths.shape, limit, device=self.device)
                self._evict(active, self._scores(), limits)

    def _observe(self) -> None:
        """Read back what the steps since the last round did."""
        held = self.cache.pages_held()
        (seen,) = self.cache.sync(self._next_position)
        self._ledger.read(self._keep_sets.repeat(seen), self.cache.lengths, held)

    def _host(self, lengths: Tensor) -> Counts:
        """Tokens of each row of the cache, from those of sequences; waits for the device."""
        return self._keep_sets.repeat(lengths.cpu().numpy())

    @property
    def _sequences(self) -> int:
        """Sequences that the cache was made for."""
        return self.cache.rows // self._keep_sets.heads

    @property
    def program(self) -> Program:
        """What the passes made of the model."""
        return self._program

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, keys and values."""
        return self._dtype

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each cache: how many positions back a query sees, None for all."""
        return self._windows

    @property
    def _windows(self) -> tuple[int | None, ...]:
        return tuple(site.mask.window if site.mask else None for site in self.caches)

    @property
    def token_bytes(self) -> list[int]:
        """Of each cache: keys and values of one token, all its KV heads together."""
        whole = [Geometry(site.kv_heads, *site.geometry[1:]) for site in self.caches]
        return [one.bytes_per_token(self._dtype) for one in whole]

    @property
    def keep_sets(self) -> KeepSets:
        """Rows of the cache that a sequence has."""
        return self._keep_sets

    @property
    def needs_content(self) -> bool:
        """Whether masks depend on the tokens."""
        return self._content

    def _geometries(self) -> list[Geometry]:
        return [Geometry(*site.geometry) for site in self.caches]

    def new_cache(self) -> KVCache:
        """An empty cache of this model's layers."""
        return KVCache(
            self._geometries(),
            page_size=self.page_size,
            dtype=self._dtype,
            device=self._device,
            keep_sets=self._keep_sets,
        )

    # --------------------------------------------------------------------------------------------------------- reports

    def report(self) -> Report:
        """What the compiler found, rewrote and refused; prints as a table, `to_dict` gives JSON."""
        where = (self._dtype, self._device, self.backend, self.page_size)
        return Report.of(self._records, self.sites, self.stateful, self.config, *where)

    def inspection(self, model: str = "") -> Inspection:
        """The graph as it was captured and as it is now, with `report`, under the name `model`; prints, and dumps."""
        return Inspection(model, self.captured, tuple(self._records), GraphFacts.of(self._program), self.report())

    def cache_stats(self) -> CacheStats:
        """Per layer and sequence: tokens seen and retained, rounds, threshold, Hoyer sparsity, bytes held and freed.

        Of the generation under way, or of the last one; a finished sequence shows what it held when it finished.
        """
        if self._generating and self._lent_to is None:
            self._observe()
        ledger, sets, rows = self._ledger, self._keep_sets, self._rows
        thresholds, sparsity = self.policy.thresholds.cpu().numpy(), self.policy.sparsity.cpu().numpy()
        page_bytes = self._token_bytes * self.page_size
        return CacheStats(
            seen=ledger.seen[:: sets.heads][:rows].tolist(),
            retained=sets.mean(ledger.retained, rows),
            retained_mean=sets.mean(ledger.retained_sum / max(1, ledger.steps), rows),
            rounds=sets.mean(ledger.rounds, rows),
            threshold=sets.mean(thresholds, rows, thresholds < NEVER, NEVER),
            sparsity=sets.mean(sparsity, rows, ~np.isnan(sparsity), np.nan),
            bytes_held=sets.total(ledger.held * page_bytes, rows),
            bytes_freed=sets.total(ledger.freed * page_bytes, rows),
            timeline=ledger.timeline,
            bytes_peak=self.cache.bytes_peak,
            bytes_mean=self.cache.bytes_mean,
            pressed=ledger.pressed,
            state_bytes=self.states.bytes_of(self._rows),
            heads=sets.each(ledger.retained, rows) if sets.heads > 1 else None,
        )


def bucket(rows: int) -> int:
    """The size of a captured graph that serves so many rows."""
    return next(size for size in (*_BUCKETS, -(-rows // _BUCKETS[-1]) * _BUCKETS[-1]) if size >= rows)


def _padded(values: Tensor, rows: int) -> Tensor:
    """`values` [n] with zeros behind, [rows]."""
    return torch.nn.functional.pad(values, (0, rows - len(values)))


_OWN_OPTIONS = ("streamer", "progress", "tokenizer")  # of `generate`: each rank may have its own


def _shown(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` as ranks compare them; of what has no value to compare, its kind."""
    shown: dict[str, Any] = {}
    for name, value in options.items():
        if value is None or name in _OWN_OPTIONS:
            continue
        if isinstance(value, Tensor):
            shown[name] = digest(value)
        elif hasattr(value, "to_dict"):
            shown[name] = value.to_dict()
        elif isinstance(value, (bool, int, float, str)):
            shown[name] = value
        elif isinstance(value, (list, tuple)):
            shown[name] = [one if isinstance(one, (bool, int, float, str)) else type(one).__name__ for one in value]
        else:
            shown[name] = type(value).__name__
    return shown

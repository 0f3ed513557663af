"""The optimized model: a rewritten graph, its paged cache, and the rounds between decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lethe_compile import generation
from lethe_compile.cache import Geometry, KVCache
from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError, OutOfPagesError
from lethe_compile.executor import DecodeGraph, Executor
from lethe_compile.ledger import Counts, Ledger
from lethe_compile.memory import allowance, available_bytes
from lethe_compile.passes.base import PassRecord
from lethe_compile.passes.program import Program
from lethe_compile.past import Past
from lethe_compile.policies import make_policy
from lethe_compile.policies.base import RoundState
from lethe_compile.policies.full import FullPolicy
from lethe_compile.prompt import check_ids
from lethe_compile.report import CacheStats, Report
from lethe_compile.restart import Text, text_of
from lethe_compile.states import States

if TYPE_CHECKING:
    from lethe_compile.hf import LetheForCausalLM

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
_ATTEMPTS = 4  # to reserve pages; each but the first after a round that prunes harder


@dataclass(frozen=True)
class Round:
    """What one round did to one layer: handed to the callbacks in `OptimizedModel.on_round`."""

    layer: int  # an attention of the graph; those that share a cache hear of the same
    position: Tensor  # [rows, N] int32 stored positions before the round, -1 beyond a row's length
    keep: Tensor  # [rows, N] bool: what stays
    next_position: Tensor  # [rows] int64: the first position whose query sees the result


class OptimizedModel(nn.Module):
    """A decoder compiled by `optimize`: same inputs, same outputs, and a cache that is pruned while it generates.

    Attributes:
        sites, caches: the attentions of the graph, and those of them that have a cache of their own.
        graph_module: the rewritten graph; its weights are the original model's own tensors.
        backend: how it runs, and why; see `executor.choose_backend`.
        config: the `LetheConfig` in force.
        policy: decides at each round what stays.
        cache: pages, tables and figures of the generation under way, or of the last one.
        states: what layers other than attention carry along, of the same generation.
        kv_memory: most bytes of the cache, or fraction of what is free; see `optimize`. Holds from the next generation.
        on_round: callables that get a `Round` for each layer a round changed.
        hf_config: the original's transformers config, where it has one.
        give_way: ends the session of `as_hf()` that holds the cache; None while another generation does, or none.
        vocab_size, max_positions: limits on inputs; `max_positions` is None where the model has none.
        restart_at: tokens beyond which a generation computes all keys and values anew, once, as transformers does where
            rotary frequencies change with the length; None where they do not.
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
    ) -> None:
        super().__init__()
        self._dtype: torch.dtype = program.sites[0].node.meta["val"].dtype
        self._device: torch.device = program.input_ids.meta["val"].device
        self.backend = backend
        self._executor = Executor(program, compiled=backend[0] != "eager")
        self._graphs: dict[int, DecodeGraph] = {}  # by rows
        self.graph_module, self.sites, self.caches = program.module, program.sites, program.caches
        self.stateful, self._content = program.stateful, program.content
        self.stateful_modules = nn.ModuleList(call.module for call in program.stateful)
        config = replace(config, prune_interval=config.interval_on(self._device.type))
        self.config, self.policy = config, make_policy(config)
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.generation_config, self.hf_config = generation_config, hf_config
        self.kv_memory: int | float | None = None
        self._allowed_by: int | float | None = None  # the `kv_memory` behind `cache.max_bytes`
        self.restart_at: int | None = None
        self.on_round: list[Callable[[Round], None]] = []
        self.give_way: Callable[[], object] | None = None
        self._records = records
        self.page_size = config.page_size_on(self._device.type)
        tokens = [geometry.bytes_per_token(self._dtype) for geometry in self._geometries()]
        self._page_bytes = np.array(tokens, np.int64)[:, None] * self.page_size  # [layers, 1]
        self.cache, self.states = self._new_cache(), States(self.stateful, self._device)
        self._generating, self._rows = False, 0
        self.policy.begin(len(self.caches), 0)
        self._reset(torch.zeros(0, dtype=torch.int64))

    @property
    def device(self) -> torch.device:
        """Where inputs must be; the graph was captured there and stays there."""
        return self._device

    # ------------------------------------------------------------------------------------------------- whole sequences

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits ``[rows, T, vocab_size]`` of whole sequences, nothing evicted; a generation under way is untouched.

        input_ids are int64 ``[rows, T]``; `attention_mask` is 0 on padding, left or right, where logits mean nothing;
        `position_ids` default to counting each row's own tokens.

        Raises:
            InputError: ids outside the vocabulary, an empty batch, or more tokens than the model has positions.
        """
        lengths, order = self._right_pad(input_ids, attention_mask)
        ids = input_ids.gather(1, order)
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        if position_ids is not None:
            positions = position_ids.expand_as(ids).gather(1, order)
        cache, states = self._new_cache(), States(self.stateful, self._device)
        cache.begin(len(ids))
        cache.reserve_rows(lengths.tolist())
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
        return generation.generate(self, inputs, **options)

    def as_hf(self) -> LetheForCausalLM:
        """This model for what expects transformers' models: `pipeline("text-generation")`, and loops of one's own.

        Raises:
            InputError: it was optimized from something else than a transformers model.
        """
        from lethe_compile.hf import LetheForCausalLM

        return LetheForCausalLM(self)

    def begin(self, rows: int, prompt_lengths: Tensor, new_tokens: int | None = None) -> None:
        """Start a generation of `rows` sequences with an empty cache. Part of `generation.Decoder`.

        With `new_tokens`, the most that each row gets, a batch is refused here that might not fit later.
        """
        if self.give_way is not None:
            self.give_way()  # whoever goes on with that session is told
        if self._generating:
            raise InputError("this model is generating already: it has one cache; optimize() again for a second one")
        self._rows = rows
        hint = self._admit(prompt_lengths, new_tokens)
        prompt_lengths = _padded(prompt_lengths, self._bucket(rows))
        if not isinstance(hint, int):  # rows that fill the bucket hold nothing
            hint = np.pad(hint, ((0, 0), (0, len(prompt_lengths) - rows)))
        try:
            self.cache.begin(len(prompt_lengths), hint)
        except OutOfPagesError as error:
            raise InputError(f"{rows} sequences do not fit: {error}") from error
        self.states.begin(len(prompt_lengths))
        self._generating = True
        self.policy.begin(len(self.caches), len(prompt_lengths))
        self._reset(prompt_lengths, new_tokens)

    def _bucket(self, rows: int) -> int:
        """Rows that the cache is made for: captured graphs serve a few sizes, and what is over stays empty."""
        if self.backend[0] != "cudagraphs":
            return rows
        return next(size for size in (*_BUCKETS, -(-rows // _BUCKETS[-1]) * _BUCKETS[-1]) if size >= rows)

    def _admit(self, prompt_lengths: Tensor, new_tokens: int | None) -> int | Counts:
        """Tokens [layers, rows] that the cache should have room for at once; refuses what cannot be made to fit."""
        cache = self.cache
        last = cache.max_bytes if self._allowed_by == self.kv_memory else None
        cache.max_bytes = allowance(self.kv_memory, self.device, cache.pool_bytes, last)
        self._allowed_by = self.kv_memory
        if new_tokens is None:
            return 0
        prompts = prompt_lengths.cpu().numpy().astype(np.int64)
        least = self.policy.least_tokens(prompts, new_tokens, self._windows)
        allowed = cache.max_bytes
        if allowed is None and self.device.type == "cuda":
            allowed = available_bytes(self.device) + cache.pool_bytes
        need = cache.bytes_for(least)
        if allowed is not None and need > allowed:
            raise InputError(
                f"{len(prompts)} sequences of up to {prompts.max(initial=0)} prompt and {new_tokens} new tokens need"
                f" {need} bytes of KV cache under policy {self.policy.name!r}, and {allowed} bytes are allowed"
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
                self._graphs[rows] = DecodeGraph(self._executor, rows, self.device)
            self._graph = self._graphs[rows]
            self._next_position = self._graph.next_position.zero_()
        else:
            self._next_position = torch.zeros_like(self._prompt_lengths)
        self._new_tokens = new_tokens
        self._live = np.zeros(len(prompt_lengths), np.int64)  # 1 for a row that may take part in the next steps
        self._ledger = Ledger(len(self.caches), len(prompt_lengths))
        self._text: Text | None = None
        self._until_round = self._furthest = 0

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, lengths: Tensor, *, whole: bool = False) -> Tensor:
        """Run right-padded prompts ``[rows, T]``; logits ``[rows, vocab_size]`` of each row's last token.

        With `whole`, logits ``[rows, T, vocab_size]`` of all tokens.
        """
        padded = _padded(lengths, self.cache.rows)
        prompts = padded.cpu().numpy().astype(np.int64)
        self.cache.reserve_rows(prompts)
        self.cache.assume(prompts)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).repeat(len(input_ids), 1)
        last = None if whole else (lengths - 1).clamp(min=0)
        self._furthest = input_ids.shape[1]
        logits = self._run(self.cache, self.states, input_ids, positions, lengths, self._furthest, last).float()
        self.states.has_previous_state = True
        self._next_position.copy_(padded)
        self._ledger.prefill(prompts, self.cache.pages_held())
        self._text = text_of(input_ids, int(prompts.max(initial=0)), self.restart_at)
        self._round(padded > 0)
        return logits if whole else logits[:, 0]

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
        padded = _padded(past.lengths.to(self.device), self.cache.rows)
        prompts = padded.cpu().numpy().astype(np.int64)
        try:
            past.fill(self.cache, prompts)
            self._next_position.copy_(padded)
            self._furthest = int(prompts.max(initial=0))
            self._ledger.prefill(prompts, self.cache.pages_held(), self.cache.lengths)
            self._live = (prompts > 0).astype(np.int64)
            self._until_round = self.config.interval
            self._reserve(padded > 0)
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
        cache, states = self._new_cache(), States(self.stateful, self._device)
        rows, tokens = input_ids.shape
        cache.begin(rows)
        past.fill(cache, past.lengths.cpu().numpy().astype(np.int64))
        cache.reserve(tokens)
        states.begin(rows)
        positions = past.lengths[:, None] + torch.arange(tokens, device=input_ids.device)
        furthest = int(past.lengths.max()) + tokens
        return self._run(cache, states, input_ids, positions, torch.full_like(past.lengths, tokens), furthest)

    def _check_past(self) -> None:
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
            self._round(_padded(active, self.cache.rows))
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
        filled = _padded(lengths, self.cache.rows)
        tokens = filled.cpu().numpy().astype(np.int64)
        self.cache.end()
        self.states.begin(self.cache.rows)
        self.policy.begin(len(self.caches), self.cache.rows)
        self.cache.reserve_rows(tokens)
        self.cache.assume(tokens)
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        last = (lengths - 1).clamp(min=0)
        self._furthest = ids.shape[1]
        logits = self._run(self.cache, self.states, ids, positions, lengths, self._furthest, last).float()
        self.states.has_previous_state = True
        self._next_position += filled > 0
        self._text = None
        self._ledger.step()
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
        state = {**cache.inputs(), **states.inputs(len(ids))}
        if self._content:
            state["seen"] = torch.arange(furthest, device=self._device)
        for name in ("page_table", "length"):
            state[name] = state[name][:, : len(ids)]
        return self._executor.run(ids, positions, new_lengths.to(torch.int32), state, last)

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
        pruning = self.policy
        self.policy = FullPolicy(self.config)
        try:
            yield
        finally:
            self.policy = pruning

    # ---------------------------------------------------------------------------------------------------------- rounds

    def _round(self, active: Tensor) -> None:
        """Let the policy choose what stays, compact, free what finished rows held, and reserve the next interval.

        Waits for the device once, behind the compaction; more often only where pages run out.
        """
        held = self.cache.pages_held()
        before, seen, on = self._evict(active)
        self._ledger.read(seen, before, held)
        self._live = on
        self.cache.free_rows(np.flatnonzero((on == 0) & self.cache.pages_held().any(0)).tolist())
        self._until_round = self.config.interval
        left = None if self._new_tokens is None else self._new_tokens - self._ledger.decoded
        if left is not None and left > 0:  # no page for tokens that nobody asked for
            self._until_round = min(self._until_round, left)
        self._reserve(active)
        if on.any():
            self._ledger.timeline.append(self.cache.lengths[:, on > 0].mean(1).tolist())

    def _evict(self, active: Tensor, limit: Tensor | None = None) -> list[Counts]:
        """Prune and compact every layer and row; the lengths before, the next positions and `active`, as read back."""
        state = RoundState(*self.cache.scores(), self._windows, self._prompt_lengths, self._next_position, active)
        keep = self.policy.round(state, limit)
        if keep is not None and self.on_round:
            self._tell(state, keep)
        before, seen, on = self.cache.compact(keep, self._next_position, active)
        after = self.cache.lengths
        self._ledger.evicted(before - after, self.cache.pages_for(before) - self.cache.pages_for(after))
        return [before, seen, on]

    def _tell(self, state: RoundState, keep: Tensor) -> None:
        lost = (keep.sum(2) < state.length).any(1).tolist()
        for site in [site for site in self.sites if lost[site.cache]]:
            event = Round(site.layer, state.position[site.cache], keep[site.cache], state.next_position.clone())
            for callback in self.on_round:
                callback(event)

    def _reserve(self, active: Tensor) -> None:
        """Pages until the next round, pruning harder where there are too few; see `Policy.round` on limits."""
        tokens = self._live * self._until_round
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self.cache.reserve_rows(tokens)
            except OutOfPagesError:
                if attempt == _ATTEMPTS:
                    raise
                self.cache.trim()
                limit = self.cache.limit(tokens)
                if (self.cache.lengths > limit).any():
                    self._ledger.pressed += 1
                    self._evict(active, torch.full(self.cache.lengths.shape, limit, device=self.device))
            else:
                return

    def _observe(self) -> None:
        """Read back what the steps since the last round did."""
        held = self.cache.pages_held()
        (seen,) = self.cache.sync(self._next_position)
        self._ledger.read(seen, self.cache.lengths, held)

    @property
    def _windows(self) -> tuple[int | None, ...]:
        return tuple(site.mask.window if site.mask else None for site in self.caches)

    def _geometries(self) -> list[Geometry]:
        return [Geometry(*site.geometry) for site in self.caches]

    def _new_cache(self) -> KVCache:
        return KVCache(self._geometries(), page_size=self.page_size, dtype=self._dtype, device=self._device)

    # --------------------------------------------------------------------------------------------------------- reports

    def report(self) -> Report:
        """What the compiler found, rewrote and refused; prints as a table, `to_dict` gives JSON."""
        where = (self._dtype, self._device, self.backend, self.page_size)
        return Report.of(self._records, self.sites, self.stateful, self.config, *where)

    def cache_stats(self) -> CacheStats:
        """Per layer and sequence: tokens seen and retained, rounds, threshold, Hoyer sparsity, bytes held and freed.

        Of the generation under way, or of the last one; a finished sequence shows what it held when it finished.
        """
        if self._generating:
            self._observe()
        ledger, rows = self._ledger, slice(self._rows)
        return CacheStats(
            seen=ledger.seen[rows].tolist(),
            retained=ledger.retained[:, rows].tolist(),
            retained_mean=(ledger.retained_sum[:, rows] / max(1, ledger.steps)).tolist(),
            rounds=ledger.rounds[:, rows].tolist(),
            threshold=self.policy.thresholds[:, rows].tolist(),
            sparsity=self.policy.sparsity[:, rows].tolist(),
            bytes_held=(ledger.held * self._page_bytes)[:, rows].tolist(),
            bytes_freed=(ledger.freed * self._page_bytes)[:, rows].tolist(),
            timeline=ledger.timeline,
            bytes_peak=self.cache.bytes_peak,
            bytes_mean=self.cache.bytes_mean,
            pressed=ledger.pressed,
            state_bytes=self.states.bytes_of(self._rows),
        )


def _padded(values: Tensor, rows: int) -> Tensor:
    """`values` [n] with zeros behind, [rows]."""
    return torch.nn.functional.pad(values, (0, rows - len(values)))

"""The optimized model: a rewritten graph, its paged cache, and the rounds between decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lethe_compile import generation
from lethe_compile.cache import Geometry, KVCache
from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.passes.base import PassRecord
from lethe_compile.passes.program import Program
from lethe_compile.policies import make_policy
from lethe_compile.policies.base import LayerState
from lethe_compile.policies.full import FullPolicy
from lethe_compile.prompt import check_ids
from lethe_compile.report import CacheStats, Report


@dataclass(frozen=True)
class Round:
    """What one round did to one layer: handed to the callbacks in `OptimizedModel.on_round`."""

    layer: int
    position: Tensor  # [rows, N] int32 stored positions before the round, -1 beyond a row's length
    keep: Tensor  # [rows, N] bool: what stays
    next_position: Tensor  # [rows] int64: the first position whose query sees the result


class OptimizedModel(nn.Module):
    """A decoder compiled by `optimize`: same inputs, same outputs, and a cache that is pruned while it generates.

    Attributes:
        graph_module: the rewritten graph; its weights are the original model's own tensors.
        config: the `LetheConfig` in force.
        policy: decides at each round what stays.
        cache: pages, tables and figures of the generation under way, or of the last one.
        on_round: callables that get a `Round` for each layer a round changed.
        vocab_size, max_positions: limits on inputs; `max_positions` is None where the model has none.
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
    ) -> None:
        super().__init__()
        self.graph_module, self.sites = program.module, program.sites
        self.config, self.policy = config, make_policy(config)
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.generation_config = generation_config
        self.on_round: list[Callable[[Round], None]] = []
        self._records = records
        self._cache_inputs = [str(n.target) for n in program.placeholders()[3:]]
        self._dtype: torch.dtype = program.sites[0].node.meta["val"].dtype
        self._device: torch.device = program.input_ids.meta["val"].device
        tokens = [geometry.bytes_per_token(self._dtype) for geometry in self._geometries()]
        self._page_bytes = np.array(tokens, np.int64)[:, None] * config.page_size  # [layers, 1]
        self.cache = self._new_cache()
        self._generating = False
        self.policy.begin(len(self.sites), 0)
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
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if position_ids is not None:
            positions = position_ids.expand_as(ids).gather(1, order)
        cache = self._new_cache()
        cache.begin(len(ids))
        cache.reserve_rows(lengths.tolist())
        logits = self._run(cache, ids, positions, lengths)
        return torch.empty_like(logits).scatter_(1, order[:, :, None].expand_as(logits), logits)

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

    def begin(self, rows: int, prompt_lengths: Tensor) -> None:
        """Start a generation of `rows` sequences with an empty cache. Part of `generation.Decoder`."""
        if self._generating:
            raise InputError("this model is generating already: it has one cache; optimize() again for a second one")
        self._generating = True
        self.cache.begin(rows)
        self.policy.begin(len(self.sites), rows)
        self._reset(prompt_lengths)

    def _reset(self, prompt_lengths: Tensor) -> None:
        self._prompt_lengths = prompt_lengths.to(self.device)
        self._next_position = torch.zeros_like(self._prompt_lengths)
        shape = (len(self.sites), len(prompt_lengths))
        self._rounds, self._freed, self._retained = (np.zeros(shape, np.int64) for _ in range(3))
        self._held = np.zeros(shape, np.int64)
        self._retained_sum, self._steps, self._until_round = np.zeros(shape, np.float64), 0, 0
        self._timeline: list[list[float]] = []

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Run right-padded prompts ``[rows, T]``; logits ``[rows, vocab_size]`` of each row's last token."""
        self.cache.reserve_rows(lengths.tolist())
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits = self._run(self.cache, input_ids, positions, lengths)
        self._next_position = lengths.clone()
        self._observe(lengths > 0)
        self._round(lengths > 0)
        return logits[torch.arange(len(lengths), device=logits.device), lengths - 1].float()

    @torch.no_grad()
    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        """Append one token ``[rows]`` to each row that is `active`; logits ``[rows, vocab_size]``."""
        if self._until_round == 0:
            self._round(active)
        self._until_round -= 1
        ids = tokens.masked_fill(~active, 0)[:, None]
        logits = self._run(self.cache, ids, self._next_position[:, None], active.to(torch.int32))
        self._next_position += active
        self._observe(active)
        return logits[:, 0].float()

    def end(self) -> None:
        """Give all pages back. Part of `generation.Decoder`."""
        self._generating = False
        self.cache.end()

    def _run(self, cache: KVCache, ids: Tensor, positions: Tensor, new_lengths: Tensor) -> Tensor:
        state = cache.inputs()
        logits: Tensor = self.graph_module(
            ids, positions, new_lengths.to(torch.int32), *(state[name] for name in self._cache_inputs)
        )
        cache.advance(new_lengths.tolist())
        return logits

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
        """Let the policy choose what stays, compact, free what finished rows held, and reserve the next interval."""
        finished = [row for row, on in enumerate(active.tolist()) if not on]
        self.cache.free_rows(finished)
        states = [
            LayerState(
                site.layer,
                site.mask.window if site.mask else None,
                *self.cache.layer_state(site.layer),
                self._prompt_lengths,
                self._next_position,
                active,
            )
            for site in self.sites
        ]
        filled = self.cache.pages_filled()
        for state, selection in zip(states, self.policy.round(states), strict=True):
            if selection is None:
                continue
            for callback in self.on_round:
                callback(Round(state.layer, state.position, selection.keep, state.next_position.clone()))
            self.cache.compact(state.layer, selection.keep)
            self._rounds[state.layer] += selection.pruned.cpu().numpy()
        self._freed += (filled - self.cache.pages_filled()) * self._page_bytes
        self._until_round = self.config.prune_interval
        self._timeline.append(self.cache.lengths[:, active.cpu().numpy()].mean(1).tolist())
        self.cache.reserve(self._until_round, active.tolist())

    def _observe(self, active: Tensor) -> None:
        """Keep what `cache_stats` tells; of a row that has finished, as it was at its end."""
        on = active.cpu().numpy().astype(bool)
        self._retained = np.where(on, self.cache.lengths, self._retained)
        self._held = np.where(on, self.cache.pages_held(), self._held)
        self._retained_sum += self.cache.lengths
        self._steps += 1

    def _geometries(self) -> list[Geometry]:
        return [Geometry(site.kv_heads, site.k_dim, site.v_dim) for site in self.sites]

    def _new_cache(self) -> KVCache:
        page_size = self.config.page_size
        return KVCache(self._geometries(), page_size=page_size, dtype=self._dtype, device=self._device)

    # --------------------------------------------------------------------------------------------------------- reports

    def report(self) -> Report:
        """What the compiler found, rewrote and refused; prints as a table, `to_dict` gives JSON."""
        return Report.of(self._records, self.sites, self.config, self._dtype, self._device)

    def cache_stats(self) -> CacheStats:
        """Per layer and sequence: tokens seen and retained, rounds, threshold, Hoyer sparsity, bytes held and freed.

        Of the generation under way, or of the last one; a finished sequence shows what it held when it finished.
        """
        return CacheStats(
            seen=self._next_position.tolist(),
            retained=self._retained.tolist(),
            retained_mean=(self._retained_sum / max(1, self._steps)).tolist(),
            rounds=self._rounds.tolist(),
            threshold=self.policy.thresholds.tolist(),
            sparsity=self.policy.sparsity.tolist(),
            bytes_held=(self._held * self._page_bytes).tolist(),
            bytes_freed=self._freed.tolist(),
            timeline=self._timeline,
            bytes_peak=self.cache.bytes_peak,
            bytes_mean=self.cache.bytes_mean,
        )

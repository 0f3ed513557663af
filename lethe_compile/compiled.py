"""A rewritten graph as it runs: what its caches are like, the tensors of a step, and what replays decode steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from lethe_compile.cache import KVCache
from lethe_compile.distributed import Ranks
from lethe_compile.errors import ConfigError
from lethe_compile.executor import DecodeGraph, Executor, bucket
from lethe_compile.keep_sets import KeepSets
from lethe_compile.passes.program import Program
from lethe_compile.policies.base import Policy
from lethe_compile.pool import Geometry
from lethe_compile.states import States


class CompiledGraph:
    """What the passes made of a model, and what runs it, over whichever cache it is given.

    Attributes:
        program: the rewritten graph.
        backend: how it runs, and why; see `executor.choose_backend`.
        executor: runs it so.
        ranks: the processes that run it together; None for one alone.
        device: where inputs must be; the graph was captured there and stays there.
        dtype: of hidden states, keys and values.
        keep_sets: rows of the cache that a sequence has.
        geometries: of each cache, one row.
        windows: of each cache: how many positions back a query sees, None for all.
        token_bytes: of each cache: keys and values of one token, all its KV heads together.
        row_bytes: [layers, 1] the same of one row.
        content: whether masks depend on the tokens.
        scored: whether the graph keeps scores.
    """

    def __init__(
        self,
        program: Program,
        backend: tuple[str, str],
        ranks: Ranks | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.program, self.backend, self.ranks = program, backend, ranks
        self.executor = executor or Executor(program, compiled=backend[0] != "eager")
        self.device: torch.device = program.input_ids.meta["val"].device
        self.dtype: torch.dtype = program.sites[0].node.meta["val"].dtype
        self.sites, self.caches, self.content = program.sites, program.caches, program.content
        self.keep_sets = KeepSets([site.keep_sets for site in self.caches])
        self.geometries = [Geometry(*site.geometry) for site in self.caches]
        self.windows = tuple(site.mask.window if site.mask else None for site in self.caches)
        whole = [Geometry(site.kv_heads, *site.geometry[1:]) for site in self.caches]
        self.token_bytes = [one.bytes_per_token(self.dtype) for one in whole]
        self.row_bytes = np.array([[one.bytes_per_token(self.dtype)] for one in self.geometries], np.int64)
        self.scored = True
        self._decode_graphs: dict[int, DecodeGraph] = {}  # by rows

    # ------------------------------------------------------------------------------------------------- caches, policies

    def new_cache(self, page_size: int) -> KVCache:
        """An empty cache of the graph's layers."""
        return KVCache(
            self.geometries, page_size=page_size, dtype=self.dtype, device=self.device, keep_sets=self.keep_sets
        )

    def new_states(self) -> States:
        """What layers other than attention carry along, for no row yet."""
        return States(self.program.stateful, self.device)

    def begin_policy(self, policy: Policy, rows: int) -> None:
        """Let a policy forget its last generation, and know what the caches take."""
        policy.begin(len(self.caches), rows, self.token_bytes)

    def check_heads(self, policy: Policy) -> None:
        """Raises `ConfigError` for a policy that keeps tokens by head where the graph does not, or the reverse."""
        sharing = [site.layer for site in self.caches if self.ranks and site.kv_parts < self.ranks.size]
        if sharing and policy.per_head:
            raise ConfigError(
                f"policy {policy.name!r} keeps other tokens for each KV head, and ranks share those of layers {sharing}"
            )
        several = [site.layer for site in self.caches if site.kv_heads > 1]
        if several and policy.per_head != (self.keep_sets.heads > 1):
            kinds = ["keeps the same tokens for all KV heads of a layer", "keeps other tokens for each KV head"]
            raise ConfigError(
                f"policy {policy.name!r} {kinds[policy.per_head]}, and this model was compiled for one that"
                f" {kinds[not policy.per_head]} (layers {several} have several): optimize the model again with it"
            )

    # ----------------------------------------------------------------------------------------------------------- steps

    def run(
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
        return self.executor.run(ids, positions, new_lengths.to(torch.int32), state, last)

    def graph_state(
        self, cache: KVCache, states: States, rows: int, *, first: int = 0, furthest: int = 0
    ) -> dict[str, Tensor]:
        """The graph's state inputs, of `rows` sequences from the `first` on; all positions are below `furthest`."""
        state, heads = {**cache.inputs(), **states.inputs(rows, first)}, self.keep_sets.heads
        if self.content:
            state["seen"] = torch.arange(furthest, device=self.device)
        for name in ("page_table", "length"):
            state[name] = state[name][:, first * heads : (first + rows) * heads]
        return state

    @contextmanager
    def interpreted(self) -> Iterator[None]:
        """Inside this context the graph runs node by node, with the same kernels, and nothing is compiled."""
        backend, executor = self.backend, self.executor
        self.backend, self.executor = ("eager", "for now"), executor.interpreted()
        try:
            yield
        finally:
            self.backend, self.executor = backend, executor

    def bucket(self, rows: int) -> int:
        """Sequences that a cache is made for: captured graphs serve a few sizes, and what is over stays empty."""
        return bucket(rows) if self.backend[0] == "cudagraphs" else rows

    def decode_graph(self, rows: int) -> DecodeGraph | None:
        """What replays steps of so many rows, the same from one generation to the next; None where nothing does."""
        if self.backend[0] != "cudagraphs" or not rows:
            return None
        if rows not in self._decode_graphs:
            self._decode_graphs[rows] = DecodeGraph.of_rows(self.executor, rows, self.device)
        return self._decode_graphs[rows]

    def forget_decode_graphs(self) -> None:
        """Steps are recorded again when they are next needed; the memory of what was recorded is free."""
        self._decode_graphs.clear()

    # ----------------------------------------------------------------------------------------------------------- ranks

    def least(self, value: int | None) -> int | None:
        """The least of all ranks: what must fit on each."""
        return value if self.ranks is None else self.ranks.least(value)

    def together(self, what: str) -> AbstractContextManager[None]:
        """Where one rank fails inside, all do; see `Ranks.together`."""
        return nullcontext() if self.ranks is None else self.ranks.together(what)


def padded(values: Tensor, rows: int) -> Tensor:
    """`values` [n] with zeros behind, [rows]."""
    return torch.nn.functional.pad(values, (0, rows - len(values)))

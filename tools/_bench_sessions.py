"""Decode loops to be timed: transformers with its two caches, ours unpruned, ours with Lethe, at a given length.

A session starts as if `length` tokens had been generated: caches are filled with noise instead of running a prefill.
Each step feeds the token that the step before chose, greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools._bench_shapes import Subject

DYNAMIC, STATIC, FULL, LETHE = "dynamic", "static", "unpruned", "lethe"
LABELS = {
    DYNAMIC: "HF DynamicCache",
    STATIC: "HF Static, compiled",
    FULL: "ours, unpruned",
    LETHE: "ours, Lethe",
}
PROMPT = 64  # tokens that count as the prompt, and are protected


@dataclass(frozen=True)
class Session:
    """A decode loop under way: `step` feeds a token [rows] to each row, `kv_bytes` is what keys and values hold now.

    `interval` is how many steps lie between rounds, 0 without; `retained` the cached tokens of a layer and row, mean.
    """

    step: Callable[[Tensor], Tensor]
    kv_bytes: Callable[[], int]
    retained: Callable[[], float]
    interval: int = 0


# ------------------------------------------------------------------------------------------------------- transformers


@contextmanager
def dynamic(subject: Subject, rows: int, length: int, steps: int) -> Iterator[Session]:
    """`DynamicCache` in eager mode, as `generate` uses it by default; it grows by concatenation."""
    from transformers import DynamicCache

    shape = (rows, subject.kv_heads, length, subject.head_dim)
    device, model = subject.model.device, subject.model
    cache: Any = DynamicCache()
    for layer in range(subject.layers):
        keys, values = (torch.empty(shape, dtype=subject.dtype, device=device).normal_() for _ in range(2))
        cache.update(keys, values, layer)
    del keys, values
    yield Session(
        lambda tokens: _choose(model(tokens[:, None], past_key_values=cache, use_cache=True).logits),
        lambda: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
        lambda: float(cache.get_seq_length()),
    )


class Static:
    """`StaticCache` with the forward pass compiled in mode reduce-overhead, which is CUDA graphs.

    One object per batch and length, entered once per repeat: the compiled code is bound to the tensors of its cache.
    """

    def __init__(self, subject: Subject, rows: int, length: int, steps: int) -> None:
        from torch._dynamo import config as dynamo
        from transformers import StaticCache

        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)  # each batch and length is compiled for itself
        self._length = length
        self._cache: Any = StaticCache(subject.model.config, max_cache_len=length + steps)
        device = subject.model.device
        self._cache.early_initialization(rows, subject.kv_heads, subject.head_dim, subject.dtype, device)
        self._model: Any = torch.compile(subject.model, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @contextmanager
    def __call__(self) -> Iterator[Session]:
        for layer in self._cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(self._length)
        yield Session(
            self._step,
            lambda: sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers),
            lambda: float(self._length),  # attention reads the room behind them too, which is its own affair
        )

    def _step(self, tokens: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        output = self._model(tokens[:, None], past_key_values=self._cache, use_cache=True)
        return _choose(output.logits)


def _choose(logits: Tensor) -> Tensor:
    """Greedy tokens [rows] from logits [rows, 1, vocab]."""
    return logits[:, -1].argmax(dim=-1)


# --------------------------------------------------------------------------------------------------------------- ours


@contextmanager
def ours(fast: OptimizedModel, rows: int, length: int, steps: int, *, pruned: bool) -> Iterator[Session]:
    """Our graph after `length` tokens: with Lethe as much as its hard cap leaves, unpruned all of them."""
    config = fast.config
    cap = config.max_tokens if pruned else None
    retained = length if cap is None else min(length, cap - config.interval)
    prompt = min(PROMPT, retained)
    active = torch.ones(rows, dtype=torch.bool, device=fast.device)
    room = length + steps + config.interval  # pages are taken an interval ahead
    room = room if cap is None else min(cap, room)
    with ExitStack() as stack:
        stack.callback(setattr, fast, "kv_memory", fast.kv_memory)
        if fast.device.type == "cuda":  # pools of just the size that this needs, whatever ran before
            fast.kv_memory = fast.cache.bytes_for(np.full((len(fast.caches), rows), room, np.int64))
        if not pruned:
            stack.enter_context(fast.unpruned())
        fast.begin(rows, torch.full((rows,), prompt, device=fast.device), length - prompt + steps)
        stack.callback(fast.end)
        fill_cache(fast, rows, retained, length)
        yield Session(
            lambda tokens: fast.decode(tokens, active).argmax(dim=-1),
            lambda: fast.cache.bytes_in_use,
            lambda: float(fast.cache.lengths[:, :rows].mean()),
            config.interval,
        )


def fill_cache(fast: OptimizedModel, rows: int, retained: int, seen: int) -> None:
    """Put `fast`, just begun, where `rows` sequences of `seen` tokens are that retain `retained` in each layer.

    Keys and values are noise, scores small and random; the slots hold the first few positions and the latest. This
    reaches into the runtime and the cache, and is the one place in the benchmarks that does.
    """
    cache = fast.cache
    tokens = np.zeros(cache.rows, np.int64)
    tokens[:rows] = retained  # a cache may have more rows, which stay empty
    cache.reserve_rows(tokens)
    cache.assume(tokens)
    cache.length[:, :rows] += retained
    sinks = min(fast.config.sink_tokens, retained)
    positions = torch.arange(seen - retained, seen, dtype=torch.int32, device=fast.device)
    positions[:sinks] = torch.arange(sinks, dtype=torch.int32, device=fast.device)
    for name, tensor in cache.inputs().items():
        if name.startswith(("k_pages", "v_pages")):
            tensor.normal_()
        elif name.startswith("slot_mass"):
            tensor.uniform_(0, 1e-3)
    _write_positions(fast, rows, positions)
    fast.session.next_position[:rows] = seen
    fast.session.ledger.prefill(np.where(tokens > 0, seen, 0), cache.pages_held())


def _write_positions(fast: OptimizedModel, rows: int, positions: Tensor) -> None:
    """Write `positions` [tokens] int32 into the slots of every layer and of the first `rows` rows."""
    cache = fast.cache
    state = cache.inputs()
    pages = -(-len(positions) // cache.page_size)
    padded = positions.new_full((pages * cache.page_size,), -1)
    padded[: len(positions)] = positions
    for layer, pool in enumerate(cache.pool_of_layer):
        held = state["page_table"][layer, :rows, :pages].long()  # [rows, pages]
        state[f"slot_position_{pool}"][held] = padded.view(pages, cache.page_size)

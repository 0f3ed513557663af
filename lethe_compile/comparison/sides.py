"""What is compared, as decoders side by side: a pruned graph or an exported artifact, and the unpruned graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.artifact.loop import Loop, Runner
from lethe_compile.artifact.manifest import Manifest
from lethe_compile.artifact.sampling import Floats, Ints, Sampler
from lethe_compile.generation import Decoder
from lethe_compile.policies.full import FullPolicy
from lethe_compile.runtime import OptimizedModel


@contextmanager
def unpruned(fast: OptimizedModel) -> Iterator[None]:
    """Inside this context nothing is evicted, and nothing is scored for it: what a user without pruning would run."""
    config, policy = fast.config, fast.policy
    if policy.per_head:  # the graph has a row for each KV head; full has one for all, and cannot be configured
        with fast.unpruned():
            yield
        return
    plain = replace(config, policy=FullPolicy.name, policy_options={}, max_tokens=None, budget=None)
    fast.reconfigure(plain)
    try:
        yield
    finally:
        fast.reconfigure(config)
        fast.policy = policy  # the caller's own may have taken the place of the config's


@contextmanager
def reference(fast: OptimizedModel) -> Iterator[Decoder]:
    """The unpruned graph as a decoder beside `fast`, with a cache of its own."""
    twin = fast.twin()
    with twin.unpruned():
        yield twin


class ArtifactDecoder:
    """`generation.Decoder` over an artifact: its own loop, fed one token a step from outside."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.vocab_size: int = runner.manifest.model["vocab_size"]
        self.max_positions: int | None = runner.manifest.model["max_positions"]
        self.device = torch.device("cpu")
        self._left = 0

    def begin(self, rows: int, prompt_lengths: Tensor, new_tokens: int) -> None:
        self._left = new_tokens

    def prefill(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        rows = zip(input_ids.tolist(), lengths.tolist(), strict=True)
        prompts = [ids[:length] for ids, length in rows]
        self._loop = Loop(self._runner, prompts, Sampler(), np.zeros(0, np.int64))
        return torch.from_numpy(self._loop.prefill())

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        self._left -= 1
        loop = self._loop
        loop.tokens, loop.active = tokens.cpu().numpy(), loop.active & active.cpu().numpy()
        return torch.from_numpy(loop.decode(min(self._left, int(self._runner.manifest.policy["interval"]))))

    def end(self) -> None:
        self._runner.begin(0)


class Metered:
    """A runner that adds up the bytes of retained keys and values behind every step, sequence by sequence."""

    def __init__(self, runner: Runner) -> None:
        self.manifest: Manifest = runner.manifest
        self._runner = runner
        size = np.dtype("uint16" if self.manifest.model["dtype"] == "bfloat16" else self.manifest.model["dtype"])
        numbers = [cache.kv_heads * (cache.k_dim + cache.v_dim) for cache in self.manifest.caches]
        self._token_bytes = np.array(numbers, np.int64)[:, None] * size.itemsize  # [C, 1]

    def begin(self, rows: int) -> None:
        self._runner.begin(rows)
        self._held = np.zeros((len(self._token_bytes), rows), np.int64)  # [C, R] tokens
        self._sum, self.peak, self._steps = np.zeros(rows), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._prompt = np.zeros(rows, np.bool_)  # the prompt was fed whole, and counts as one step

    def reserve(self, tokens: int) -> None:
        self._runner.reserve(tokens)

    def step(self, ids: Ints, positions: Ints, new_lengths: NDArray[np.int32], decay: float) -> Floats:
        self._held = self._held + new_lengths
        if self._prompt.any():
            self._count(new_lengths > 0)
        return self._runner.step(ids, positions, new_lengths, decay)

    def prune(self, active: NDArray[np.bool_], prompt_length: Ints, next_position: Ints) -> None:
        self._end_of_prompt()
        self._runner.prune(active, prompt_length, next_position)
        self._held = self._runner.lengths

    @property
    def lengths(self) -> Ints:
        self._end_of_prompt()  # the loop asks after the prompt, also where there are no rounds
        return self._runner.lengths

    @property
    def mean(self) -> NDArray[np.float64]:
        """[R] bytes, over the steps of each row."""
        return self._sum / np.maximum(self._steps, 1)

    def _end_of_prompt(self) -> None:
        if not self._prompt.any():
            self._prompt[:] = True
            self._count(self._prompt)

    def _count(self, rows: NDArray[np.bool_]) -> None:
        held = (self._held * self._token_bytes).sum(0)
        self._sum += np.where(rows, held, 0)
        self.peak = np.where(rows, np.maximum(self.peak, held), self.peak)
        self._steps += rows


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [R, T] int64, zeros behind, and lengths [R]."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = torch.zeros(len(rows), max(1, int(lengths.max())), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths

"""What a policy sees at a round, what it answers, and the interface in between.

A round happens on the host, after the prefill and then every `prune_interval` decode steps. The policy names, per layer
and row, the slots that stay; compaction and the return of emptied pages are the cache's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lethe_compile.config import LetheConfig

NEVER = torch.iinfo(torch.int64).max
"""Threshold of a layer that is never considered for pruning."""


@dataclass(frozen=True)
class LayerState:
    """One layer's cache at a round: R rows, N = the longest row's retained tokens, slots in order of position."""

    layer: int  # index of the attention site in graph order
    window: int | None  # sliding window: query q sees position p iff q - p < window
    mass: Tensor  # [R, N] float32: RASR scores, 0 beyond length
    position: Tensor  # [R, N] int32, -1 beyond length
    length: Tensor  # [R] int64
    prompt_length: Tensor  # [R] int64: positions below are prompt
    next_position: Tensor  # [R] int64: position that the next token will get
    active: Tensor  # [R] bool: rows still generating

    def visible(self) -> Tensor:
        """[R, N] bool: tokens that the next query or a later one can see. Rows that are done keep all their tokens.

        Dropping the others loses nothing: queries only move forward, so what the window hides now, it hides for good.
        """
        valid = self.position >= 0
        if self.window is None:
            return valid
        hidden = self.position <= (self.next_position - self.window).unsqueeze(1)
        return valid & ~(hidden & self.active.unsqueeze(1))


@dataclass(frozen=True)
class Selection:
    """The slots of one layer that stay."""

    keep: Tensor  # [R, N] bool, False beyond length
    pruned: Tensor  # [R] bool: rows that lose at least one token

    @classmethod
    def of(cls, state: LayerState, keep: Tensor) -> Selection:
        """Selection that keeps `keep` [R, N] of `state`'s tokens."""
        return cls(keep, keep.sum(1) < state.length)


class Policy(ABC):
    """Decides which tokens stay. Subclass, set `name`, implement `round`, and `register` the class."""

    name: ClassVar[str]

    def __init__(self, config: LetheConfig) -> None:
        self.config = config
        self._thresholds = torch.empty(0, 0, dtype=torch.int64)
        self._sparsity = torch.empty(0, 0)

    @property
    def decay(self) -> float | None:
        """Factor on every token's attention mass at each step; None = the graph need not track mass."""
        return None

    @property
    def peak(self) -> bool:
        """Whether a slot's score follows the peak of its attention rather than the sum; see `LetheConfig.score`."""
        return False

    @property
    def thresholds(self) -> Tensor:
        """[L, R] int64: retained tokens from which on a layer is considered for pruning; `NEVER` if it is not."""
        return self._thresholds

    @property
    def sparsity(self) -> Tensor:
        """[L, R] float32: Hoyer sparsity of the scores when last measured, in [0, 1]; NaN where never measured."""
        return self._sparsity

    def begin(self, num_layers: int, rows: int) -> None:
        """Forget the last generation. Raises `ConfigError` where the config cannot serve `num_layers`."""
        self._thresholds = torch.full((num_layers, rows), NEVER, dtype=torch.int64)
        self._sparsity = torch.full((num_layers, rows), torch.nan)

    @abstractmethod
    def round(self, layers: Sequence[LayerState]) -> list[Selection | None]:
        """What stays of each layer, in the order given; None = that layer is untouched."""

"""What a policy sees at a round, what it answers, and the interface in between.

A round comes after the prefill and then every `prune_interval` decode steps, for all layers and rows at once. The
policy names the slots that stay; compaction and the return of emptied pages are the cache's business. On a GPU a round
should not wait for the device: the host reads it once, after the compaction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.config import LetheConfig
from lethe_compile.errors import LetheError
from lethe_compile.settings import Settings

NEVER = torch.iinfo(torch.int64).max
"""Threshold of a layer that is never considered for pruning."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class RoundState:
    """The cache at a round: L layers, R rows, N slots at least as many as the longest row's, in order of position.

    A row is a sequence, or, for a policy `per_head`, one KV head of it: row ``sequence * heads + head``. Layers of
    fewer KV heads than others hold nothing in the rows that they lack.
    """

    mass: Tensor  # [L, R, N] float32: RASR scores, 0 beyond length
    position: Tensor  # [L, R, N] int32, -1 beyond length
    length: Tensor  # [L, R] int64
    windows: tuple[int | None, ...]  # of each layer: query q sees position p iff q - p < window; None = no window
    prompt_length: Tensor  # [R] int64: positions below are prompt
    next_position: Tensor  # [R] int64: position that the next token will get
    active: Tensor  # [R] bool: rows still generating
    key_source: Callable[[int], Tensor] | None = None  # behind `keys`
    heads: int = 1  # rows of one sequence

    def keys(self, layer: int) -> Tensor:
        """[R, N, num_kv_heads, k_dim], the cached keys of a layer as attention sees them (rotated if the model does),
        0 beyond length. Gathered from their pages at each call: ask for one layer at a time, and only if needed.
        """
        if self.key_source is None:
            raise LetheError("this round holds scores alone: whoever made it gave no keys")
        return self.key_source(layer)

    def window_sizes(self) -> Tensor:
        """[L, 1] int64 of `windows`, more than any position where there is none."""
        longest = torch.iinfo(torch.int32).max
        sizes = tuple(longest if window is None else window for window in self.windows)
        return column(sizes, self.position.device)

    def visible(self) -> Tensor:
        """[L, R, N] bool: tokens that the next query or a later one can see. Rows that are done keep all their tokens.

        Dropping the others loses nothing: queries only move forward, so what the window hides now, it hides for good.
        """
        valid = self.position >= 0
        if not any(self.windows):
            return valid
        hidden = self.position <= (self.next_position - self.window_sizes()).unsqueeze(2)
        return valid & ~(hidden & self.active[:, None])


@dataclass(frozen=True)
class NoOptions(Settings):
    """The options of a policy that has none."""


class Policy(ABC):
    """Decides which tokens stay. Subclass, set `name`, implement `round`, and `register` the class.

    Attributes:
        Options: a dataclass derived from `Settings`: what `LetheConfig.policy_options` may hold for this policy.
        options: an `Options`, as the config has it.

    Raises:
        ConfigError: an option that the policy does not have, or a value that is not allowed.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Settings]] = NoOptions
    options: Any
    per_head: ClassVar[bool] = False  # each KV head keeps tokens of its own; holds when a model is optimized for it

    def __init__(self, config: LetheConfig) -> None:
        self.config = config
        self.options = self.Options.from_dict(config.policy_options, owner=f"policy_options of {self.name!r}")
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
    def observation_window(self) -> int | None:
        """How many queries the mass covers at a round: the newest so many, or all since the last round if those are
        fewer; after the prefill, the newest so many of the prompt. None = every query there was.

        For this a prompt is run in two parts, and masses are cleared so many steps before each round.
        """
        return None

    @property
    def couples_rows(self) -> bool:
        """Whether what a row keeps depends on the other rows of its batch. Then results depend on the batch too."""
        return False

    @property
    def thresholds(self) -> Tensor:
        """[L, R] int64: retained tokens from which on a layer is considered for pruning; `NEVER` if it is not."""
        return self._thresholds

    @property
    def sparsity(self) -> Tensor:
        """[L, R] float32: Hoyer sparsity of the scores when last measured, in [0, 1]; NaN where never measured."""
        return self._sparsity

    def begin(self, num_layers: int, rows: int, token_bytes: Sequence[int] | None = None) -> None:
        """Forget the last generation. `token_bytes` are those of the keys and values of one token in each layer.

        Raises:
            ConfigError: the config cannot serve these layers.
        """
        self._thresholds = torch.full((num_layers, rows), NEVER, dtype=torch.int64)
        self._sparsity = torch.full((num_layers, rows), torch.nan)

    def state(self) -> dict[str, Tensor]:
        """All that a round changes for the next one, [L, R] each: what an exported round takes and returns."""
        return {"threshold": self._thresholds, "sparsity": self._sparsity}

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        self._thresholds, self._sparsity = state["threshold"], state["sparsity"]

    @staticmethod
    def _asks(tensor: Tensor) -> bool:
        """Whether to look at values: not where the device would be waited for, and not while a round is exported."""
        return tensor.is_cpu and not torch.compiler.is_exporting()

    def least_tokens(self, prompts: Counts, new_tokens: int, windows: Sequence[int | None]) -> Counts:
        """[L, R] tokens that each layer and row must have room for, pruned as hard as this policy can.

        A generation that finds this room never runs out of pages: where more is held, `round` gets a `limit`, of no
        less than what is stated here without the prompt and less one interval. A policy that ignores limits must state
        all it will ever hold; this one does.

        Args:
            prompts: [R] prompt tokens.
            new_tokens: cached tokens to come in each row.
            windows: [L] as in `RoundState`.
        """
        return np.tile(prompts + new_tokens, (len(windows), 1))

    def most_tokens(self, prompts: Counts, new_tokens: int, windows: Sequence[int | None]) -> Counts | None:
        """[L, R] tokens that each layer and row may hold between rounds, after the one behind the prefill, when pages
        are plenty; of a cap on layers together, any way of sharing it. None: no cap bounds them, as here.

        Arguments are those of `least_tokens`.
        """
        return None

    @abstractmethod
    def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        """The slots that stay: keep [L, R, N] bool, False beyond length; None = nothing goes.

        `limit` [L, R] int64, each >= 1, comes when pages run out: no more tokens than that may stay. Such a round
        follows an ordinary one at the same step, and is no occasion to adapt thresholds.
        """


def trimmed_by_window(tokens: Counts, prompts: Counts, windows: Sequence[int | None], interval: int) -> Counts:
    """[L, R] of `tokens` [L, R], what is left where each round trims to the window: never less than the prompt."""
    held = np.array([[NEVER if window is None else window - 1 + interval] for window in windows])  # [L, 1]
    trimmed: Counts = np.minimum(tokens, np.maximum(prompts, held))
    return trimmed


@lru_cache(maxsize=64)
def column(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """[L, 1] on the device, sent there once: a copy from the host would make every round wait."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

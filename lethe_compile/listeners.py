"""Who hears of rounds: callbacks, and a recorder while there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lethe_compile.keep_sets import KeepSets
from lethe_compile.kernels.ops import hoyer_sparsity
from lethe_compile.passes.program import Site
from lethe_compile.policies.base import RoundState
from lethe_compile.recorder import Recorder


@dataclass(frozen=True)
class Round:
    """What one round did to one layer: handed to the callbacks in `OptimizedModel.on_round`."""

    layer: int  # an attention of the graph; those that share a cache hear of the same
    position: Tensor  # [rows, N] int32 stored positions before the round, -1 beyond a row's length
    keep: Tensor  # [rows, N] bool: what stays
    next_position: Tensor  # [rows] int64: the first position whose query sees the result
    heads: int = 1  # rows of one sequence: its KV heads, where each keeps tokens of its own, else 1


class Listeners:
    """Those of one model, which come and go.

    Attributes:
        on_round: callables that get a `Round` for each layer a round changed.
        recorder: listens to every round while there is one.
    """

    def __init__(self, sites: Sequence[Site], keep_sets: KeepSets) -> None:
        self._sites, self._sets = sites, keep_sets
        self.on_round: list[Callable[[Round], None]] = []
        self.recorder: Recorder | None = None

    def sparsity(self, state: RoundState) -> Tensor | None:
        """[layers, rows] Hoyer sparsity of the scores, for the recorder; None where it does not ask for it."""
        if self.recorder is None or not self.recorder.sparsity:
            return None
        return hoyer_sparsity(state.mass.flatten(0, 1), state.length.flatten()).view_as(state.length)

    def evicted(self, step: int, state: RoundState, keep: Tensor) -> None:
        """A round after `step` decode steps leaves `keep` [layers, rows, N] of `state`."""
        if self.on_round:
            self._tell(state, keep)
        if self.recorder is not None and self.recorder.tokens:
            self.recorder.evicted(step, state.position, keep)

    def _tell(self, state: RoundState, keep: Tensor) -> None:
        lost = (keep.sum(2) < state.length).any(1).tolist()
        for site in [site for site in self._sites if lost[site.cache]]:
            shown = (state.position[site.cache], keep[site.cache], state.next_position.clone())
            position, kept, following = (self._sets.own(each, site.cache) for each in shown)
            event = Round(site.layer, position, kept, following, site.keep_sets)
            for callback in self.on_round:
                callback(event)

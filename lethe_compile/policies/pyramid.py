"""PyramidKV: layers' budgets decrease linearly from the first layer to the last.

Source: Cai et al., *PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling*, 2024,
arXiv 2406.02069. Attention spreads over everything in low layers and gathers on few tokens in high ones: of a budget of
b tokens a layer on the mean, the last layer gets b/β and the first 2b - b/β (section 4.2, β = 20 in the paper's runs),
on a line in between; tokens are chosen as in SnapKV, with a window of 8.

Ours differs: as `snapkv` says; every layer first gets the least that a cap allows, and the line distributes the rest;
and of `max_tokens`, which caps each layer, the first layer gets all, so that it holds no more in total than the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lethe_compile.policies.snapkv import SnapKVOptions, SnapKVPolicy
from lethe_compile.settings import integer, number, setting


@dataclass(frozen=True)
class PyramidOptions(SnapKVOptions):
    window: int = setting(8, integer(1))

    steepness: float = setting(20.0, number(">= 1", lambda v: v >= 1))
    """β: the last layer gets 1/β of the mean; 1 for equal layers."""


class PyramidPolicy(SnapKVPolicy):
    """`snapkv` with more of the budget for low layers."""

    name = "pyramid"
    Options = PyramidOptions
    options: PyramidOptions

    def weights(self, num_layers: int) -> Sequence[float]:
        last = 1 / self.options.steepness
        first = 2 - last
        return [first + (last - first) * layer / max(1, num_layers - 1) for layer in range(num_layers)]

    def ceilings(self, num_layers: int) -> Sequence[int] | None:
        most, least = self.config.max_tokens, self.config.cap_floor
        if most is None:
            return None
        weights = self.weights(num_layers)
        return [least + int((most - least) * weight / weights[0]) for weight in weights]

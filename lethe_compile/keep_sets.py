"""Which rows of the cache a sequence has: one, or one for each KV head, where heads keep tokens of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int64]


class KeepSets:
    """The sets of retained tokens that one sequence has in each of L layers, and the rows that hold them.

    Row ``sequence * heads + head``, `heads` being the most of any layer: one with fewer lacks the rows behind.
    """

    def __init__(self, of_layer: Sequence[int]) -> None:
        self.of_layer = np.asarray(of_layer, np.int64)
        self.heads = int(self.of_layer.max())

    def there(self, rows: int) -> NDArray[np.bool_]:
        """[L, rows] which rows a layer has."""
        there: NDArray[np.bool_] = np.arange(rows) % self.heads < self.of_layer[:, None]
        return there

    def repeat(self, values: NDArray[Any]) -> Counts:
        """[sequences * heads] of what is said of sequences, on the host."""
        return np.repeat(values.astype(np.int64), self.heads)

    def fetched(self, values: Tensor) -> Counts:
        """`repeat` of what lies on a device, which is waited for."""
        return self.repeat(values.cpu().numpy())

    def one(self, values: NDArray[Any]) -> Counts:
        """[sequences] of values [sequences * heads] that are the same for all heads."""
        return values[:: self.heads].astype(np.int64)

    def spread(self, values: Tensor) -> Tensor:
        """[sequences * heads, …] of what is said of sequences ``[sequences, …]``, where it lies; waits for nothing."""
        return values if self.heads == 1 else values.repeat_interleave(self.heads, dim=0)

    def own(self, values: Tensor, layer: int) -> Tensor:
        """The rows that `layer` has, of values ``[sequences * heads, …]``."""
        sets = int(self.of_layer[layer])
        return values if sets == self.heads else values.unflatten(0, (-1, self.heads))[:, :sets].flatten(0, 1)

    def total(self, values: NDArray[Any], sequences: int) -> list[list[int]]:
        """[L][sequences] of values [L, rows]: summed over heads, of the first `sequences`."""
        summed: list[list[int]] = self._by_head(values, sequences).sum(2).tolist()
        return summed

    def mean(self, values: NDArray[Any], sequences: int, known: NDArray[np.bool_] | None = None, none: Any = 0) -> Any:
        """[L][sequences] of values [L, rows]: the mean over heads; as they are where a sequence has one row.

        Only what is `known` [L, rows] counts; a sequence of whose heads none is known gets `none`.
        """
        if self.heads == 1:
            return values[:, :sequences].tolist()
        shown = self._by_head(values, sequences)
        if known is not None:
            shown = np.ma.masked_array(shown, ~self._by_head(known, sequences).filled(False))
        return shown.mean(2).filled(none).tolist()

    def each(self, values: NDArray[Any], sequences: int) -> list[list[list[int]]]:
        """[L][sequences][heads of the layer] of values [L, rows]."""
        return [[list(one.compressed()) for one in layer] for layer in self._by_head(values, sequences)]

    def _by_head(self, values: NDArray[Any], sequences: int) -> Any:
        """[L, sequences, heads], masked where a layer lacks the row."""
        shape = (len(values), -1, self.heads)
        shown = np.ma.masked_array(values, ~self.there(values.shape[1]))
        return shown.reshape(shape)[:, :sequences]

"""State of another kind than keys and values: what recurrences, linear attention and convolutions carry along.

It has a fixed size per row and is kept exactly: nothing of it is ever evicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lethe_compile.kernels.recurrent.call import StatefulCall


class States:
    """The tensors of every stateful call, for a number of rows; none at all for a model that has no such call.

    `has_previous_state` says whether the rows go on from their state in the next run, or begin.
    """

    def __init__(self, calls: Sequence[StatefulCall], device: torch.device) -> None:
        self._calls, self._device = calls, device
        self._flags = {value: torch.tensor(value) for value in (False, True)}  # on the host: no run waits for it
        self.tensors: dict[str, Tensor] = {}
        self.has_previous_state = False

    def begin(self, rows: int) -> None:
        """State of `rows` rows that have seen nothing; tensors are kept where they fit, as CUDA graphs need them."""
        self.has_previous_state = False
        shapes = {
            f"state_{c}_{i}": ((rows, *place.shape), place.dtype)
            for c, call in enumerate(self._calls)
            for i, place in enumerate(call.places)
        }
        for name, (shape, dtype) in shapes.items():
            known = self.tensors.get(name)
            if known is not None and known.shape == shape:
                known.zero_()
            else:
                self.tensors[name] = torch.zeros(shape, dtype=dtype, device=self._device)

    def inputs(self, rows: int | None = None, first: int = 0) -> dict[str, Tensor]:
        """The graph's inputs, of `rows` rows from the `first` on, or of all; none without a stateful call."""
        if not self._calls:
            return {}
        end = None if rows is None else first + rows
        state = {name: tensor[first:end] for name, tensor in self.tensors.items()}
        return {**state, "has_previous_state": self._flags[self.has_previous_state]}

    def move(self, source: int, target: int) -> None:
        """Row `target` takes over the state of row `source`."""
        for tensor in self.tensors.values():
            tensor[target] = tensor[source]

    def bytes_of(self, rows: int) -> list[int]:
        """Bytes that `rows` rows hold in each call."""
        return [rows * sum(place.bytes_per_row for place in call.places) for call in self._calls]

"""What runners of programs over contiguous caches share: the state between calls, and how it grows and shrinks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethe_compile.artifact.manifest import Manifest
from lethe_compile.artifact.sampling import Floats, Ints

_STEP = 32  # capacities are multiples of it, so that a runtime meets few distinct shapes


class ContiguousRunner(ABC):
    """`artifact.Runner` over two functions of tensors; a subclass says what a tensor is, and calls them.

    Each program returns new caches, which become the next call's inputs without a copy. Capacity follows the longest
    row from round to round, so what a round evicts is memory given back.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.begin(0)

    @abstractmethod
    def _full(self, shape: Sequence[int], dtype: str, value: float) -> Any:
        """A tensor of one value."""

    @abstractmethod
    def _given(self, array: NDArray[Any]) -> Any:
        """An array as a tensor."""

    @abstractmethod
    def _read(self, tensor: Any) -> NDArray[Any]:
        """A tensor as an array."""

    @abstractmethod
    def _resized(self, tensor: Any, size: int) -> Any:
        """A tensor cut, or filled up with zeros, to `size` along its third dimension."""

    @abstractmethod
    def _call(self, name: str, inputs: Mapping[str, Any]) -> Sequence[Any]:
        """The outputs of a program, in order."""

    def begin(self, rows: int) -> None:
        count, dtype = len(self.manifest.caches), str(self.manifest.model["dtype"])
        self._capacity = 0
        self._cache: dict[str, Any] = {
            "position": self._full((count, rows, 0), "int32", 0),
            "mass": self._full((count, rows, 0), "float32", 0),
            "length": self._full((count, rows), "int32", 0),
        }
        for index, cache in enumerate(self.manifest.caches):
            self._cache[f"k_{index}"] = self._full((rows, cache.kv_heads, 0, cache.k_dim), dtype, 0)
            self._cache[f"v_{index}"] = self._full((rows, cache.kv_heads, 0, cache.v_dim), dtype, 0)
        self._state = {
            one.name: self._full((count, rows), one.dtype, np.nan if one.initial is None else one.initial)
            for one in self.manifest.state
        }

    @property
    def lengths(self) -> Ints:
        return np.asarray(self._read(self._cache["length"]), np.int64)

    def reserve(self, tokens: int) -> None:
        capacity = -(-(int(self.lengths.max(initial=0)) + tokens) // _STEP) * _STEP
        if capacity != self._capacity:
            for name, tensor in self._cache.items():
                if name != "length":
                    self._cache[name] = self._resized(tensor, capacity)
            self._capacity = capacity

    def step(self, ids: Ints, positions: Ints, new_lengths: NDArray[np.int32], decay: float) -> Floats:
        given: dict[str, NDArray[Any]] = {"input_ids": ids, "positions": positions, "new_lengths": new_lengths}
        after = self._run("step", {**given, "decay": np.array([decay], np.float32)})
        return np.asarray(self._read(after["logits"]), np.float32)

    def prune(self, active: NDArray[np.bool_], prompt_length: Ints, next_position: Ints) -> None:
        given = {"active": active, "prompt_length": prompt_length, "next_position": next_position}
        after = self._run("prune", given)
        self._state = {one.name: after[f"{one.name}_after"] for one in self.manifest.state}

    def _run(self, name: str, given: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """One program; the caches that it returns take the place of those that it was given."""
        program = self.manifest.programs[name]
        tensors = {one: self._given(np.ascontiguousarray(array)) for one, array in given.items()}
        known = {**tensors, **self._state, **self._cache}
        results = self._call(name, {one: known[one] for one in program.inputs})
        after = dict(zip(program.outputs, results, strict=True))
        self._cache = {one: after[f"{one}_after"] for one in self._cache}
        return after

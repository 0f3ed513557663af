"""One call of a module that carries state from token to token, made as its model makes it, with the state outside.

A state-space layer, a linear attention or a short convolution remembers the tokens before in tensors of a fixed size,
which it keeps in the model's cache or on itself. Here the module itself does the work, whatever it is: each call gets a
copy of the places where it keeps those tensors, filled with ours, and what it leaves there is read back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lethe_compile.errors import UnsupportedGraphError

Path = tuple[str | int, ...]
"""How to come from an object to something that it holds: keys of dictionaries, indices of lists, else attributes."""


class Unread:
    """Stands for a value that nobody reads; who does after all gets an error that says what it is."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedGraphError(f"{self._what} was not expected to be read, and '{name}' of it is")

    def __bool__(self) -> bool:
        raise UnsupportedGraphError(f"{self._what} was not expected to be read, and is asked whether it is true")


@dataclass(frozen=True)
class Operand:
    """Stands, among a call's arguments, for the operand of that index."""

    index: int


@dataclass(frozen=True)
class Layout:
    """Which dimension of an operand counts rows, and which counts tokens; None for one that does not."""

    batch: int | None
    tokens: int | None


CACHE = Unread("the cache")
"""Stands, among a call's arguments, for the model's cache."""


@dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments, flattened, with `Operand` and `CACHE` in place of what differs by call."""

    leaves: tuple[Any, ...]
    structure: TreeSpec

    def fill(self, operands: Sequence[Tensor], cache: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with operands and cache in their places."""
        filled = [
            operands[leaf.index] if isinstance(leaf, Operand) else cache if leaf is CACHE else leaf
            for leaf in self.leaves
        ]
        args, kwargs = tree_unflatten(filled, self.structure)
        return args, kwargs


@dataclass(frozen=True)
class Output:
    """One result of a call, ``[rows, tokens, *shape]``: which leaf it is of what the module returns."""

    leaf: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a call keeps one tensor of its state, ``[rows, *shape]``.

    `initial` ``[*shape]`` is what it finds there at the first token, for each row; None: nothing, it makes its own.
    """

    on_module: bool  # else in the cache
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    initial: Tensor | None = None

    @property
    def bytes_per_row(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class StatefulCall:
    """One call of a stateful module, as often as its model is run, on operands ``[rows, tokens, …]``.

    Results of `prefill` and `advance` are packed: all outputs side by side, ``[rows, tokens, width]``.
    """

    name: str  # the module's path in the user's model
    module: nn.Module  # a copy that shares its weights with the user's
    layouts: tuple[Layout, ...]  # of the operands
    whole: Arguments  # of a sequence's first tokens
    step: Arguments  # of the tokens that follow, one at a time
    outputs: tuple[Output, ...]
    returned: Arguments  # what the module returns: `Operand` for each output, in order
    dtype: torch.dtype  # of the outputs
    places: tuple[Place, ...]
    touched: tuple[Path, ...]  # what a first call changes in the cache, flags included
    empty: Any  # the cache before anything is in it; None for a model that hands over none
    after: Any  # the cache, without its tensors, once a sequence has begun

    @property
    def width(self) -> int:
        return sum(prod(output.shape) for output in self.outputs)

    def sizes(self, operands: Sequence[Tensor]) -> tuple[int, int]:
        """(rows, tokens) of operands."""
        pairs = list(zip(operands, self.layouts, strict=True))
        rows = next(x.shape[at.batch] for x, at in pairs if at.batch is not None)
        return rows, next(x.shape[at.tokens] for x, at in pairs if at.tokens is not None)

    def prefill(self, operands: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Whole sequences of equal length from their first token on: packed outputs, and the state they leave."""
        rows, _ = self.sizes(operands)
        initial = [None if p.initial is None else p.initial.expand(rows, *p.shape).clone() for p in self.places]
        return self._call(self.whole, operands, copied(self.empty, self.touched), initial)

    def advance(self, operands: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One more token for every row; the module may write to `states`. Packed outputs, and the new state."""
        own = [place.path for place in self.places if not place.on_module]
        return self._call(self.step, operands, copied(self.after, own), states)

    def _call(
        self, arguments: Arguments, operands: Sequence[Tensor], cache: Any, states: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        for place, state in zip(self.places, states, strict=True):
            if place.on_module or state is not None:
                put(self._root(place, cache), place.path, state)
        args, kwargs = arguments.fill(operands, cache)
        results = self.pack(self.module(*args, **kwargs))
        left = [get(self._root(place, cache), place.path) for place in self.places]
        for place in self.places:
            if place.on_module:
                put(self.module, place.path, None)
        return results, left

    def _root(self, place: Place, cache: Any) -> Any:
        return self.module if place.on_module else cache

    def pack(self, returned: Any) -> Tensor:
        """What the module returns as one tensor ``[rows, tokens, width]``."""
        leaves = tree_flatten(returned)[0]
        flat = [leaf.reshape(*leaf.shape[:2], -1) for leaf in (leaves[output.leaf] for output in self.outputs)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def unpack(self, packed: Tensor) -> Any:
        """The reverse of `pack`, in operations that torch can trace; results that are no sequences are `Unread`."""
        if len(self.outputs) == 1 and len(self.outputs[0].shape) == 1:
            parts = [packed]
        else:
            pieces = packed.split([prod(output.shape) for output in self.outputs], dim=-1)
            shapes = [(*packed.shape[:2], *output.shape) for output in self.outputs]
            parts = [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        leaves = [parts[leaf.index] if isinstance(leaf, Operand) else leaf for leaf in self.returned.leaves]
        return tree_unflatten(leaves, self.returned.structure)


_numbers = count()
_calls: WeakValueDictionary[int, StatefulCall] = WeakValueDictionary()


def register(call: StatefulCall) -> int:
    """A number by which the operators find `call`, for as long as someone else holds it."""
    number = next(_numbers)
    _calls[number] = call
    return number


def registered(number: int) -> StatefulCall:
    """The call of that number."""
    return _calls[number]


# ------------------------------------------------------------------------------------------------- nested objects


def get(root: Any, path: Path) -> Any:
    """What `path` leads to."""
    for key in path:
        if isinstance(root, dict):
            root = root[key]
        else:
            root = root[int(key)] if isinstance(root, (list, tuple)) else getattr(root, str(key))
    return root


def put(root: Any, path: Path, value: Any) -> None:
    """Replace what `path` leads to."""
    holder, key = get(root, path[:-1]), path[-1]
    if isinstance(holder, dict):
        holder[key] = value
    elif isinstance(holder, list):
        holder[int(key)] = value
    else:
        setattr(holder, str(key), value)


def copied(root: Any, paths: Sequence[Path]) -> Any:
    """`root` with a shallow copy of every holder on the way along `paths`, as far as they lead; all else is shared."""
    if root is None or not paths:
        return root
    root = copy.copy(root)
    inner: dict[str | int, list[Path]] = {}
    for key, *rest in paths:
        if rest:
            inner.setdefault(key, []).append(tuple(rest))
    for key, below in inner.items():
        if _holds(root, key):
            put(root, (key,), copied(get(root, (key,)), below))
    return root


def _holds(root: Any, key: str | int) -> bool:
    if isinstance(root, list):
        return isinstance(key, int) and key < len(root)
    return key in root if isinstance(root, dict) else hasattr(root, str(key))

"""Queries and keys told apart in what relates every token to every other.

A captured graph sees a whole sequence: the tokens that ask and the tokens that are asked have one size, and a mask is
``[rows, 1, T, T]``. In a graph with a cache they are new tokens and earlier ones. Which dimension of which value counts
which is found by running each operation on shapes in which the two sizes differ: a value has as many readings as there
are ways to make it, and the mask ``[…, queries, keys]`` that is wanted picks one for everything that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from lethe_compile.passes.program import Program, is_symbolic, same_size, shape_of

ROWS, QUERIES, KEYS = 3, 61, 97  # stand in for the three sizes; primes that no model is made of
_MOST = 4096  # combinations of readings of one operation's operands

Signature = Any
"""What tells readings of one value apart: the shape of a tensor, the size itself, a tuple of them for several."""


@dataclass(frozen=True)
class Reading:
    """One way to make a value: a tensor without data or an int, and the signature of each operand, in order."""

    value: Any
    operands: tuple[Signature, ...] = ()


class Axes:
    """Readings of the nodes of `program`; `is_leaf` says which values are taken as they are, of queries or of keys."""

    def __init__(self, program: Program, is_leaf: Callable[[fx.Node], bool]) -> None:
        self._rows, self._tokens = shape_of(program.input_ids)
        self._is_leaf = is_leaf
        self._known: dict[fx.Node, dict[Signature, Reading]] = {}

    def readings(self, node: fx.Node) -> dict[Signature, Reading]:
        """Every reading of a node's value, the likeliest first."""
        if node not in self._known:
            pairs = self._given(node) if self._is_leaf(node) else self._made(node)
            found: dict[Signature, Reading] = {}
            for signature, reading in sorted(pairs, key=lambda pair: _foreign(*pair)):
                found.setdefault(signature, reading)
            self._known[node] = dict(sorted(found.items(), key=lambda item: _unlikely(item[0])))
        return self._known[node]

    def counts_keys(self, node: fx.Node, signature: Signature) -> bool:
        """Whether that reading of a node's value is made of anything that counts keys."""
        if self._is_leaf(node):
            return KEYS in _flat(signature)
        operands = self.readings(node)[signature].operands
        return any(self.counts_keys(n, s) for n, s in zip(operands_of(node), operands, strict=True))

    def unread(self, node: fx.Node) -> fx.Node:
        """Of what a value without readings is made of, the first that has none."""
        if not self._is_leaf(node):
            for operand in operands_of(node):
                if not self.readings(operand):
                    return self.unread(operand)
        return node

    def _given(self, node: fx.Node) -> Iterator[tuple[Signature, Reading]]:
        value = node.meta["val"]
        for tokens in ((QUERIES, KEYS), (KEYS, KEYS)):  # a leaf with two such dimensions has queries first
            if isinstance(value, Tensor):
                counted = iter(tokens)
                shape = tuple(self._size(size, counted) for size in value.shape)
                if None not in shape and _sides(shape) is not None:
                    yield shape, Reading(torch.empty(shape, dtype=value.dtype, device="meta"))
            elif (size := self._size(value, iter(tokens))) is not None:
                yield size, Reading(size)

    def _size(self, size: Any, tokens: Iterator[int]) -> Any:
        """What stands for a size; None for one that is neither rows nor tokens."""
        if not is_symbolic(size):
            return size
        if same_size(size, self._tokens):
            return next(tokens)
        return ROWS if same_size(size, self._rows) else None

    def _made(self, node: fx.Node) -> Iterator[tuple[Signature, Reading]]:
        options = [list(self.readings(n)) for n in operands_of(node)]
        if isinstance(node.meta["val"], torch.SymInt):
            options = [signatures[-1:] for signatures in options]  # a number made of others counts keys
        if _product(options) > _MOST:
            return
        for signatures in product(*options):
            value = self._run(node, signatures)
            signature = _signature(value)
            if signature is not None:
                yield signature, Reading(value, signatures)

    def _run(self, node: fx.Node, signatures: tuple[Signature, ...]) -> Any:
        chosen = iter(signatures)
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: self.readings(n)[next(chosen)].value
        )  # in the order of `operands_of`
        args, kwargs = tree_map_only(torch.device, lambda device: torch.device("meta"), (args, dict(kwargs)))
        try:
            with torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # shapes that do not fit: operators raise as they please
            return None


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The operands of a call, each as often as it occurs."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def token_dims(node: fx.Node, program: Program) -> list[int]:
    """The dimensions of a node's value that count tokens."""
    tokens = shape_of(program.input_ids)[1]
    return [dim for dim, size in enumerate(shape_of(node)) if same_size(size, tokens)]


def _product(options: list[list[Signature]]) -> int:
    total = 1
    for each in options:
        total *= len(each)
    return total


def _signature(value: Any) -> Signature:
    """None for what is no value, or relates queries to queries or keys to keys."""
    if isinstance(value, (tuple, list)):
        parts = tuple(map(_signature, value))
        return None if None in parts else parts
    if isinstance(value, Tensor):
        return None if _sides(tuple(value.shape)) is None else tuple(value.shape)
    return value if isinstance(value, int) else None


def _sides(shape: tuple[int, ...]) -> str | None:
    """The sides that a shape counts, "qk" for queries before keys; None if it counts one of them twice."""
    sides = "".join({QUERIES: "q", KEYS: "k"}.get(size, "") for size in shape)
    return sides if sides in ("", "q", "k", "qk", "kq") else None


def _foreign(signature: Signature, reading: Reading) -> int:
    """Operands that count what the result does not: not all operators object to sizes that do not fit."""
    own = {size for size in _flat(signature) if size in (QUERIES, KEYS)}
    return sum(not {s for s in _flat(each) if s in (QUERIES, KEYS)} <= own for each in reading.operands)


def _unlikely(signature: Signature) -> int:
    """Readings of what only lends its shape to another value do not matter: the likely ones are seldom made anew."""
    if isinstance(signature, int):
        return signature
    if signature and isinstance(signature[0], tuple):
        return max(map(_unlikely, signature))
    return ("qk", "q", "k", "", "kq").index(_sides(signature) or "")


def _flat(signature: Signature) -> tuple[int, ...]:
    if isinstance(signature, int):
        return (signature,)
    return tuple(size for part in signature for size in _flat(part))

"""The numbers in the sub-graph that computes a mask: how wide a band they can make, and small ones in their place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.program import attribute, is_call, shape_of

aten = torch.ops.aten

SMALL = 48  # constants up to here are evaluated as they are; a larger one is varied instead
_HUGE = 2**31  # from here on, a constant means "to the end" or "minus infinity"

# Calls whose integers are dimensions and sizes; those of any other call count as arithmetic.
_SHAPING = (
    *(aten.sym_size, aten.unsqueeze, aten.squeeze, aten.expand, aten.view, aten.reshape, aten.flatten, aten.slice),
    *(aten.select, aten.transpose, aten.permute, aten.cat, aten.stack, aten.index, aten.index_select, aten.cumsum),
    *(aten.arange, aten.ones, aten.zeros, aten.new_ones, aten.new_zeros, aten.any, aten.all, aten.sum, aten.repeat),
)
_COMPARING = (aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne, aten.add, aten.sub, aten.rsub)
# Calls that move the edge of a band by their constant; any other may multiply it.
_MOVING = (
    *_COMPARING,
    *(aten.tril, aten.triu, aten.where, aten.full, aten.full_like, aten.new_full, aten.masked_fill),
    *(operator.add, operator.sub, operator.lt, operator.le, operator.gt, operator.ge),
)
_EXPONENTIAL = (aten.pow, aten.bitwise_left_shift, aten.bitwise_right_shift, aten.__lshift__, aten.__rshift__)


class NotABand(Exception):
    """The mask is something else than a causal band; the message says what."""


@dataclass(frozen=True)
class Constants:
    """Magnitudes above 1 in a mask's sub-graph, each as often as it occurs."""

    moving: tuple[int, ...]  # move the edge of a band
    scaling: tuple[int, ...]  # may multiply it
    tables: tuple[int, ...]  # sizes of stored tables, or of tables made at a fixed size

    @property
    def large(self) -> list[int]:
        return sorted({c for c in self.moving + self.scaling if c > SMALL})

    def span(self, standin: Mapping[int, int]) -> int:
        """The widest band that these constants can make, where some have a stand-in."""
        moved, scaled = ([standin.get(c, c) for c in group] for group in (self.moving, self.scaling))
        return (1 + sum(moved)) * prod(scaled)


def constants_of(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> Constants:
    """The constants of the sub-graph `nodes`.

    Raises:
        NotABand: it computes with what no product of constants bounds.
    """
    moving: list[int] = []
    scaling: list[int] = []
    tables: list[int] = []
    for node in nodes:
        if is_call(node, *_EXPONENTIAL):
            raise NotABand("its mask is computed with powers or shifts")
        if node.op == "get_attr" and max(shape_of(node), default=1) > 1:
            tables += (size for size in shape_of(node)[-2:] if size > 1)
        elif node.op == "get_attr":
            scaling += (abs(c) for c in [_stored(attribute(module, str(node.target)))] if c is not None)
        else:
            if any(_constant(node, value) not in (None, 0, 1) for value in node.kwargs.values()):
                raise NotABand(f"its mask is computed with constants by name, in '{node.name}'")
            numbers = (abs(c) for c in (_constant(node, value) for value in node.args) if c is not None)
            (moving if is_call(node, *_MOVING) else scaling).extend(numbers)
            sizes = node.args if is_call(node, *_SHAPING) else (a for a in node.args if isinstance(a, (list, tuple)))
            tables += (abs(size) for size in _integers(sizes) if SMALL < abs(size) < _HUGE)
    return Constants(*(tuple(c for c in group if c > 1) for group in (moving, scaling, tables)))


def substitution(standin: Mapping[int, int]) -> Callable[[fx.Node, Any], Any]:
    """For `evaluate`: replaces each constant by its stand-in, signs kept."""

    def small(constant: int | None, value: Any) -> Any:
        if constant is None or abs(constant) not in standin:
            return value
        return type(value)(standin[abs(constant)] * (1 if constant > 0 else -1))

    def rewrite(node: fx.Node, args: Any) -> Any:
        if node.op == "get_attr":
            constant = _stored(args)
            return args if constant is None else torch.full_like(args, small(constant, constant))
        return tuple(small(_constant(node, a), a) for a in args)

    return rewrite


def _integers(args: Iterable[Any]) -> Iterator[int]:
    for value in args:
        if isinstance(value, (list, tuple)):
            yield from _integers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield value


def _constant(node: fx.Node, value: Any) -> int | None:
    """An argument that can set the width of a band, None for anything else, such as what fills denied places."""
    fills = isinstance(value, float) and value < 0 and not is_call(node, *_COMPARING)
    return None if fills or is_call(node, *_SHAPING) else _whole(value)


def _stored(value: Any) -> int | None:
    """A stored number that can set the width of a band."""
    return _whole(value.item()) if isinstance(value, Tensor) and value.numel() == 1 else None


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _HUGE:
        return None
    if value != int(value):
        raise NotABand(f"its mask computes with the fraction {value}")
    return int(value)

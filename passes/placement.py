"""Which part of a value each rank holds, and how that follows through a call: found by running it, not by rules.

A value that a rank holds in part is cut along one dimension: `Placement` names it and the indices of every rank. What a
call makes of cut operands is seen on a sample: what other ranks hold is NaN, and what stays finite is the rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.passes.program import SHAPE_ONLY, SITE_OP, Program, is_call, is_symbolic, shape_of

aten = torch.ops.aten

LAYOUT = (
    *(aten.reshape, aten.view, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze),
    *(aten.transpose, aten.permute, aten.movedim, aten.t, aten.expand, aten.repeat, aten.repeat_interleave),
    *(aten.contiguous, aten.clone, aten.slice, aten.select, aten.narrow, aten.split, aten.split_with_sizes),
    *(aten.chunk, aten.unbind, aten.cat, aten.stack, aten.to, aten._to_copy, aten.dropout, aten.detach, aten.alias),
)
_REDUCTIONS = (
    *(aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.var_mean, aten.std, aten.linalg_vector_norm),
    *(aten.softmax, aten._softmax, aten.log_softmax, aten.logsumexp, aten.layer_norm, aten.rms_norm, aten.norm),
)
_PRODUCTS = (aten.matmul, aten.bmm, aten.mm, aten.linear, aten.einsum)
ROWS, TOKENS = 2, 3  # of a sample


class Uncuttable(Exception):
    """A value that cannot be held in part; the message says why."""


@dataclass(frozen=True)
class Placement:
    """Rank r holds ``index[r]`` of the `size` entries of dimension `dim`, in order. None is empty, all are as many."""

    dim: int
    size: int
    index: tuple[tuple[int, ...], ...]

    @staticmethod
    def blocks(dim: int, size: int, ranks: int, parts: int | None = None) -> Placement:
        """`parts` equal blocks, by default one for each rank; where they are fewer, neighbouring ranks share one."""
        parts = parts or ranks
        width = size // parts
        index = tuple(tuple(range(r * parts // ranks * width, (r * parts // ranks + 1) * width)) for r in range(ranks))
        return Placement(dim, size, index)

    @staticmethod
    def covering(dim: int, size: int, ranks: int) -> Placement:
        """Equal blocks that cover all entries; the last ones overlap where `ranks` does not divide them."""
        width = -(-size // ranks)
        firsts = [min(rank * width, size - width) for rank in range(ranks)]
        return Placement(dim, size, tuple(tuple(range(first, first + width)) for first in firsts))

    @cached_property
    def key(self) -> tuple[int, int, int]:
        """Equal for equal placements, and cheap to compare."""
        return self.dim, self.size, hash(self.index)

    @property
    def each(self) -> int:
        """Entries that a rank holds."""
        return len(self.index[0])

    @property
    def divides(self) -> bool:
        """Whether every entry is one rank's, and no other's."""
        return sorted(i for own in self.index for i in own) == list(range(self.size))

    def of(self, rank: int) -> tuple[int, int] | Tensor:
        """What `rank` holds: (first, end) where it is a range, else int64 indices."""
        own = self.index[rank]
        first, end = own[0], own[-1] + 1
        return (first, end) if own == tuple(range(first, end)) else torch.tensor(own)

    def cut(self, value: Tensor, rank: int) -> Tensor:
        """The part of a whole `value` that `rank` holds; a view where it can be."""
        own = self.of(rank)
        if isinstance(own, tuple):
            return value.narrow(self.dim, own[0], own[1] - own[0])
        return value.index_select(self.dim, own.to(value.device))


def walks(node: fx.Node) -> bool:
    """Whether what a call makes of cut operands may be read off a sample: it computes numbers, and picks none by
    their values."""
    if node.op != "call_function" or is_call(node, *SHAPE_ONLY):
        return False
    tags = getattr(node.target, "tags", ())
    known = is_call(node, *LAYOUT, *_REDUCTIONS, *_PRODUCTS, SITE_OP) or node.target is getitem
    return known or torch.Tag.pointwise in tags


class Samples:
    """Values of the size that a graph records, for `ROWS` sequences of `TOKENS` tokens."""

    def __init__(self, program: Program) -> None:
        rows, tokens = (size.node.expr for size in shape_of(program.input_ids))
        self._sizes = {rows: ROWS, tokens: TOKENS}
        self._generator = torch.Generator().manual_seed(0)

    def size(self, size: Any) -> int:
        """Raises `Uncuttable` for a size that depends on data."""
        if not is_symbolic(size):
            return int(size)
        value = size.node.expr.subs(self._sizes)
        if not value.is_number:
            raise Uncuttable(f"a size {size} depends on data")
        return int(value)

    def of(self, value: Any) -> Any:
        """Numbers of one sign, between those where activations are flat or overflow; zeros for what is no number."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(one) for one in value)
        if not isinstance(value, Tensor):
            return value if not is_symbolic(value) else self.size(value)
        shape = [self.size(size) for size in value.shape]
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype)
        return torch.rand(shape, generator=self._generator).add_(0.5).to(value.dtype)


Value = Placement | tuple["Placement | None", ...] | None
"""Of a tensor, or of a list of tensors; None: every rank holds all of it."""


def placement_after(
    node: fx.Node, whole: Mapping[fx.Node, Any], placed: Mapping[fx.Node, Value], samples: Samples, ranks: int
) -> Value:
    """How the value of a call is held, whose operands are `placed`; `whole` are the values on record before any cut.

    None where the call takes no more of cut operands than every rank holds.

    Raises:
        Uncuttable: it mixes what different ranks hold.
    """
    if not walks(node):
        raise Uncuttable(f"{node.target} needs all of its operand")
    source = node.args[0] if node.args else None
    before = placed.get(source) if isinstance(source, fx.Node) else None
    if is_call(node, aten.slice) and isinstance(before, Placement) and len(node.args) > 1:
        dim: Any = node.args[1]
        if dim % whole[node].dim() != before.dim:  # an empty slice would not tell
            return before

    def value_on(rank: int) -> Any:
        return _run(node, lambda n: _poisoned(samples.of(whole[n]), placed.get(n), rank))

    values = [value_on(rank) for rank in range(ranks)]
    if isinstance(values[0], (list, tuple)):
        return tuple(_read([value[i] for value in values], node) for i in range(len(values[0])))
    return _read(values, node)


def _run(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    kwargs = {name: torch.device("cpu") if isinstance(v, torch.device) else v for name, v in kwargs.items()}
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # operators raise as they please; the whole value is always right
        raise Uncuttable(f"{node.target} does not run on a sample: {error}") from error


def _poisoned(value: Any, placement: Value, rank: int) -> Any:
    if isinstance(placement, tuple):
        return type(value)(_poisoned(v, p, rank) for v, p in zip(value, placement, strict=True))
    if placement is None:
        return value
    if not value.is_floating_point():
        raise Uncuttable("it is no floating-point number")
    foreign = torch.ones(placement.size, dtype=torch.bool)
    foreign[list(placement.index[rank])] = False
    return value.index_fill(placement.dim, foreign.nonzero()[:, 0], torch.nan)


def _read(values: list[Tensor], node: fx.Node) -> Placement | None:
    """The placement that finite entries tell, of each rank's value; None where every rank has all."""
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        raise Uncuttable(f"{node.target} gives no floating-point numbers")
    finite = [value.isfinite() for value in values]
    if all(bool(one.all()) for one in finite):
        return None
    for dim in range(values[0].dim()):
        rest: Any = [d for d in range(values[0].dim()) if d != dim]
        every = [one.all(dim=rest) if rest else one for one in finite]
        some = [one.any(dim=rest) if rest else one for one in finite]
        index = tuple(tuple(one.nonzero()[:, 0].tolist()) for one in every)
        counts = {len(own) for own in index}
        if all(map(torch.equal, every, some)) and len(counts) == 1 and counts != {0}:
            return Placement(dim, values[0].shape[dim], index)
    raise Uncuttable(f"{node.target} mixes what different ranks hold")

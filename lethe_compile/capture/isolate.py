"""A recorded call of a stateful module, made by itself: what it reads, what it returns, and that this is all.

The call is tried with its recorded arguments and state, once for a sequence and once for the token after it. It must
compute what it computed inside the model, and is then tried without each of its tensors in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path

from lethe_compile.capture.spy import Record, is_cache
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.kernels.recurrent.call import CACHE, Arguments, Layout, Operand, Output, StatefulCall, Unread

SIZES = ((2, 3), (3, 9))
"""Rows and tokens of two runs: only what counts rows or tokens changes so from one to the other."""

_TOLERANCE = 1e-3  # between a call in the model and the same call by itself, relative; rounding is far below


def by_place(arguments: Any) -> dict[str, Any]:
    """The leaves of nested arguments by their place among them; a cache is a leaf."""
    leaves, _ = tree_flatten_with_path(arguments, is_leaf=is_cache)
    return {keystr(path): leaf for path, leaf in leaves}


def refuse_varying(name: str, given: list[dict[str, Any]]) -> None:
    """Numbers among the arguments must not depend on rows and tokens: the call would be right for these alone."""
    whole, other, _ = given
    for place, value in whole.items():
        if isinstance(value, (int, float, str)) and other.get(place) != value:
            reason = f"a stateful module is told {value} for one input and {other.get(place)} for another, as a number"
            raise UnsupportedGraphError(reason, where=f"{name}, argument {place}")


def layouts_of(given: list[dict[str, Any]]) -> dict[str, Layout | None]:
    """Rows and tokens of each tensor among the arguments; None where its sizes follow neither."""
    whole, other, step = given
    found: dict[str, Layout | None] = {}
    for place, value in whole.items():
        if isinstance(value, Tensor):
            found[place] = _layout(value, other.get(place), step.get(place))
    return found


def _layout(whole: Tensor, other: Any, step: Any) -> Layout | None:
    if not isinstance(other, Tensor) or not isinstance(step, Tensor) or not whole.dim() == other.dim() == step.dim():
        return None
    dims: dict[str, int | None] = {"rows": None, "tokens": None}
    for dim, sizes in enumerate(zip(whole.shape, other.shape, step.shape, strict=True)):
        if len(set(sizes)) == 1:
            continue
        kinds = {
            (SIZES[0][0], SIZES[1][0], SIZES[0][0]): "rows",
            (SIZES[0][1], SIZES[1][1], 1): "tokens",
        }
        kind = kinds.get(sizes)
        if kind is None or dims[kind] is not None:
            return None
        dims[kind] = dim
    return Layout(dims["rows"], dims["tokens"])


def outputs_of(
    name: str, whole: Record, other: Record, step: Record
) -> tuple[tuple[Output, ...], Arguments, torch.dtype]:
    leaves, structure = tree_flatten(whole.returned)
    others, steps = tree_flatten(other.returned)[0], tree_flatten(step.returned)[0]
    outputs: list[Output] = []
    kept: list[Any] = []
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            kept.append(leaf)
        elif _layout(leaf, others[index], steps[index]) == Layout(0, 1) and leaf.is_floating_point():
            kept.append(Operand(len(outputs)))
            outputs.append(Output(index, tuple(leaf.shape[2:])))
        else:
            kept.append(Unread(f"a result of {name} that is no sequence"))
    dtypes = {leaves[output.leaf].dtype for output in outputs}
    if len(dtypes) != 1:
        raise UnsupportedGraphError("a stateful module returns no sequence, or sequences of several dtypes", where=name)
    return tuple(outputs), Arguments(tuple(kept), structure), dtypes.pop()


@dataclass(frozen=True)
class Trial:
    """Finds out which of the recorded tensors a call reads, by making it without one after the other."""

    whole: Record
    step: Record
    layouts: Mapping[str, Layout | None]
    make: Callable[[tuple[Layout, ...], Arguments, Arguments], StatefulCall]

    def operands(self) -> list[str]:
        """The arguments that the call reads.

        Raises:
            UnsupportedGraphError: even with all of them it computes something else than inside the model.
        """
        read = list(self.layouts)
        if (reason := self.disagrees(read)) is not None:
            name = self.call(read).name
            raise UnsupportedGraphError(f"a stateful module cannot be called by itself: {reason}", where=name)
        for place in self.layouts:
            less = [other for other in read if other != place]
            if less and self.disagrees(less) is None:
                read = less
        return read

    def call(self, read: list[str]) -> StatefulCall:
        """The call with the arguments `read` as operands; other tensors must not be read."""
        layouts = tuple(self.layouts[place] or Layout(None, None) for place in read)
        return self.make(layouts, *(_arguments(record, read, self.layouts) for record in (self.whole, self.step)))

    def disagrees(self, read: list[str]) -> str | None:
        """What the call does otherwise than in the model, for a sequence or for the token after it."""
        call = self.call(read)
        keys = [("module" if place.on_module else "cache", *place.path) for place in call.places]
        left = [self.whole.left[key] for key in keys]
        after = [self.step.left.get(key, old) for key, old in zip(keys, left, strict=True)]
        try:
            operands = [by_place(self.whole.arguments)[place].clone() for place in read]
            packed, states = call.prefill(operands)
            if (reason := _difference([packed, *states], [call.pack(self.whole.returned), *left])) is not None:
                return f"{reason} after a sequence"
            operands = [by_place(self.step.arguments)[place].clone() for place in read]
            packed, states = call.advance(operands, [state.clone() for state in left])
            reason = _difference([packed, *states], [call.pack(self.step.returned), *after])
            return None if reason is None else f"{reason} after one more token"
        except Exception as error:  # a module that misses an argument raises as it pleases
            return f"it raises {type(error).__name__}: {error}"


def _arguments(record: Record, read: list[str], tensors: Collection[str]) -> Arguments:
    pairs, structure = tree_flatten_with_path(record.arguments, is_leaf=is_cache)
    leaves: list[Any] = []
    for path, leaf in pairs:
        place = keystr(path)
        if place in read:
            leaves.append(Operand(read.index(place)))
        elif place in tensors:
            leaves.append(Unread(f"argument {place}"))
        else:
            leaves.append(CACHE if is_cache(leaf) else leaf)
    return Arguments(tuple(leaves), structure)


def _difference(actual: list[Any], expected: list[Tensor]) -> str | None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        what = f"its state {index - 1}" if index else "its output"
        if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return f"{what} is of another kind"
        if not bool((a.double() - b.double()).norm() <= _TOLERANCE * b.double().norm()):
            return f"{what} differs"
    return None

"""Run parts of a decode step that carries its own cache, one token a row, with any number of tokens before it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.program import Program, State, attribute, is_call, is_symbolic, shape_of, source_of

aten = torch.ops.aten

MOST = 1 << 17  # tokens before a step, at most, that anything is evaluated with

# Operators that move elements and compute nothing.
MOVES = (
    *(aten.reshape, aten.view, aten._unsafe_view, aten.expand, aten.transpose, aten.permute, aten.t, aten.numpy_T),
    *(aten.mT, aten.slice, aten.select, aten.narrow, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten),
    *(aten.clone, aten.contiguous, aten.alias, aten.detach, aten.to, aten._to_copy, aten.type_as, aten.cat, aten.roll),
    *(aten.index_copy, aten.index_put, aten._unsafe_index_put, aten.slice_scatter, aten.select_scatter, aten.copy),
    *(aten.scatter, aten.where, aten.index, aten.index_select, aten.gather, aten.repeat, aten.repeat_interleave),
)


def moved(node: fx.Node) -> dict[fx.Node, None]:
    """`node` and everything made of it by moving its elements, in graph order."""
    found = {node: None}
    for user in node.graph.nodes:
        if is_call(user, *MOVES) and any(source in found for source in user.all_input_nodes):
            found[user] = None
    return found


def sizes_of(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of an input: numbers, or symbols where they are dynamic; a symbol may have become a number."""
    sizes = shape_of(node)
    expressions = [getattr(getattr(size, "node", None), "expr", size) for size in sizes]
    dynamic = [bool(getattr(expression, "free_symbols", None)) for expression in expressions]
    return tuple(s if free else int(e) for s, e, free in zip(sizes, expressions, dynamic, strict=True))


def past_dim(node: fx.Node) -> int | None:
    """The dimension of a cache that grows with the tokens before, None for one of fixed size."""
    return next((dim for dim, size in enumerate(sizes_of(node)) if dim and is_symbolic(size)), None)


def needed(targets: Iterable[fx.Node], given: Collection[fx.Node] = ()) -> list[fx.Node]:
    """`targets` and what they are computed from, operands first; not what only nodes in `given` are computed from."""
    order: dict[fx.Node, None] = {}
    for target in targets:
        stack = [(target, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order[node] = None
            elif node not in order:
                stack.append((node, True))
                stack += [] if node in given else [(operand, False) for operand in node.all_input_nodes]
    return list(order)


def varies(node: fx.Node) -> bool:
    """Whether a value depends on any input."""
    return any(n.op == "placeholder" for n in needed([node]))


def tokenwise(program: Program) -> set[fx.Node]:
    """Everything that is computed from the token ids, by more than their number."""
    found = {program.input_ids}
    for node in program.graph.nodes:
        if not is_call(node, aten.sym_size) and any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def refusal(node: fx.Node, reason: str, hint: str | None = None) -> UnsupportedGraphError:
    return UnsupportedGraphError(reason, node=node.name, where=source_of(node) or None, hint=hint)


class Steps:
    """A decode step as a function of the number of tokens before it, `past`; each row is fed one token.

    `limits` says how many tokens a growing cache holds at most, where the step drops the oldest; `rows` how many rows
    are run: those of a fixed batch, or one.
    """

    def __init__(self, program: Program) -> None:
        assert program.step is not None
        self.module, self.step, self.device = program.module, program.step, program.device
        self.limits: dict[State, int] = {}
        batch = sizes_of(program.input_ids)[0]
        self.rows = 1 if is_symbolic(batch) else int(batch)
        self._sizes: dict[fx.Node, tuple[int, ...]] = {}

    def reads(self, node: fx.Node, role: str, given: Collection[fx.Node] = ()) -> bool:
        """Whether `node` is computed from more of an input than its size, other than through nodes in `given`."""
        sizes = [n for n in node.graph.nodes if is_call(n, aten.sym_size)]
        return any(self.step.roles.get(n) == role for n in needed([node], {*given, *sizes}))

    def constants(self, targets: Iterable[fx.Node]) -> set[int]:
        """Magnitudes, up to `MOST`, of the whole numbers that `targets` are computed with."""
        found: set[int] = set()
        for node in needed(targets):
            values: list[Any] = tree_leaves((node.args, node.kwargs))
            if node.op == "get_attr" and (value := attribute(self.module, str(node.target))).numel() == 1:
                values = [value.item()]
            numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            found |= {abs(int(v)) for v in numbers if abs(v) <= MOST}
        return found

    def held(self, state: State, past: int) -> int:
        """Tokens that a growing cache holds when `past` tokens came before."""
        return min(past, self.limits.get(state, past))

    def shape(self, state: State, past: int) -> tuple[int, ...]:
        """The shape of a cache with `past` tokens before the step."""
        return self._shape(state.node, self.held(state, past))

    def size(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a value with one token before the step; () for one that is no tensor.

        Raises:
            UnsupportedGraphError: the step cannot be run so.
        """
        if not self._sizes:
            every = [n for n in node.graph.nodes if n.op != "output"]
            try:
                with FakeTensorMode(allow_non_fake_inputs=True):
                    values = self.values(every, 1)
            except (RuntimeError, IndexError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UnsupportedGraphError(f"the step cannot be run with one token before it: {reason}") from error
            shapes = [tuple(value.shape) if isinstance(value, Tensor) else () for value in values]
            self._sizes = dict(zip(every, shapes, strict=True))
        return self._sizes[node]

    @torch.no_grad()
    def values(
        self,
        targets: Sequence[fx.Node],
        past: int,
        *,
        padding: int = 0,
        bound: Mapping[fx.Node, Any] | None = None,
    ) -> list[Any]:
        """The values of `targets`; nodes in `bound` have the values given there. `padding` hides the first tokens."""
        values: dict[fx.Node, Any] = {**self._inputs(past, padding), **(bound or {})}
        for node in needed(targets, values):
            if node in values:
                continue
            if node.op == "get_attr":
                values[node] = attribute(self.module, str(node.target))
            else:
                assert callable(node.target), f"{node.name} is a {node.op}"
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)
        return [values[target] for target in targets]

    def _inputs(self, past: int, padding: int) -> dict[fx.Node, Any]:
        """A value for each input; caches are zeros that take no memory."""
        values: dict[fx.Node, Any] = {
            node: self._input(node, role, past, padding) for node, role in self.step.roles.items()
        }
        for state in self.step.states:
            count = past if state.counts else 0
            zeros = torch.full((), count, dtype=state.node.meta["val"].dtype, device=self.device)
            values[state.node] = zeros.expand(self.shape(state, past))
        return values

    def _input(self, node: fx.Node, role: str, past: int, padding: int) -> Tensor | int:
        if not isinstance(node.meta["val"], Tensor):
            return past
        dtype = node.meta["val"].dtype
        if role == "attention_mask":
            shape = self._shape(node, past + 1)
            index = torch.arange(shape[-1], device=self.device)
            return ((index >= padding) & (index <= past)).to(dtype).expand(shape)
        shape = self._shape(node, 1)
        if len(shape) == 1:  # one position for all rows
            shape = (1,)
        return torch.full(shape, past if role == "position" else 0, dtype=dtype, device=self.device)

    def _shape(self, node: fx.Node, length: int) -> tuple[int, ...]:
        """Sizes of an input; dynamic ones are those of the batch in front, and `length` elsewhere."""
        sizes = enumerate(sizes_of(node))
        return tuple(int(s) if not is_symbolic(s) else self.rows if dim == 0 else length for dim, s in sizes)

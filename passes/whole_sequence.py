"""From one token a row to whole sequences: the graph of a decode step, with every token a row of its own.

Attention apart, a step of one token treats each row by itself. So the tokens of a batch can stand in its batch
dimension: B rows of T tokens are N = B·T rows of one. Only attention has to tell them apart again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lethe_compile.passes.cache_ops import Read
from lethe_compile.passes.check import shapes_alone
from lethe_compile.passes.program import Mask, Program, attribute, is_call, is_symbolic, same_size, shape_of
from lethe_compile.passes.step import Steps, refusal, sizes_of
from lethe_compile.passes.step_sites import StepSite

aten = torch.ops.aten

_RESHAPES = (aten.reshape, aten.view, aten._unsafe_view)  # by a list of sizes, the second argument
_KEPT = ("nn_module_stack", "stack_trace")


class WholeSequence:
    """Builds the graph ``(input_ids [B, T], position_ids [B, T]) -> logits [B, T, vocab]`` out of that of a step.

    A value of shape ``[b, …]`` in a step of b rows has here ``[N, …]``, or ``[k·N, …]`` where it was ``[k·b, …]``:
    each is checked. `positions` are the nodes that hold the token's position plus a constant, or that row of a table.
    """

    def __init__(
        self, program: Program, steps: Steps, sites: Sequence[StepSite], positions: Mapping[fx.Node, int]
    ) -> None:
        self._source, self._steps, self._positions = program, steps, positions
        self._sites = {site.result: site for site in sites}
        self._graph = fx.Graph()
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._values: dict[fx.Node, Any] = {}  # by node of the step; numbers where they are known
        self._rowwise: set[fx.Node] = set()  # nodes of the step whose values here differ from row to row
        self._unfolded: dict[fx.Node, fx.Node] = {}
        self._bands: dict[tuple[Any, ...], fx.Node] = {}
        ids, positions_in = (self._graph.placeholder(name) for name in ("input_ids", "position_ids"))
        dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
        example = torch.ones(2, 9, dtype=torch.int64, device=program.device)
        ids.meta["val"] = self._mode.from_tensor(example, symbolic_context=dynamic)
        positions_in.meta["val"] = torch.empty_like(ids.meta["val"])
        self._ids, self._position_ids = ids, positions_in
        self._batch, self._tokens = (self._call(aten.sym_size.int, (ids, dim)) for dim in (0, 1))
        self._count = self._call(operator.mul, (self._batch, self._tokens))

    def build(self) -> fx.GraphModule:
        """The module; it shares the step's weights.

        Raises:
            UnsupportedGraphError: an operator beside attention does not treat each row by itself.
        """
        logits: Any = self._source.graph.output_node().args[0]
        logits = logits[0]
        order = self._order(logits)
        last = {operand: index for index, node in enumerate(order) for operand in self._needs(node)}
        for index, node in enumerate(order):
            if node in self._sites:
                self._convert_site(node, [n for n in order if n in self._rowwise and last.get(n, -1) > index])
            else:
                self._values[node] = self._convert(node)
        vocab = self._steps.size(logits)[-1]
        self._graph.output(self._reshape(self._values[logits], [self._batch, self._tokens, vocab]))
        return fx.GraphModule(self._source.module, self._graph)

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        if node in self._positions:
            return node.all_input_nodes[:1] if _is_row(node) else []
        if self._counts_rows(node):
            return []
        return self._sites[node].operands if node in self._sites else node.all_input_nodes

    def _counts_rows(self, node: fx.Node) -> bool:
        batch = sizes_of(self._source.input_ids)[0]
        return is_call(node, aten.sym_size) and is_symbolic(batch) and same_size(node.meta["val"], batch)

    def _order(self, logits: fx.Node) -> list[fx.Node]:
        stack, seen = [logits], set()
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += self._needs(node)
        return [node for node in self._source.graph.nodes if node in seen]

    # ------------------------------------------------------------------------------------------------- row by row

    def _convert(self, node: fx.Node) -> Any:
        """The value here of a node that is no attention."""
        if node is self._source.input_ids:
            self._rowwise.add(node)
            return self._reshape(self._ids, [self._count, 1])
        if node in self._positions:
            self._rowwise.add(node)
            return self._position(node)
        if self._counts_rows(node):
            return self._count
        if node.op == "placeholder":
            reason = f"the input '{node.target}' is used for more than a cache, a mask, or the positions of tokens"
            raise refusal(next(iter(node.users), node), reason)
        if node.op == "get_attr":
            return self._constant(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        if any(operand in self._rowwise for operand in node.all_input_nodes):
            return self._convert_rows(node, list(args), kwargs)
        return _number_or(self._call(node.target, args, kwargs, node))

    def _position(self, node: fx.Node) -> fx.Node:
        rank = 1 if _is_row(node) else max(1, len(self._steps.size(node)))
        offset, dtype = self._positions[node], node.meta["val"].dtype
        value = self._reshape(self._position_ids, [self._count, *[1] * (rank - 1)])
        value = self._call(aten.add.Tensor, (value, offset)) if offset else value
        if _is_row(node):
            return self._call(aten.index_select.default, (self._values[node.all_input_nodes[0]], 0, value), like=node)
        return value if dtype == torch.int64 else self._call(aten.to.dtype, (value, dtype))

    def _convert_rows(self, node: fx.Node, args: list[Any], kwargs: Any) -> Any:
        """A call on values that differ from row to row."""
        shape = self._steps.size(node)
        if is_call(node, *_RESHAPES):
            args[1] = self._literal_sizes(node, list(args[1]), shape)
        elif is_call(node, aten.expand) and len(args[1]) == len(self._steps.size(node.all_input_nodes[0])):
            args[1] = [-1, *args[1][1:]]
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            pairs = zip(node.args, args, strict=True)
            args = [self._aligned(old, new, len(shape)) if old in self._rowwise else new for old, new in pairs]
        try:
            result = self._call(node.target, args, kwargs, node)
        except Exception as error:  # whatever an operator raises on these operands is the finding
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise refusal(node, f"'{node.name}' ({node.target}) works for one token alone: {reason}") from error
        value = result.meta["val"]
        if isinstance(value, Tensor):
            expected = (self._row_count(shape), *shape[1:])
            if len(value.shape) != len(expected) or not all(map(same_size, value.shape, expected)):
                reason = f"'{node.name}' ({node.target}) does not treat each row by itself: {list(shape)} of one token"
                raise refusal(node, f"{reason} became {list(value.shape)}")
        if isinstance(value, (Tensor, list, tuple)):
            self._rowwise.add(node)
        return _number_or(result)

    def _row_count(self, shape: Sequence[int]) -> Any:
        """The size that the first dimension of a value of `shape` in the step has here."""
        return self._count.meta["val"] * self._factor(shape)

    def _factor(self, shape: Sequence[int]) -> int:
        """How many of a value's first dimension belong to one row."""
        rows = self._steps.rows
        return 1 if not shape else shape[0] // rows if shape[0] % rows == 0 else shape[0]

    def _rows(self, shape: Sequence[int]) -> fx.Node:
        """`_row_count` as a node."""
        factor = self._factor(shape)
        return self._count if factor == 1 else self._call(operator.mul, (self._count, factor))

    def _literal_sizes(self, node: fx.Node, sizes: list[Any], shape: Sequence[int]) -> list[Any]:
        if not sizes or not isinstance(sizes[0], int) or sizes[0] == -1:
            return sizes
        return [self._rows(shape), *sizes[1:]]

    def _aligned(self, old: Any, value: fx.Node, rank: int) -> fx.Node:
        """An operand that broadcasts from the right, with its rows in front of the other's dimensions."""
        for _ in range(rank - max(1, len(self._steps.size(old)))):
            value = self._call(aten.unsqueeze.default, (value, 1))
        return value

    # -------------------------------------------------------------------------------------------------- attention

    def _convert_site(self, node: fx.Node, passing: Sequence[fx.Node]) -> None:
        """Convert an attention. Values needed after it pass it as [B, T, …], so that tokens stay a dimension there."""
        passing = [n for n in passing if isinstance(self._values[n], fx.Node) and shape_of(self._values[n])]
        for value in passing:
            if value not in self._unfolded:
                shape = self._steps.size(value)
                factor = self._factor(shape)
                inner = [*([factor] if factor > 1 else []), *shape[1:]]
                self._unfolded[value] = self._reshape(self._values[value], [self._batch, self._tokens, *inner])
        self._values[node] = self._attend(self._sites[node])
        self._rowwise.add(node)
        for value in passing:
            shape = self._steps.size(value)
            self._values[value] = self._reshape(self._unfolded[value], [self._rows(shape), *shape[1:]])

    def _attend(self, site: StepSite) -> fx.Node:
        own = {n: self._values[n] for n in site.operands if n in self._values}
        own |= {site.query: self._query(site), **{r.node: self._read(site, r) for r in (site.key, site.value)}}
        if site.mask is not None:
            own[site.mask.node] = self._band(site)
        for node in site.chain:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), own.__getitem__)
            if is_call(node, aten.scaled_dot_product_attention):
                operands = (own[site.query], own[site.key.node], own[site.value.node], self._band(site))
                args, kwargs = operands, {"scale": node.kwargs.get("scale"), "enable_gqa": True}
            elif is_call(node, *_RESHAPES, aten.expand):
                raise refusal(node, f"its scores are reshaped by '{node.name}' ({node.target})")
            own[node] = self._call(node.target, args, kwargs, node)
        shape, result = self._steps.size(site.result), own[site.result]
        if len(shape) == 3:
            result = self._reshape(result, [self._batch, self._factor(shape), self._tokens, shape[-1]])
        result = self._call(aten.transpose.int, (result, 1, 2))
        return self._reshape(result, [self._rows(shape), *shape[1:]])

    def _query(self, site: StepSite) -> fx.Node:
        """[B, H, T, D], or [B·H, T, D] where the step has [b·H, 1, D]."""
        shape = self._steps.size(site.query)
        if len(shape) not in (3, 4) or shape[-2] != 1:
            raise refusal(site.query, f"its queries are {list(shape)} for one token, not [batch, heads, 1, size]")
        heads = shape[1] if len(shape) == 4 else self._factor(shape)
        value = self._reshape(self._values[site.query], [self._batch, self._tokens, heads, shape[-1]])
        value = self._call(aten.transpose.int, (value, 1, 2))
        return value if len(shape) == 4 else self._folded(value, heads)

    def _read(self, site: StepSite, read: Read) -> fx.Node:
        """The sequence's own keys or values, in the form in which the step reads its cache."""
        cache = read.cache
        first, second = (dim for dim in range(1, 4) if dim != cache.slots)
        sizes = [self._batch, self._tokens, cache.shape[first], cache.shape[second]]
        value = self._reshape(self._values[cache.new], sizes)
        order = [0, 2, 1, 3] if read.heads_dim == first else [0, 3, 1, 2]
        value = self._call(aten.permute.default, (value, order))
        for dtype in (cache.state.node.meta["val"].dtype, read.node.meta["val"].dtype):
            if value.meta["val"].dtype != dtype:
                value = self._call(aten.to.dtype, (value, dtype))
        value = self._with_heads(value, read, grouped=is_call(site.result, aten.scaled_dot_product_attention))
        if len(self._steps.size(read.node)) == 3:
            value = self._folded(value, len(read.heads))
        return self._call(aten.transpose.int, (value, -1, -2)) if read.keys_last else value

    def _with_heads(self, value: fx.Node, read: Read, grouped: bool) -> fx.Node:
        """Heads [B, Hkv, T, D] in the order, and as often, as the step reads them; `grouped` ones can do once."""
        kv_heads, size = (int(shape_of(value)[dim]) for dim in (1, 3))
        group = len(read.heads) // kv_heads
        if read.heads == tuple(head for head in range(kv_heads) for _ in range(group)):
            if grouped or group == 1:
                return value
            value = self._call(aten.unsqueeze.default, (value, 2))
            value = self._call(aten.expand.default, (value, [self._batch, kv_heads, group, self._tokens, size]))
            return self._reshape(value, [self._batch, kv_heads * group, self._tokens, size])
        name = f"heads_of_{read.node.name}"
        self._source.module.register_buffer(name, torch.tensor(read.heads, device=self._source.device), False)
        return self._call(aten.index_select.default, (value, 1, self._constant(name)))

    def _folded(self, value: fx.Node, heads: int) -> fx.Node:
        rows = self._call(operator.mul, (self._batch, heads))
        return self._reshape(value, [rows, self._tokens, shape_of(value)[-1]])

    def _band(self, site: StepSite) -> fx.Node:
        """The mask that was proved, of a whole sequence, as the kind of operand that the step has."""
        dtype = torch.bool if site.mask is None else site.mask.node.meta["val"].dtype
        denies = site.mask is not None and site.mask.denies
        name = (site.band, dtype, denies)
        if name not in self._bands:
            band = self._visible(site.band)
            if denies:
                band = self._call(aten.logical_not.default, (band,))
            elif dtype != torch.bool:
                zero = self._call(aten.scalar_tensor.default, (0.0,), {"dtype": dtype, "device": self._source.device})
                band = self._call(aten.where.ScalarOther, (band, zero, torch.finfo(dtype).min))
            self._bands[name] = band
        return self._bands[name]

    def _visible(self, mask: Mask) -> fx.Node:
        """[T, T] bool."""
        on_device = {"dtype": torch.bool, "device": self._source.device}
        band = self._call(aten.ones.default, ([self._tokens, self._tokens],), on_device)
        band = self._call(aten.tril.default, (band,))
        if mask.window is not None and mask.chunked:
            index = self._call(aten.arange.default, (self._tokens,), {"device": self._source.device})
            chunk = self._call(aten.div.Tensor_mode, (index, mask.window), {"rounding_mode": "floor"})
            rows = self._call(aten.unsqueeze.default, (chunk, 1))
            return self._call(aten.logical_and.default, (band, self._call(aten.eq.Tensor, (rows, chunk))))
        return band if mask.window is None else self._call(aten.triu.default, (band, 1 - mask.window))

    # ------------------------------------------------------------------------------------------------------ nodes

    def _constant(self, name: str) -> fx.Node:
        node, value = self._graph.get_attr(name), attribute(self._source.module, name)
        node.meta["val"] = self._mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
        return node

    def _reshape(self, value: fx.Node, sizes: list[Any]) -> fx.Node:
        return self._call(aten.reshape.default, (value, sizes))

    def _call(self, target: Any, args: Any, kwargs: Any = None, like: fx.Node | None = None) -> fx.Node:
        """A call, with its value under FakeTensor, at the place in the model of the node that it is `like`."""
        node = self._graph.call_function(target, tuple(args), kwargs or {})
        if like is not None:
            node.meta.update({key: value for key, value in like.meta.items() if key in _KEPT})
        given, options = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with shapes_alone(self._mode):
            node.meta["val"] = target(*given, **options)
        return node


def _is_row(node: fx.Node) -> bool:
    """Whether a position is a row of a table, not a number."""
    return bool(node.meta["val"].is_floating_point())


def _number_or(node: fx.Node) -> Any:
    """The value of a node that is a plain number, as a size is that is no longer dynamic; else the node."""
    value = node.meta["val"]
    return value if isinstance(value, (bool, int, float)) else node

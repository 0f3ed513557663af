"""Runs a rewritten graph: span by span around the ops that carry state, by Inductor, and as a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx

from lethe_compile.errors import ConfigError
from lethe_compile.passes.insert_attention import without_fading
from lethe_compile.passes.outline import Outline, Span, narrowed, outline
from lethe_compile.passes.program import CACHED_OP, Program, attribute, shape_of

BACKENDS = ("auto", "eager", "inductor", "cudagraphs")
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


def choose_backend(
    asked: str, device: torch.device, *, stateful: bool = False, content: bool = False, waits: str | None = None
) -> tuple[str, str]:
    """The backend that runs, and why, in words for the report.

    A `stateful` program calls modules of the model, whose code may wait for the device, which no CUDA graph can record:
    it gets one only if asked for, and so does one with a node that `waits` for the host (`waits_for_host`). One with
    masks that depend on the `content` of the sequence never gets one: its masks grow with every step.

    Raises:
        ConfigError: an unknown name, or one that this device or this program cannot run.
    """
    if asked not in BACKENDS:
        raise ConfigError(f"backend={asked!r} is not allowed: must be one of {', '.join(BACKENDS)}")
    cuda = device.type == "cuda"
    if asked == "cudagraphs" and not cuda:
        raise ConfigError(f"backend='cudagraphs' needs a CUDA device, and the model is on {device}")
    if asked == "cudagraphs" and content:
        raise ConfigError("backend='cudagraphs' cannot run this model: its masks depend on the content and grow")
    if asked != "auto":
        return asked, "asked for"
    if not cuda:
        kernels = "CPU kernels" if device.type == "cpu" else "reference kernels"
        return "eager", f"{kernels} on {device}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "eager", "Triton is not installed: reference kernels"
    kernels, obstacle = "Triton kernels", waits
    if stateful:
        obstacle = "modules that keep other state run the model's own code"
    if content:
        kernels = "reference kernels where a mask reads the content"
        obstacle = "masks that depend on the content grow with every step"
    if obstacle is not None:
        return "inductor", f"{kernels}, Inductor between them; no CUDA graphs, since {obstacle}"
    return "cudagraphs", "Triton kernels, Inductor between them, decode steps replayed as CUDA graphs"


_WAITING = (
    *("aten::nonzero", "aten::_local_scalar_dense", "aten::item", "aten::masked_select", "aten::bincount"),
    *("aten::unique_dim", "aten::_unique2", "transformers::grouped_mm_fallback"),
)


def waits_for_host(graph: fx.Graph) -> str | None:
    """Which node makes the host wait for the device, or the device for the host, in words; None if none does."""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.name().partition(".")[0] in _WAITING:
            return f"{node.target} ({node.name}) waits for the host"
        before = [given.meta.get("val") for given in node.all_input_nodes]
        sent = node.target.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy)
        # Else numbers of the host are read when a kernel is launched.
        kinds = {value.device.type for value in before if isinstance(value, Tensor) and (sent or value.dim())}
        after = node.meta.get("val")
        if isinstance(after, Tensor) and after.device.type == "cuda" and "cpu" in kinds:
            return f"{node.target} ({node.name}) reads a tensor of the host"
    return None


def warm_up_compiler() -> None:
    """Start Inductor's worker processes, which take seconds to come up, while the model is still being captured."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.warm_pool()
    AsyncCompile.use_process_pool()  # asks for a first answer: until it came, kernels are compiled in this process


class Executor:
    """A program as a function ``(ids, positions, new_lengths, cache state) -> logits``.

    With `compiled`, each distinct region between ops that carry state goes through Inductor once, however many
    layers there are: batch and tokens are dynamic, a single token is a variant of its own.
    """

    def __init__(self, program: Program, compiled: bool) -> None:
        self.outline: Outline = outline(program)
        self.graphs: WeakSet[DecodeGraph] = WeakSet()
        self._program, self.compiled = program, compiled
        self._placeholders = program.placeholders()
        self._regions: list[Callable[..., tuple[Any, ...]]] = [self._region(module) for module in self.outline.regions]
        self._weights = {
            node: attribute(program.module, str(node.target))
            for span in self.outline.spans
            for node in (*span.inputs, *self._operands)
            if node.op == "get_attr"
        }
        self._last_use = self._lifetimes()
        self._output: fx.Node = program.graph.output_node().args[0]  # type: ignore[assignment]
        self._narrow = narrowed(program, self.outline.spans[-1])

    def interpreted(self) -> Executor:
        """The same program, its regions run node by node."""
        return self if not self.compiled else Executor(self._program, compiled=False)

    @property
    def _operands(self) -> list[fx.Node]:
        return [n for node in self.outline.cuts for n in node.all_input_nodes]

    def _region(self, module: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
        if not self.compiled:
            return module
        compiled: Callable[..., tuple[Any, ...]] = torch.compile(module, dynamic=False, fullgraph=True)
        return compiled

    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        new_lengths: Tensor,
        state: Mapping[str, Tensor],
        last: Tensor | None = None,
        same_step: bool = False,
    ) -> Tensor:
        """Logits ``[rows, T, vocab]`` of right-padded ids ``[rows, T]`` at logical positions ``[rows, T]``.

        `new_lengths` is ``[rows]`` int32, `state` as `KVCache.inputs`. With `last` ``[rows]``, the column of each row's
        last token, what follows the last such op is computed for those alone: ``[rows, 1, vocab]``. `verify` has seen
        that nothing there mixes tokens. With `same_step`, the tokens belong to the step of those before them, as parts
        of one prompt do: no score fades.
        """
        ids, positions = ids.contiguous(), positions.contiguous()  # so that one compiled region serves every batch
        given = {"input_ids": ids, "positions": positions, "new_lengths": new_lengths, **state}
        values: dict[fx.Node, Any] = {**self._weights, **{n: given[str(n.target)] for n in self._placeholders}}
        cuts = self.outline.cuts
        for index, span in enumerate(self.outline.spans):
            final = index == len(cuts)
            if final and last is not None and self._narrow is not None:
                for node, dim in self._narrow:
                    values[node] = _at(values[node], dim, last)
            self._call(span, values)
            if not final:
                node = cuts[index]
                args = fx.node.map_arg(node.args, values.__getitem__)
                if same_step and node.target is CACHED_OP:
                    args = without_fading(args)
                values[node] = node.target(*args)  # type: ignore[operator]
            for dead in self._last_use[index]:
                del values[dead]
        logits: Tensor = values[self._output]
        if last is not None and self._narrow is None:
            logits = _at(logits, 1, last)
        return logits

    def _call(self, span: Span, values: dict[fx.Node, Any]) -> None:
        if not span.outputs:
            return
        args = [values[node] for node in span.inputs]
        if self.compiled:
            for node, value in zip(span.inputs, args, strict=True):
                if node.op != "get_attr":
                    self._mark(node, value)
        for node, value in zip(span.outputs, self._regions[span.region](*args), strict=True):
            values[node] = value

    def _mark(self, node: fx.Node, value: Tensor) -> None:
        for dim, size in enumerate(shape_of(node)):
            if value.shape[dim] > 1 and not isinstance(size, int):
                torch._dynamo.maybe_mark_dynamic(value, dim)

    def _lifetimes(self) -> list[list[fx.Node]]:
        """Values, weights apart, that nothing needs after span and cut `index`."""
        last: dict[fx.Node, int] = {}
        for index, span in enumerate(self.outline.spans):
            last.update(dict.fromkeys((*span.inputs, *span.outputs), index))
            if index < len(self.outline.cuts):
                node = self.outline.cuts[index]
                last.update(dict.fromkeys((node, *node.all_input_nodes), index))
        final = len(self.outline.spans) - 1
        dead: list[list[fx.Node]] = [[] for _ in self.outline.spans]
        for node, index in last.items():
            if node.op == "call_function" and index < final:
                dead[index].append(node)
        return dead


def _at(value: Tensor, dim: int, column: Tensor) -> Tensor:
    """`value` [rows, …] at one index [rows] of `dim` for each row; the dimension stays, with size 1."""
    shape = [1] * value.dim()
    shape[0] = column.shape[0]
    index = column.view(shape).expand(*(n if d != dim else 1 for d, n in enumerate(value.shape)))
    return value.gather(dim, index)


def bucket(rows: int) -> int:
    """The size of a captured graph that serves so many rows."""
    return next(size for size in (*_BUCKETS, -(-rows // _BUCKETS[-1]) * _BUCKETS[-1]) if size >= rows)


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS sets a workspace aside for every stream that it meets, and keeps it."""
    return torch.cuda.Stream(device)


class DecodeGraph:
    """One decode step of a fixed number of rows, captured as a CUDA graph and replayed.

    Static tensors, read and written by the replay:
        tokens: ``[rows]`` int64, the token each row is fed.
        active: ``[rows]`` bool, rows that take part.
        next_position: ``[rows]`` int64, advanced for active rows.
    """

    def __init__(self, executor: Executor, tokens: Tensor, active: Tensor, next_position: Tensor) -> None:
        self._executor = executor
        executor.graphs.add(self)
        self.tokens, self.active, self.next_position = tokens, active, next_position
        self.captures = 0  # how often it was recorded
        self._key: tuple[Any, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def replay(self, state: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[rows, vocab]`` float32 of one step, overwritten by the next; captures anew if the state moved."""
        key = tuple((tensor.data_ptr(), tuple(tensor.shape)) for tensor in state.values())
        if key != self._key:
            self._capture(state)
            self._key = key
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        return self._logits

    def _step(self, state: Mapping[str, Tensor]) -> Tensor:
        ids = self.tokens.masked_fill(~self.active, 0)[:, None]
        new = self.active.to(torch.int32)
        logits = self._executor.run(ids, self.next_position[:, None], new, state)
        self.next_position += self.active
        return logits[:, 0].float()

    @classmethod
    def of_rows(cls, executor: Executor, rows: int, device: torch.device) -> DecodeGraph:
        """With tensors of its own."""
        kinds = (torch.int64, torch.bool, torch.int64)
        return cls(executor, *(torch.zeros(rows, dtype=kind, device=device) for kind in kinds))

    def _capture(self, state: Mapping[str, Tensor]) -> None:
        self.captures += 1
        self._graph = self._logits = None  # frees the memory that the next capture takes
        active = self.active.clone()
        self.active.zero_()  # the warm-up, which compiles, appends nothing
        stream = _recording_stream(active.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(state)
        torch.cuda.current_stream().wait_stream(stream)
        # Graphs of one model never run at the same time and can share memory. A pool dies with its last graph.
        pool = next((other._graph.pool() for other in self._executor.graphs if other._graph is not None), None)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: those that submit to an engine, the one that watches collectives.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._step(state)
        self._graph = graph
        self.active.copy_(active)

"""What torch.compile hands to a backend: whose graph it is, what its inputs mean, and what it returns beside logits."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lethe_compile.capture.graph import ROLES, example_ids, roles_of
from lethe_compile.errors import UnsupportedGraphError

# Of a path such as L['kwargs']['past_key_values'].layers[0].keys
_PART = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_LAYER = re.compile(r"^(?P<cache>.*)\.layers\[(?P<index>\d+)\]\.(?P<part>keys|values|cumulative_length)$")
_BROKEN = "compile all of the model's forward: fullgraph=True says where a graph breaks"
_DROP_CACHE = (
    "pass use_cache=False, or a static cache, whose place the pruned one takes: generate(cache_implementation='static')"
)


@dataclass(frozen=True)
class StaticLayer:
    """One layer of a static cache: places among the graph's inputs; no `count` where the graph does not read it."""

    keys: int
    values: int
    count: int | None = None


class Region:
    """A graph of torch.compile, and the model whose whole forward it computes.

    Made inside the call of the backend, since only then the frame's variables are there. It holds on to no weights.

    Attributes:
        graph: as torch.compile made it; it computes what the model computes.
        model: a weak reference to the model.
        paths: where each input comes from, such as ``L['input_ids']``.
        owned: inputs that are the model's own.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        nodes = self._inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        scope = _scope()
        sources = [getattr(n, "_dynamo_source", None) for n in nodes]
        self.paths = [_path(source) for source in sources]
        self._used = [bool(node.users) for node in nodes]
        modules = [_owner(source, scope) for source in sources]
        self.owned = [module is not None for module in modules]
        owners = {id(module): module for module in modules if module is not None}
        self.models = len(owners)
        self.model: weakref.ref[nn.Module] = weakref.ref(next(iter(owners.values()), nn.Module()))
        self._names = [_name(path, scope, next(iter(owners.values()), None)) for path in self.paths]

    def check_owner(self) -> nn.Module:
        """The model.

        Raises:
            UnsupportedGraphError: the graph computes with the weights of none, or of several.
        """
        model = self.model()
        if self.models != 1 or model is None:
            kind = "no model's weights" if not self.models else f"the weights of {self.models} modules"
            raise UnsupportedGraphError(f"the compiled graph computes with {kind}", hint=_BROKEN)
        return model

    def read(self, inputs: Sequence[Any]) -> Roles:
        """What the inputs mean, told by their names, and where these say nothing by what they hold.

        Raises:
            UnsupportedGraphError: an input is none of a decoder's.
        """
        layers: dict[int, dict[str, int]] = {}
        masks, plain, columns = [], {}, None
        for place, (path, name, value) in enumerate(zip(self.paths, self._names, inputs, strict=True)):
            if self.owned[place] or not isinstance(value, Tensor) or not self._used[place]:
                continue
            if (part := _LAYER.match(path)) is not None:
                layers.setdefault(int(part["index"]), {})[part["part"]] = place
            elif name[0] in ROLES["attention_mask"] and value.dim() in (2, 4):
                masks.append(place)
            elif value.dim() == 2 and len(name) == 1:
                plain[name[0]] = place
            elif name == ("cache_position",):
                columns = place
            else:
                raise UnsupportedGraphError(
                    f"the compiled graph takes {path} {list(value.shape)}, which is no input of a decoder",
                    hint=f"pass token ids, position_ids, attention_mask and past_key_values alone; {_BROKEN}; a module "
                    "that keeps a cache of its own goes to lethe_compile.optimize",
                )
        roles = roles_of({name: inputs[place] for name, place in plain.items()})
        places = {role: plain[name] for name, role in roles.items()}
        if "attention_mask" in places:
            masks.append(places.pop("attention_mask"))
        if "input_ids" not in places:
            raise UnsupportedGraphError("the compiled graph takes no token ids [batch, tokens]", hint=_BROKEN)
        static = tuple(
            StaticLayer(layer["keys"], layer["values"], layer.get("cumulative_length"))
            for _, layer in sorted(layers.items())
            if "keys" in layer and "values" in layer
        )
        return Roles(places["input_ids"], places.get("position_ids"), columns, tuple(masks), static)

    def example(self, roles: Roles, inputs: Sequence[Any]) -> dict[str, Tensor] | None:
        """Arguments of the model to capture it with, by name; None where it was not its own forward that was compiled."""
        ids = example_ids(inputs[roles.input_ids].device)
        example = {self._names[roles.input_ids][0]: ids}
        if roles.position_ids is not None:
            counts = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
            example[self._names[roles.position_ids][0]] = counts
        for mask in roles.masks:
            example[self._names[mask][0]] = torch.ones_like(ids)
        model = self.model()
        own = set() if model is None else set(inspect.signature(model.forward).parameters)
        return example if example.keys() <= own else None

    def example_of(self, place: int) -> Tensor:
        """An input as torch.compile saw it: sizes are symbols where they are dynamic."""
        value: Tensor = _example(self._inputs[place])
        return value

    def logits(self, inputs: Sequence[Any], changed: Mapping[int, Tensor]) -> Tensor:
        """What the graph computes with other tensors in some places, which it may write; other writes go to copies.

        Raises:
            UnsupportedGraphError: it writes to the model.
        """
        copies = [changed.get(place, value) for place, value in enumerate(inputs)]
        for place, value in enumerate(copies):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and place not in changed:
                with torch.inference_mode(False):  # whose tensors do not count what is written to them
                    copies[place] = value.clone()
        own = {p: v for p, v in enumerate(copies) if self.owned[p] and isinstance(v, Tensor)}
        own = {place: value for place, value in own.items() if not isinstance(value, nn.Parameter)}
        before = {place: value._version for place, value in own.items()}
        with torch.no_grad():
            results = self.graph(*copies)
        for place, value in own.items():
            if value._version != before[place]:
                raise UnsupportedGraphError(
                    f"the compiled graph writes {self.paths[place]}: the model keeps a cache or other state of its own",
                    hint="lethe_compile.optimize takes such a decode step",
                )
        logits: Tensor = results[self.outputs().place]
        return logits

    def outputs(self) -> Outputs:
        """What the graph returns.

        Raises:
            UnsupportedGraphError: anything beside logits that depends on the model's weights.
        """
        nodes = list(self.graph.graph.nodes)
        weights = {n for n, owned in zip(self._inputs, self.owned, strict=True) if owned}
        results: Sequence[Any] = self.graph.graph.output_node().args[0]  # type: ignore[assignment]
        computed = _dependents(nodes, weights)
        heavy = [i for i, r in enumerate(results) if r in computed]
        logits = [i for i in heavy if _is_logits(results[i])]
        if len(logits) != 1 or len(heavy) != 1:
            shapes = ", ".join(str(list(_example(results[i]).shape)) for i in heavy) or "nothing of the model's"
            hint = f"{_DROP_CACHE}; no hidden states or attentions; and {_BROKEN}"
            raise UnsupportedGraphError(
                f"the compiled graph must return logits [batch, tokens, vocabulary] alone, and returns {shapes}",
                hint=hint,
            )
        rest = [r for i, r in enumerate(results) if i != logits[0]]
        made = [i for i, r in enumerate(results) if i != logits[0] and _is_cache(r)]
        return Outputs(logits[0], _example(results[logits[0]]), _rest(self.graph, computed, rest), tuple(made))


@dataclass(frozen=True)
class Roles:
    """Places among a graph's inputs."""

    input_ids: int
    position_ids: int | None
    cache_position: int | None  # columns of the sequence [T]
    masks: tuple[int, ...]
    static: tuple[StaticLayer, ...]


@dataclass(frozen=True)
class Outputs:
    """The place of the logits, an example of them, and the graph of everything else that is returned or counted on.

    `made` are the places of a static cache's tensors that the graph allocates, as a prefill may, keys before values.
    """

    place: int
    example: Tensor
    rest: fx.GraphModule | None
    made: tuple[int, ...]

    def save_memory(self, windows: Collection[int | None]) -> None:
        """Allocate a static cache's layers no more, but those of `windows`, which transformers goes on to read."""
        if self.rest is None:
            return
        results: Any = self.rest.graph.output_node().args[0]
        for node in results:
            if _is_cache(node) and node.target is torch.zeros and not _is_one_of(_example(node).shape[2], windows):
                node.target = unallocated
        self.rest.recompile()

    def join(self, logits: Tensor, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """All outputs in order, with `logits` in their place; counters among the inputs go on."""
        others = [] if self.rest is None else list(self.rest(*inputs))
        others.insert(self.place, logits.to(self.example.dtype))
        return tuple(others)


def _rest(graph: fx.GraphModule, computed: Mapping[fx.Node, None], results: Sequence[Any]) -> fx.GraphModule | None:
    """The part that computes `results`, and that advances integer counters in place; nothing of the model's."""
    counting = [n for n in graph.graph.nodes if n not in computed and _counts(n)]
    wanted = [r for r in results if isinstance(r, fx.Node)] + counting
    if not wanted:
        return None
    needed: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in needed:
            needed.add(node)
            wanted += node.all_input_nodes
    part = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copied[node] = part.node_copy(node, copied.__getitem__)
    part.output(tuple(copied[r] if isinstance(r, fx.Node) else r for r in results))
    return fx.GraphModule(graph, part)


def _counts(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    in_place = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return in_place and isinstance(value, Tensor) and not value.is_floating_point()


def _dependents(nodes: Sequence[fx.Node], roots: set[fx.Node]) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = dict.fromkeys(roots)
    for node in nodes:
        if node.op != "output" and any(operand in found for operand in node.all_input_nodes):
            found[node] = None
    return found


def unallocated(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that shape without memory: every element is the same NaN, and writing to it fails."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(size)


def _is_one_of(size: Any, numbers: Collection[int | None]) -> bool:
    return isinstance(size, int) and size in numbers  # a symbol has no hash


def _is_cache(node: Any) -> bool:
    value = _example(node)
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 4


def _is_logits(node: Any) -> bool:
    value = _example(node)
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


# -------------------------------------------------------------------------------------------------- where inputs live


def _scope() -> dict[str, Any]:
    """The variables of the frame that is being compiled, by the letters that Dynamo's paths begin with."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    return {"L": output.local_scope, "G": output.global_scope}


def _path(source: Any) -> str:
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _owner(source: Any, scope: Mapping[str, Any]) -> nn.Module | None:
    """The outermost module that an input is reached through."""
    chain = []
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    for link in reversed(chain):
        try:
            value = eval(_path(link), dict(scope))  # Dynamo's own expression for it
        except (NameError, AttributeError, KeyError, IndexError, TypeError, SyntaxError):
            continue  # a path by Dynamo's helpers
        if isinstance(value, nn.Module):
            return value
    return None


def _name(path: str, scope: Mapping[str, Any], model: nn.Module | None) -> tuple[str, ...]:
    """The argument of the model's forward that a path means, and the path within it."""
    parts = [next(part for part in match if part) for match in _PART.findall(path)] or [path]
    container = scope["L"].get(parts[0]) if path.startswith("L[") else None
    if len(parts) > 1 and isinstance(container, dict) and parts[0] not in ROLES["attention_mask"]:
        return tuple(parts[1:])
    if len(parts) > 1 and isinstance(container, tuple) and parts[1].isdigit() and model is not None:
        names = list(inspect.signature(model.forward).parameters)
        index = int(parts[1])
        return (names[index] if index < len(names) else parts[1], *parts[2:])
    return tuple(parts)

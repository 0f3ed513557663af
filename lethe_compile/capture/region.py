"""What torch.compile hands to a backend: whose graph it is, what its inputs mean, and what it returns beside logits."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lethe_compile.capture.graph import ROLES, example_ids, roles_of
from lethe_compile.capture.region_outputs import WHOLE, Outputs, example_of, outputs_of
from lethe_compile.capture.sources import argument_of, frame_scope, owner_of, path_of
from lethe_compile.errors import UnsupportedGraphError

_LAYER = re.compile(r"^(?P<cache>.*)\.layers\[(?P<index>\d+)\]\.(?P<part>keys|values|cumulative_length)$")


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
        paths: where each input comes from, such as ``L['input_ids']``.
        owned: inputs that are the model's own.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        nodes = self._inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        scope = frame_scope()
        sources = [getattr(n, "_dynamo_source", None) for n in nodes]
        self.paths = [path_of(source) for source in sources]
        self._used = [bool(node.users) for node in nodes]
        modules = [owner_of(source, scope) for source in sources]
        self.owned = [module is not None for module in modules]
        owners = list({id(module): module for module in modules if module is not None}.values())
        self._models = [weakref.ref(module) for module in owners]
        self._names = [argument_of(path, scope, owners[0] if owners else None) for path in self.paths]

    @property
    def model(self) -> nn.Module:
        """The model, which is alive while its weights come as inputs.

        Raises:
            UnsupportedGraphError: the graph computes with the weights of none, or of several.
        """
        models = [model for reference in self._models if (model := reference()) is not None]
        if len(models) != 1:
            kind = "no model's weights" if not models else f"the weights of {len(models)} modules"
            raise UnsupportedGraphError(f"the compiled graph computes with {kind}", hint=WHOLE)
        return models[0]

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
                    hint=f"pass token ids, position_ids, attention_mask and past_key_values alone; {WHOLE}; a module "
                    "that keeps a cache of its own goes to lethe_compile.optimize",
                )
        roles = roles_of({name: inputs[place] for name, place in plain.items()})
        places = {role: plain[name] for name, role in roles.items()}
        if "attention_mask" in places:
            masks.append(places.pop("attention_mask"))
        if "input_ids" not in places:
            raise UnsupportedGraphError("the compiled graph takes no token ids [batch, tokens]", hint=WHOLE)
        static = tuple(
            StaticLayer(layer["keys"], layer["values"], layer.get("cumulative_length"))
            for _, layer in sorted(layers.items())
            if "keys" in layer and "values" in layer
        )
        return Roles(places["input_ids"], places.get("position_ids"), columns, tuple(masks), static)

    def example(self, roles: Roles, inputs: Sequence[Any]) -> dict[str, Tensor] | None:
        """Arguments to capture the model with, by name; None where it was not its own forward that was compiled."""
        ids = example_ids(inputs[roles.input_ids].device)
        example = {self._names[roles.input_ids][0]: ids}
        if roles.position_ids is not None:
            counts = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
            example[self._names[roles.position_ids][0]] = counts
        for mask in roles.masks:
            example[self._names[mask][0]] = torch.ones_like(ids)
        return example if example.keys() <= inspect.signature(self.model.forward).parameters.keys() else None

    def example_of(self, place: int) -> Tensor:
        """An input as torch.compile saw it: sizes are symbols where they are dynamic."""
        value: Tensor = example_of(self._inputs[place])
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
        """What the graph returns; raises as `outputs_of`."""
        return outputs_of(self.graph, [n for n, owned in zip(self._inputs, self.owned, strict=True) if owned])


@dataclass(frozen=True)
class Roles:
    """Places among a graph's inputs."""

    input_ids: int
    position_ids: int | None
    cache_position: int | None  # columns of the sequence [T]
    masks: tuple[int, ...]
    static: tuple[StaticLayer, ...]

"""Capture: from a model of any kind to one FX graph ``(input_ids, …) -> logits`` with batch and tokens dynamic."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lethe_compile.errors import InputError, UnsupportedGraphError
from lethe_compile.passes.program import Program, is_symbolic, shape_of

_EXAMPLE_ROWS, _EXAMPLE_TOKENS = 2, 9
_ROLES = {
    "input_ids": ("input_ids", "ids", "tokens", "token_ids", "idx", "inputs", "x"),
    "position_ids": ("position_ids", "positions", "position", "pos", "input_pos"),
    "attention_mask": ("attention_mask", "padding_mask"),
}
_interface_lock = threading.Lock()


@dataclass(frozen=True)
class Captured:
    """A captured decoder, and the model as it was, to verify against."""

    program: Program
    original: Callable[[Mapping[str, Tensor]], Tensor]
    """Logits ``[B, T, vocab]`` of the unchanged model from inputs by role: input_ids, position_ids, attention_mask."""


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> Captured:
    """Capture a decoder as a graph.

    Args:
        model: a Hugging Face model, a plain module (an `fx.GraphModule` too), or an ExportedProgram whose batch and
            token dimensions are dynamic.
        example_inputs: arguments for a plain module, positional or by name, where its signature is not
            ``(input_ids[, positions])``: int64 ``[batch, tokens]`` each.

    Raises:
        UnsupportedGraphError: the model cannot be exported, or its graph is no decoder's.
        InputError: NaN or infinite weights, several devices, or unusable example inputs.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return _capture_program(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"a model to optimize must be a module or an ExportedProgram, not {type(model).__name__}")
    check_weights(model)
    with _evaluating(model):
        if _is_hugging_face(model):
            return _capture_hugging_face(model)
        return _capture_module(model, example_inputs)


def check_weights(model: nn.Module) -> None:
    """Refuse weights that cannot work: on no device, on several, NaN or infinite.

    Raises:
        InputError: names the parameter.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    devices: dict[str, str] = {}
    for name, tensor in tensors:
        devices.setdefault(str(tensor.device), name)
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise InputError(f"the model lies on several devices ({places}): move it to one with model.to(device)")
    if "meta" in devices:
        raise InputError(f"the model has no weights: {devices['meta']} is on the meta device")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise InputError(f"the weights are broken: {name} holds NaN or infinity")


def _is_hugging_face(model: nn.Module) -> bool:
    return any(c.__module__ == "transformers.modeling_utils" for c in type(model).__mro__)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a capture: dropout is no part of a decoder."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Logits(nn.Module):
    """A Hugging Face model reduced to what the graph needs: ids, positions and padding in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in accepted else {}
        self.positions = "position_ids" in accepted

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if self.positions else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **positions, **self.options)
        logits: Tensor = output.logits
        return logits


def _capture_program(exported: torch.export.ExportedProgram) -> Captured:
    module = exported.module(check_guards=False)
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    return Captured(_program(exported, None), lambda inputs: _logits_of(module(**_by_name(names, inputs))))


def _capture_module(model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | None) -> Captured:
    example = _example(model, example_inputs)
    program = _program(_export(model, example), None)

    def original(inputs: Mapping[str, Tensor]) -> Tensor:
        with _evaluating(model):
            return _logits_of(model(**_by_name(example, inputs)))

    return Captured(program, original)


def _by_name(names: Iterable[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by the model's own parameter names."""
    roles = {name: next((r for r, known in _ROLES.items() if name in known), None) for name in names}
    return {name: inputs[role] for name, role in roles.items() if role is not None}


def _logits_of(output: Any) -> Tensor:
    """The first tensor of rank 3 in what a model returns."""
    found = [leaf for leaf in tree_leaves(getattr(output, "logits", output)) if isinstance(leaf, Tensor)]
    return next(leaf for leaf in found if leaf.dim() == 3)


def _capture_hugging_face(model: Any) -> Captured:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedGraphError(f"{type(model).__name__} is an encoder-decoder, not a decoder")
    if model.get_output_embeddings() is None:
        raise UnsupportedGraphError(f"{type(model).__name__} gives no logits", hint="load it with AutoModelForCausalLM")
    example = {name: torch.ones(_EXAMPLE_ROWS, _EXAMPLE_TOKENS, dtype=torch.int64) for name in _ROLES}
    example["position_ids"] = torch.arange(_EXAMPLE_TOKENS).repeat(_EXAMPLE_ROWS, 1)
    example = {name: tensor.to(model.device) for name, tensor in example.items()}
    with _attention_captured(model):
        exported = _export(_Logits(model), example)
    program = _program(exported, getattr(config.get_text_config(), "num_hidden_layers", None))
    wrapped = _Logits(model)

    def original(inputs: Mapping[str, Tensor]) -> Tensor:
        with _evaluating(model), _eager_attention(model):
            logits: Tensor = wrapped(**inputs)
            return logits

    return Captured(program, original)


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Transformers' eager attention for the time of a call: the one that leaves nothing out (sdpa drops softcap)."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    before = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


@contextmanager
def _attention_captured(model: Any) -> Iterator[None]:
    """Route the model's attention through `attention_site` for the time of an export.

    The capture function goes by the name "eager": models test that name, and masks are made for it. Under any other
    name some models change semantics (softcap dropped, causal masks not made).
    """
    from transformers.modeling_utils import AttentionInterface  # noqa: PLC0415  (heavy)

    registry = AttentionInterface._global_mapping
    with _interface_lock, _eager_attention(model):
        previous = registry.get("eager")
        try:
            AttentionInterface.register("eager", _attention)
            yield
        finally:
            registry.pop("eager", None)
            if previous is not None:
                registry["eager"] = previous


# What transformers passes beside the operands: honoured, or without effect on the result, or refused.
_WITHOUT_EFFECT = frozenset(
    ("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "past_key_values")
)
_WITHOUT_EFFECT |= {"is_causal", "position_embeddings", "output_router_logits", "return_dict", "logits_to_keep"}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, with the call kept as one node. Operands ``[B, heads, T, head_dim]``."""
    unknown = sorted(name for name, given in other.items() if given is not None and name not in _WITHOUT_EFFECT)
    layer = int(getattr(module, "layer_idx", None) or 0)
    if unknown:
        raise UnsupportedGraphError(f"its attention takes {', '.join(unknown)}, which is not understood", layer=layer)
    if dropout:
        raise UnsupportedGraphError(f"its attention applies dropout {dropout} outside training", layer=layer)
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    options = (scale, None if softcap is None else float(softcap), sliding_window, layer)
    out = torch.ops.lethe.attention_site(query, key, value, attention_mask, s_aux, *options)
    return out.transpose(1, 2).contiguous(), None  # [B, T, heads, v_dim]


def _example(model: nn.Module, given: Sequence[Any] | Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Example arguments by parameter name."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(model, fx.GraphModule):
        names = [str(n.target) for n in model.graph.nodes if n.op == "placeholder"]
    if isinstance(given, Mapping):
        return dict(given)
    if given is not None:
        return dict(zip(names, given, strict=False))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.ones(_EXAMPLE_ROWS, _EXAMPLE_TOKENS, dtype=torch.int64, device=device)
    example = {names[0]: ids} if names else {}
    for name in names[1:]:
        if name in _ROLES["position_ids"]:
            example[name] = torch.arange(_EXAMPLE_TOKENS, device=device).repeat(_EXAMPLE_ROWS, 1)
        elif name in _ROLES["attention_mask"]:
            example[name] = torch.ones_like(ids)
    return example


def _export(model: nn.Module, example: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    for name, tensor in example.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or min(tensor.shape) < 2:
            raise InputError(f"example input {name!r} must be a tensor [batch >= 2, tokens >= 2], not {_describe(tensor)}")
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dynamic, 1: dynamic} for name in example}
    try:
        return torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)
    except UnsupportedGraphError:
        raise
    except Exception as error:  # torch.export raises many kinds; each means that there is no graph to work on
        first = str(error).strip().split("\n")[0]
        hint = "pass example_inputs if its signature is not (input_ids[, positions])"
        raise UnsupportedGraphError(f"the model cannot be exported: {type(error).__name__}: {first}", hint=hint) from error


def _describe(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _program(exported: torch.export.ExportedProgram, expected_layers: int | None) -> Program:
    """Reduce an ExportedProgram to a flat graph: inputs named by role, logits the only output."""
    module = exported.module(check_guards=False)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    roles: set[str] = set()
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if not isinstance(node.meta.get("val"), Tensor):
            if node.users:
                raise UnsupportedGraphError(f"the graph takes the scalar input '{node.target}'", node=node.name)
            graph.erase_node(node)
            continue
        _name_input(node, roles)
    if "input_ids" not in roles:
        raise UnsupportedGraphError(f"no input is the token ids: their name must be one of {_ROLES['input_ids']}")
    _keep_logits(graph)
    return Program(fx.GraphModule(module, graph), expected_layers)  # without the hooks that check the old signature


def _name_input(node: fx.Node, roles: set[str]) -> None:
    shape, given = shape_of(node), str(node.target)
    fits: Callable[[str], bool] = lambda role: given in _ROLES[role] and role not in roles  # noqa: E731
    role = next((r for r in _ROLES if fits(r)), None)
    if role is None:
        known = ", ".join(name for names in _ROLES.values() for name in names)
        raise UnsupportedGraphError(f"the input '{given}' has no known role (known names: {known})", node=node.name)
    if len(shape) != 2 or not all(is_symbolic(size) for size in shape):
        sizes = ", ".join(map(str, shape))
        raise UnsupportedGraphError(
            f"the input '{given}' has the fixed shape [{sizes}]; batch and tokens must be dynamic",
            node=node.name,
            hint="export with dynamic_shapes={0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for every input",
        )
    node.target = node.name = role
    roles.add(role)


def _keep_logits(graph: fx.Graph) -> None:
    """Reduce the output to the first floating-point tensor of rank 3."""
    output = graph.output_node()
    results: list[fx.Node] = []
    fx.node.map_arg(output.args[0], results.append)
    logits = [n for n in results if len(shape_of(n)) == 3 and n.meta["val"].is_floating_point()]
    if not logits:
        raise UnsupportedGraphError("the graph returns no logits [batch, tokens, vocabulary]")
    caches = [n.name for n in results if len(shape_of(n)) == 4]
    if caches:
        raise UnsupportedGraphError(f"the graph returns a cache of its own ({', '.join(caches[:4])}, …)", node=caches[0])
    output.args = (logits[0],)

"""An exported artifact in a comparison: whether it belongs to the model, and what its programs call."""

from __future__ import annotations

from collections import Counter

from lethe_compile.artifact.manifest import Manifest
from lethe_compile.errors import InputError
from lethe_compile.passes.summary import GraphChange, GraphSummary, Unexpected, Value
from lethe_compile.runtime import OptimizedModel

_OWN = ("lethe", "aten", "_operator", "higher_order", "prims", "math", "builtins")


def check_artifact(manifest: Manifest, fast: OptimizedModel) -> None:
    """Refuse an artifact of another model, as far as its manifest can tell.

    Raises:
        InputError: says in what they differ.
    """
    model = {site.cache: (site.kv_heads, site.k_dim, site.v_dim) for site in fast.caches}
    mine = [model[index] for index in sorted(model)]
    theirs = [(cache.kv_heads, cache.k_dim, cache.v_dim) for cache in manifest.caches]
    pairs = (
        ("vocabulary", fast.vocab_size, manifest.model["vocab_size"]),
        ("caches (KV heads, key and value dimension)", mine, theirs),
    )
    for what, left, right in pairs:
        if left != right:
            raise InputError(f"{manifest.directory} is of another model: its {what} is {right}, and the model's {left}")


def artifact_graph(manifest: Manifest, before: GraphSummary | None) -> GraphChange | None:
    """The graph of an artifact's step, where its format can be read; None for compiled ones."""
    if manifest.kind == "pt2":
        after = _torch_summary(manifest)
    elif manifest.kind in ("onnx", "tensorrt"):
        after = _onnx_summary(manifest)
    else:
        return None
    layers = sum(len(cache.layers) for cache in manifest.caches)
    foreign = [name for name in after.ops if not name.startswith(("ai.onnx::", *(f"{one}::" for one in _OWN)))]
    reason = "of a library that an artifact does not bring along"
    return GraphChange(before, after, layers, tuple(Unexpected(name, after.ops[name], reason) for name in foreign))


def _torch_summary(manifest: Manifest) -> GraphSummary:
    import torch

    import lethe_compile.kernels.ops  # noqa: F401  (registers the operators that the program calls)

    program = torch.export.load(manifest.path(manifest.programs["step"].file))
    return GraphSummary.of(program.graph)


def _onnx_summary(manifest: Manifest) -> GraphSummary:
    import onnx

    model = onnx.load(str(manifest.path(manifest.programs["step"].file)), load_external_data=False)
    counts = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in model.graph.node)
    ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    inputs, outputs = (tuple(map(_onnx_value, values)) for values in (model.graph.input, model.graph.output))
    return GraphSummary(len(model.graph.node), ordered, inputs, outputs)


def _onnx_value(value: object) -> Value:
    import onnx

    kind = value.type.tensor_type  # type: ignore[attr-defined]  # a protobuf message
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    sizes = tuple(dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim)
    return Value(value.name, dtype, sizes)  # type: ignore[attr-defined]

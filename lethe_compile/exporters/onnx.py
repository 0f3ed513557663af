"""ONNX: `step.onnx` and `prune.onnx` in standard operators, weights once in a file of their own beside them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.errors import MissingPackageError, UnsupportedGraphError
from lethe_compile.exporters.programs import TracedProgram, prune_program, step_program
from lethe_compile.runtime import OptimizedModel

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18
WEIGHTS = "weights.bin"
_INLINE_BYTES = 1024  # constants up to this size stay in the .onnx file
DTYPES = (torch.float32, torch.float16)


def write_onnx(fast: OptimizedModel, directory: Path, progress: Callable[[str], None]) -> dict[str, ProgramSpec]:
    """Write the programs of `fast` to `directory`.

    Raises:
        UnsupportedGraphError: something in the model has no form in standard operators; names it.
        MissingPackageError: onnxscript is not installed.
    """
    _check_dtype(fast)
    programs = {}
    for traced in (step_program(fast), prune_program(fast)):
        if traced is None:
            continue
        progress(f"{traced.name}: tracing")
        model = to_onnx(traced)
        file = f"{traced.name}.onnx"
        progress(f"{traced.name}: writing {file}")
        save(model, directory / file)
        inputs = tuple(operand.name for operand in traced.inputs)
        programs[traced.name] = ProgramSpec(file, inputs, traced.outputs)
    return programs


def _check_dtype(fast: OptimizedModel) -> None:
    kinds = {fast.dtype, *(weight.dtype for weight in fast.program.module.parameters())}
    if other := [kind for kind in kinds if kind.is_floating_point and kind not in DTYPES]:
        raise UnsupportedGraphError(
            f"the model computes in {str(other[0]).removeprefix('torch.')}, which ONNX Runtime has few kernels for",
            hint="Convert it first: model.half() or model.float(), or --dtype float16 on the command line",
        )


def to_onnx(traced: TracedProgram) -> ir.Model:
    """A traced program as an ONNX model; its weights are still the tensors of torch.

    Raises:
        UnsupportedGraphError: an operator has no form in standard operators.
        MissingPackageError: onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("ONNX export needs onnxscript: pip install 'lethe-compile[onnx]'", "onnxscript") from error
    program = traced.trace()
    try:
        with _quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
    except torch.onnx.errors.OnnxExporterError as error:
        first = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
        raise UnsupportedGraphError(f"{traced.name} cannot be written in ONNX's standard operators: {first}") from error
    assert exported is not None, "only with a file does it return nothing"
    model = exported.model
    _name(model, traced)
    _strip(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages that nobody asked for, and warns of its own use of torch."""
    import logging

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name(model: ir.Model, traced: TracedProgram) -> None:
    """Give inputs, outputs and dynamic sizes the names of the manifest."""
    import onnx_ir as ir

    graph = model.graph
    sizes: dict[str, str] = {}
    for value, operand in zip(graph.inputs, traced.inputs, strict=True):
        assert value.shape is not None
        sizes.update({str(value.shape[dim]): size for dim, size in operand.sizes.items()})
        value.name = operand.name
    for value, name in zip(graph.outputs, traced.outputs, strict=True):
        value.name = name
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, sizes) for dim in value.shape])


def _renamed(dim: Any, sizes: dict[str, str]) -> Any:
    return dim if isinstance(dim, int) else sizes.get(str(dim), None)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _strip(model: ir.Model) -> None:
    """Leave out where in Python things came from: it names paths of this machine, and is most of the file."""
    from lethe_compile import __version__

    model.producer_name, model.producer_version = "lethe-compile", __version__
    graph = model.graph
    for holder in (model, graph, *graph, *_values(graph), *graph.initializers.values()):
        holder.metadata_props.clear()
        if hasattr(holder, "doc_string"):
            holder.doc_string = None


def save(model: ir.Model, path: Path) -> None:
    """Write a model; tensors of more than a few numbers go into `WEIGHTS` beside it, one after the other."""
    import onnx_ir as ir

    large = any(
        value.const_value is not None and value.const_value.nbytes > _INLINE_BYTES
        for value in model.graph.initializers.values()
    )
    if large and not path.with_name(WEIGHTS).exists():
        ir.save(model, path, external_data=WEIGHTS, size_threshold_bytes=_INLINE_BYTES)
    else:
        ir.save(model, path)

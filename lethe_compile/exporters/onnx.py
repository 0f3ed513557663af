"""ONNX: `step.onnx` and `prune.onnx` in standard operators, weights once in a file of their own beside them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.errors import MissingPackageError, UnsupportedGraphError
from lethe_compile.exporters.assemble import assemble
from lethe_compile.exporters.programs import ExportableProgram, prune_program, step_program, trace
from lethe_compile.runtime import OptimizedModel

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18
WEIGHTS = "weights.bin"
DTYPES = (torch.float32, torch.float16)
_INLINE_BYTES = 1024  # constants up to this size stay in the .onnx file


def write_onnx(fast: OptimizedModel, directory: Path, progress: Callable[[str], None]) -> dict[str, ProgramSpec]:
    """Write the programs of `fast` to `directory`.

    Raises:
        UnsupportedGraphError: something in the model has no form in standard operators; names it.
        MissingPackageError: onnxscript is not installed.
    """
    _check_dtype(fast)
    programs = {}
    for program in (step_program(fast), prune_program(fast)):
        if program is None:
            continue
        model = to_onnx(program, progress)
        file = f"{program.name}.onnx"
        progress(f"{program.name}: writing {file}")
        save(model, directory / file)
        inputs = tuple(operand.name for operand in program.inputs)
        programs[program.name] = ProgramSpec(file, inputs, program.outputs)
    return programs


def _check_dtype(fast: OptimizedModel) -> None:
    kinds = [fast.dtype, *(weight.dtype for weight in fast.program.module.parameters())]
    if other := [kind for kind in kinds if kind.is_floating_point and kind not in DTYPES]:
        raise UnsupportedGraphError(
            f"the model computes in {str(other[0]).removeprefix('torch.')}, which ONNX Runtime has few kernels for",
            hint="Convert it first: model.half() or model.float(), or --dtype float16 on the command line",
        )


def to_onnx(program: ExportableProgram, progress: Callable[[str], None]) -> ir.Model:
    """A program as an ONNX model; its weights are still the tensors of torch.

    Raises:
        UnsupportedGraphError: an operator has no form in standard operators.
        MissingPackageError: onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "ONNX export needs onnxscript: pip install 'lethe-compile[onnx]'", "onnxscript"
        ) from error

    def translated(name: str, module: nn.Module, examples: Sequence[Tensor], dynamic: Sequence[set[int]]) -> ir.Model:
        progress(f"{name}: tracing")
        return _translate(name, module, examples, dynamic)

    if isinstance(program.module, fx.GraphModule):
        model = assemble(program, translated)
    else:
        dynamic = [set(operand.dynamic) for operand in program.inputs]
        model = translated(program.name, program.module, program.examples(), dynamic)
    _sign(model, program)
    return model


def _translate(name: str, module: nn.Module, examples: Sequence[Tensor], dynamic: Sequence[set[int]]) -> ir.Model:
    """A module as an ONNX model by torch's exporter, without the names of files and lines that it leaves."""
    program = trace(name, module, examples, dynamic)
    try:
        with _quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnsupportedGraphError(f"{name} cannot be written in standard operators: {_root_of(error)}") from error
    assert exported is not None, "only with a file does it return nothing"
    model = exported.model
    for holder in (model, model.graph, *model.graph, *_values(model.graph)):
        holder.metadata_props.clear()
        if hasattr(holder, "doc_string"):
            holder.doc_string = None
    return model


def _root_of(error: BaseException) -> str:
    """The first line of the error that the others came from: it names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages that nobody asked for, and warns of its own use of torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _sign(model: ir.Model, program: ExportableProgram) -> None:
    """Give the model the inputs, outputs and sizes that the program names; sizes inside are left to runtimes."""
    import onnx_ir as ir

    from lethe_compile import __version__

    model.producer_name, model.producer_version = "lethe-compile", __version__
    graph = model.graph
    graph.name = program.name
    for value in _values(graph):
        if value.shape is not None and not all(isinstance(dim, int) for dim in value.shape):
            value.shape = None
    for value, operand in zip(graph.inputs, program.inputs, strict=True):
        value.name, value.shape = operand.name, ir.Shape(operand.shape)
        value.type = ir.TensorType(ir.tensor_adapters.from_torch_dtype(operand.dtype))
    kinds = {f"{operand.name}_after": operand for operand in program.inputs}
    for value, name in zip(graph.outputs, program.outputs, strict=True):
        value.name = name
        shape: Any = kinds[name].shape if name in kinds else ("rows", None)
        dtype = kinds[name].dtype if name in kinds else torch.float32
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.tensor_adapters.from_torch_dtype(dtype))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


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
        save_graph(model, path)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a model whose large tensors lie in a file already, or that has none."""
    import onnx_ir as ir

    ir.save(model, path)

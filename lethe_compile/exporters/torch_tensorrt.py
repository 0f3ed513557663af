"""Torch-TensorRT: the programs of an artifact as modules that run on TensorRT inside of torch.

`lethe::attention` writes into pages, which no TensorRT network can: `passes.contiguous` lowers it to functions of core
aten, which Torch-TensorRT converts itself. `lethe::linears` gets a converter, for programs that still hold it.

Written against the documented API of Torch-TensorRT 2.6 and later (https://docs.pytorch.org/TensorRT), and its
converters (https://docs.pytorch.org/TensorRT/contributors/dynamo_converters.html).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import lethe_compile.kernels.ops  # noqa: F401  (registers the operators that are converted)
from lethe_compile.errors import MissingPackageError
from lethe_compile.exporters.programs import ExportableProgram, prune_program, step_program
from lethe_compile.exporters.tensorrt_build import EngineOptions, shapes
from lethe_compile.runtime import OptimizedModel

Compiled = Callable[..., Sequence[Tensor]]


def compile_programs(
    fast: OptimizedModel, options: EngineOptions | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Compiled]:
    """The programs of `fast`, "step" and where there are rounds "prune", compiled by Torch-TensorRT.

    Each takes and returns what `exporters.programs` says of it, in that order: caches are contiguous, given and
    returned. Sizes are bound by the `options`.

    Raises:
        UnsupportedGraphError: something in the model has no contiguous form; names it.
        MissingPackageError: torch_tensorrt is not installed.
    """
    torch_tensorrt = _import()
    register_converters()
    options, say = options or EngineOptions(), progress or (lambda _: None)
    settings: dict[str, Any] = {"use_explicit_typing": True, "truncate_double": True, "min_block_size": 1}
    if options.workspace is not None:
        settings["workspace_size"] = options.workspace
    if options.timing_cache is not None:
        settings["timing_cache_path"] = str(options.timing_cache)
    compiled = {}
    for program in (step_program(fast), prune_program(fast)):
        if program is None:
            continue
        say(f"{program.name}: tracing")
        exported = program.trace()
        say(f"{program.name}: compiling by Torch-TensorRT")
        inputs = _inputs(torch_tensorrt, program, options)
        compiled[program.name] = torch_tensorrt.dynamo.compile(exported, arg_inputs=inputs, **settings)
    return compiled


def _import() -> Any:
    try:
        import torch_tensorrt
    except ImportError as error:
        raise MissingPackageError(
            "the Python package 'torch_tensorrt' is not installed: pip install torch-tensorrt", "torch_tensorrt"
        ) from error
    return torch_tensorrt


def _inputs(torch_tensorrt: Any, program: ExportableProgram, options: EngineOptions) -> list[Any]:
    """What Torch-TensorRT wants to know of a program's inputs: a decode step is a prefill of one token here."""
    sizes, described = options.profiles(program.name)[-1], []
    for operand in program.inputs:
        low, best, high = shapes(operand, sizes)
        if operand.dynamic:
            bounds = {"min_shape": low, "opt_shape": best, "max_shape": high}
            described.append(torch_tensorrt.Input(**bounds, dtype=operand.dtype, name=operand.name))
        else:
            described.append(torch_tensorrt.Input(shape=best, dtype=operand.dtype, name=operand.name))
    return described


@cache
def register_converters() -> None:
    """Make our operators known to Torch-TensorRT; once, since its registry appends.

    Raises:
        MissingPackageError: torch_tensorrt is not installed.
    """
    _import()
    import tensorrt
    from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

    @dynamo_tensorrt_converter(torch.ops.lethe.linears.default, supports_dynamic_shapes=True)  # type: ignore[untyped-decorator]
    def linears(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        """`lethe::linears(x, weights, biases)`: a product with each weight, side by side."""
        x, weights, biases = args
        x = get_trt_tensor(ctx, x, f"{name}_x")
        rank, results = len(x.shape), []
        for index, weight in enumerate(weights):
            right = _of_rank(ctx, get_trt_tensor(ctx, weight, f"{name}_weight_{index}"), rank)
            none, transpose = tensorrt.MatrixOperation.NONE, tensorrt.MatrixOperation.TRANSPOSE
            result = ctx.net.add_matrix_multiply(x, none, right, transpose).get_output(0)
            if biases:
                bias = _of_rank(ctx, get_trt_tensor(ctx, biases[index], f"{name}_bias_{index}"), rank)
                result = ctx.net.add_elementwise(result, bias, tensorrt.ElementWiseOperation.SUM).get_output(0)
            results.append(result)
        joined = ctx.net.add_concatenation(results)
        joined.axis, joined.name = rank - 1, name
        return joined.get_output(0)


def _of_rank(ctx: Any, tensor: Any, rank: int) -> Any:
    """A network's tensor with dimensions of size 1 in front: TensorRT broadcasts between equal ranks alone."""
    shape = tuple(tensor.shape)
    if len(shape) == rank:
        return tensor
    layer = ctx.net.add_shuffle(tensor)
    layer.reshape_dims = (1,) * (rank - len(shape)) + shape
    return layer.get_output(0)

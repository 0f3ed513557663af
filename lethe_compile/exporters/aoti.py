"""AOTInductor: programs compiled ahead of time, C++ on a CPU, our Triton kernels on a GPU; weights once, outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lethe_compile.artifact.aoti_cuda import WEIGHTS
from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.errors import LetheError, MissingPackageError, UnsupportedGraphError
from lethe_compile.exporters.programs import (
    ExportableProgram,
    kernel_step_program,
    prune_program,
    step_program,
)
from lethe_compile.exporters.toolchain import check_compiler
from lethe_compile.passes.kernel_step import MOST_ROWS
from lethe_compile.runtime import OptimizedModel

_OUTSIDE = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
_ON_CPU = {**_OUTSIDE, "aot_inductor.package_constants_on_disk_format": "binary_blob"}
# On a GPU programs share what their runner hands them: the compiler returns it in place of a file.
_ON_CUDA = {**_OUTSIDE, "aot_inductor.package_constants_on_disk_format": "pickle_weights"}


def write_aoti(
    fast: OptimizedModel, directory: Path, progress: Callable[[str], None], *, most_rows: int = MOST_ROWS
) -> dict[str, ProgramSpec]:
    """Write ``step.pt2`` and ``prune.pt2``, packages that need none of our ops.

    On a CPU they work over contiguous caches, as `passes.contiguous` has them. On a GPU our Triton kernels are inside,
    over pages that they write in place, as `passes.kernel_step` has them; there is a ``decode.pt2`` for single tokens
    of at most `most_rows` sequences.

    Raises:
        UnsupportedGraphError: something in the model cannot be exported; names it.
        MissingPackageError: there is no C++ compiler, or for a GPU no Triton.
        LetheError: the compiler makes no packages that torch could load, or failed.
    """
    check_compiler()
    if fast.device.type == "cuda":
        return _write_kernels(fast, directory, progress, most_rows)
    programs = {}
    for program in (step_program(fast), prune_program(fast)):
        if program is not None:
            programs[program.name], _ = _compile(program, directory, _ON_CPU, progress)
    return programs


def kernel_programs(fast: OptimizedModel, most_rows: int = MOST_ROWS) -> list[ExportableProgram]:
    """The programs of a GPU's artifact.

    Raises:
        UnsupportedGraphError: something in the model cannot be exported; names it.
        MissingPackageError: Triton is not installed.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("export to a GPU needs Triton: pip install triton", "triton") from error
    if fast.dtype == torch.float64:
        raise UnsupportedGraphError(
            "the kernels do not compute in float64", hint="Convert it first: model.float() or model.bfloat16()"
        )
    steps = [kernel_step_program(fast, name, most_rows) for name in ("step", "decode")]
    programs = [*steps, prune_program(fast, pages=True)]
    return [program for program in programs if program is not None]


def _write_kernels(
    fast: OptimizedModel, directory: Path, progress: Callable[[str], None], most_rows: int
) -> dict[str, ProgramSpec]:
    """Packages, and one file with the weights of all: what a program made for itself bears its name."""
    from safetensors.torch import save_file

    shared = fast.program.module.state_dict()
    _refuse_strides(shared)
    specs: dict[str, ProgramSpec] = {}
    weights: dict[str, Tensor] = {}
    for program in kernel_programs(fast, most_rows):
        specs[program.name], constants = _compile(program, directory, _ON_CUDA, progress)
        _refuse_strides(constants)
        weights.update({name if name in shared else f"{program.name}:{name}": t for name, t in constants.items()})
    progress(f"writing {WEIGHTS}")
    save_file({name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}, directory / WEIGHTS)
    return specs


def _refuse_strides(weights: Mapping[str, Tensor]) -> None:
    """A file of weights keeps no strides, and packages are compiled for them."""
    for name, tensor in weights.items():
        if not tensor.is_contiguous():
            raise UnsupportedGraphError(
                f"the weight {name} {list(tensor.shape)} has strides {list(tensor.stride())}",
                hint="Make it contiguous before `optimize`: weight.data = weight.data.contiguous()",
            )


def _compile(
    program: ExportableProgram, directory: Path, config: dict[str, Any], progress: Callable[[str], None]
) -> tuple[ProgramSpec, dict[str, Tensor]]:
    """Write the package; the weights that are not in it, by the names under which it asks for them."""
    from torch._inductor.exc import CppCompileError
    from torch._inductor.package.package import package_aoti

    progress(f"{program.name}: tracing")
    exported = program.trace()
    file = f"{program.name}.pt2"
    progress(f"{program.name}: compiling {file}")
    args, kwargs = exported.example_inputs
    try:
        made: Any = torch._inductor.aot_compile(exported.module(check_guards=False), args, kwargs, options=dict(config))
    except CppCompileError as error:
        lines = str(error).splitlines()
        first = next((line.strip() for line in lines if " error: " in line), lines[0])
        raise LetheError(
            f"{file} was not compiled: {first}. For a GPU, headers and libraries of CUDA are needed: set CUDA_HOME"
        ) from error
    package_aoti(str(directory / file), [one for one in made if isinstance(one, str)])
    weights = {name: tensor for one in made if not isinstance(one, str) for name, (tensor, _) in one.items()}
    names = tuple(operand.name for operand in program.inputs)
    return ProgramSpec(file, names, program.outputs), weights

"""AOTInductor: programs compiled ahead of time, C++ on a CPU, our Triton kernels on a GPU; weights once, outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
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
from lethe_compile.runtime import OptimizedModel

_ON_CPU = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "binary_blob",
}
_LOAD = """
import json, sys, torch
for package in sys.argv[1:]:
    print(json.dumps(torch._inductor.aoti_load_package(package).get_constant_fqns()), flush=True)
"""
_ON_CUDA = {"aot_inductor.package_constants_in_so": False}  # programs share what their runner hands them


def write_aoti(fast: OptimizedModel, directory: Path, progress: Callable[[str], None]) -> dict[str, ProgramSpec]:
    """Write ``step.pt2`` and ``prune.pt2``, packages that need none of our ops.

    On a CPU they work over contiguous caches, as `passes.contiguous` has them. On a GPU our Triton kernels are inside,
    over pages that they write in place, as `passes.kernel_step` has them; there is a ``decode.pt2`` for single tokens.

    Raises:
        UnsupportedGraphError: something in the model cannot be exported; names it.
        MissingPackageError: there is no C++ compiler, or for a GPU no Triton.
        LetheError: the compiler makes no packages that torch could load, or failed.
    """
    check_compiler()
    if fast.device.type == "cuda":
        return _write_kernels(fast, directory, progress)
    programs = {}
    for program in (step_program(fast), prune_program(fast)):
        if program is not None:
            programs[program.name], _ = _compile(program, directory, _ON_CPU, progress)
    return programs


def kernel_programs(fast: OptimizedModel) -> list[ExportableProgram]:
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
    programs = [kernel_step_program(fast, "step"), kernel_step_program(fast, "decode"), prune_program(fast, pages=True)]
    return [program for program in programs if program is not None]


def _write_kernels(fast: OptimizedModel, directory: Path, progress: Callable[[str], None]) -> dict[str, ProgramSpec]:
    from safetensors.torch import save_file

    programs = kernel_programs(fast)
    compiled = [_compile(program, directory, _ON_CUDA, progress) for program in programs]
    weights: dict[str, Tensor] = {}
    names = _constants_of([directory / spec.file for spec, _ in compiled])
    for program, (_, exported), wanted in zip(programs, compiled, names, strict=True):
        for name in wanted:
            if name in exported.state_dict:
                weights[name] = exported.state_dict[name]
            else:
                weights[f"{program.name}:{name}"] = exported.constants[name]
    progress(f"writing {WEIGHTS}")
    on_host = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(on_host, directory / WEIGHTS)
    return {program.name: spec for program, (spec, _) in zip(programs, compiled, strict=True)}


def _constants_of(packages: Sequence[Path]) -> list[list[str]]:
    """Names of the weights that each asks for, told by a process of its own: one that does not load may crash it.

    Raises:
        LetheError: one does not load; names it.
    """
    command = [sys.executable, "-c", _LOAD, *map(str, packages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told: list[list[str]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or len(told) < len(packages):
        last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
        raise LetheError(
            f"{packages[len(told)].name}, as torch {torch.__version__} compiled it, does not load: the process that"
            f" tried it ended with {done.returncode}: {last[0]}"
        )
    return told


def _compile(
    program: ExportableProgram, directory: Path, config: dict[str, Any], progress: Callable[[str], None]
) -> tuple[ProgramSpec, torch.export.ExportedProgram]:
    from torch._inductor.exc import CppCompileError

    progress(f"{program.name}: tracing")
    exported = program.trace()
    file = f"{program.name}.pt2"
    progress(f"{program.name}: compiling {file}")
    try:
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(directory / file), inductor_configs=dict(config)
        )
    except CppCompileError as error:
        lines = str(error).splitlines()
        first = next((line.strip() for line in lines if " error: " in line), lines[0])
        raise LetheError(
            f"{file} was not compiled: {first}. For a GPU, headers and libraries of CUDA are needed: set CUDA_HOME"
        ) from error
    names = tuple(operand.name for operand in program.inputs)
    return ProgramSpec(file, names, program.outputs), exported

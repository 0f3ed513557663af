"""AOTInductor: both programs compiled ahead of time, C++ on a CPU; weights once, outside of the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.errors import MissingPackageError
from lethe_compile.exporters.programs import prune_program, step_program
from lethe_compile.runtime import OptimizedModel

_CONFIG = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "binary_blob",
}


def write_aoti(fast: OptimizedModel, directory: Path, progress: Callable[[str], None]) -> dict[str, ProgramSpec]:
    """Write ``step.pt2`` and ``prune.pt2``, packages over contiguous caches that need none of our ops.

    Raises:
        UnsupportedGraphError: something in the model cannot be exported; names it.
        MissingPackageError: there is no C++ compiler.
    """
    from torch._inductor.exc import InvalidCxxCompiler

    programs = {}
    for program in (step_program(fast), prune_program(fast)):
        if program is None:
            continue
        progress(f"{program.name}: tracing")
        exported = program.trace()
        file = f"{program.name}.pt2"
        progress(f"{program.name}: compiling {file}")
        try:
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(directory / file), inductor_configs=_CONFIG
            )
        except InvalidCxxCompiler as error:
            raise MissingPackageError("AOTInductor needs a C++ compiler, such as g++: install one", "g++") from error
        names = tuple(operand.name for operand in program.inputs)
        programs[program.name] = ProgramSpec(file, names, program.outputs)
    return programs

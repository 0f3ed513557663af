"""pt2: the optimized program as `torch.export.save` writes it, with our ops inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.exporters.programs import paged_step_program, prune_program
from lethe_compile.runtime import OptimizedModel


def write_pt2(fast: OptimizedModel, directory: Path, progress: Callable[[str], None]) -> dict[str, ProgramSpec]:
    """Write ``step.pt2``, over pages, and ``prune.pt2``, over contiguous caches.

    Raises:
        UnsupportedGraphError: something in the model cannot be exported; names it.
    """
    programs = {}
    for program in (paged_step_program(fast), prune_program(fast)):
        if program is None:
            continue
        progress(f"{program.name}: tracing")
        exported = program.trace()
        exported.example_inputs = None  # examples are no part of the program
        file = f"{program.name}.pt2"
        progress(f"{program.name}: writing {file}")
        torch.export.save(exported, directory / file)
        names = tuple(operand.name for operand in program.inputs)
        programs[program.name] = ProgramSpec(file, names, program.outputs)
    return programs

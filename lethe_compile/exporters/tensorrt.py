"""TensorRT: the ONNX artifact within the parser's limits, checked operator by operator, and how engines are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.errors import MissingPackageError, UnsupportedGraphError
from lethe_compile.exporters.onnx import write_onnx
from lethe_compile.exporters.programs import ExportableProgram, Operand, prune_program, step_program
from lethe_compile.exporters.tensorrt_limits import LATEST, violations
from lethe_compile.exporters.tensorrt_rewrite import within_limits
from lethe_compile.runtime import OptimizedModel

_SHOWN = 20  # violations that an error lists


@dataclass(frozen=True)
class Bounds:
    """Sizes that engines are built for: the smallest, that to be fastest at, and the largest of each."""

    rows: tuple[int, int, int] = (1, 8, 16)
    tokens: tuple[int, int, int] = (1, 256, 1024)  # of a prefill; a decode step has one
    capacity: tuple[int, int, int] = (32, 1024, 8192)

    def profiles(self) -> tuple[Mapping[str, tuple[int, int, int]], ...]:
        """Optimisation profiles: decode first, then prefill, whose caches have room for its tokens."""
        decode = {"rows": self.rows, "tokens": (1, 1, 1), "capacity": self.capacity}
        return decode, {**decode, "tokens": self.tokens}


def write_tensorrt(fast: OptimizedModel, directory: Path, progress: Callable[[str], None]) -> dict[str, ProgramSpec]:
    """Write ONNX that TensorRT's parser takes.

    Raises:
        UnsupportedGraphError: the parser would refuse it; names every violation.
    """
    import onnx_ir as ir

    from lethe_compile.exporters.onnx import save_graph

    programs = write_onnx(fast, directory, progress)
    for name, program in programs.items():
        progress(f"{name}: bringing it within TensorRT's limits")
        path = directory / program.file
        model = ir.load(path)
        within_limits(model)
        refuse_violations(model, name)
        save_graph(model, path)
    return programs


def refuse_violations(model: object, name: str, version: str = LATEST) -> None:
    """Raise `UnsupportedGraphError` naming all that TensorRT's parser would refuse."""
    found = violations(model, version)  # type: ignore[arg-type]
    if found:
        listed = "; ".join(map(str, found[:_SHOWN])) + (f"; and {len(found) - _SHOWN} more" if found[_SHOWN:] else "")
        raise UnsupportedGraphError(f"TensorRT {version} cannot take {name}.onnx: {listed}")


def tell_how_to_build(
    fast: OptimizedModel, directory: Path, progress: Callable[[str], None], bounds: Bounds | None = None
) -> None:
    """Say how the engines of an artifact are built that has been written: nothing here builds them yet.

    Raises:
        MissingPackageError: tensorrt is not installed; names the ONNX files and the commands that build the engines.
    """
    bounds = bounds or Bounds()
    programs = [program for program in (step_program(fast), prune_program(fast)) if program is not None]
    commands = [trtexec(program, directory, bounds) for program in programs]
    if find_spec("tensorrt") is None:
        files = ", ".join(str(directory / f"{program.name}.onnx") for program in programs)
        raise MissingPackageError(
            f"the Python package 'tensorrt' is not installed, so no engine was built. {files} were written and are"
            f" within the limits of TensorRT {LATEST}. Build the engines with: {' && '.join(commands)}",
            "tensorrt",
        )
    for command in commands:
        progress(f"build the engine with: {command}")


def trtexec(program: ExportableProgram, directory: Path, bounds: Bounds) -> str:
    """The command that builds a program's engine, ``NAME.plan``; of a step with profiles for decode and prefill."""
    profiles = bounds.profiles() if program.name == "step" else bounds.profiles()[:1]
    path = directory / program.name
    parts = [f"trtexec --onnx={path}.onnx --saveEngine={path}.plan --stronglyTyped"]
    for index, sizes in enumerate(profiles):
        if len(profiles) > 1:
            parts.append(f"--profile={index}")
        for kind, at in (("min", 0), ("opt", 1), ("max", 2)):
            dynamic = [operand for operand in program.inputs if operand.dynamic]
            parts.append(f"--{kind}Shapes=" + ",".join(f"{one.name}:{_shape(one, sizes, at)}" for one in dynamic))
    return " ".join(parts)


def _shape(operand: Operand, sizes: Mapping[str, tuple[int, int, int]], at: int) -> str:
    return "x".join(str(dim if isinstance(dim, int) else sizes[dim][at]) for dim in operand.shape)

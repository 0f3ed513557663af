"""TensorRT: the ONNX artifact within the parser's limits, checked operator by operator, and its engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.errors import MissingPackageError, UnsupportedGraphError
from lethe_compile.exporters.onnx import write_onnx
from lethe_compile.exporters.programs import ExportableProgram, prune_program, step_program
from lethe_compile.exporters.tensorrt_build import EngineOptions, build_engine, import_tensorrt, shapes
from lethe_compile.exporters.tensorrt_limits import LATEST, violations
from lethe_compile.exporters.tensorrt_rewrite import within_limits
from lethe_compile.runtime import OptimizedModel

_SHOWN = 20  # violations that an error lists


def write_tensorrt(
    fast: OptimizedModel, directory: Path, progress: Callable[[str], None], options: EngineOptions
) -> dict[str, ProgramSpec]:
    """Write ONNX that TensorRT's parser takes, and where `tensorrt` is installed the engines, ``NAME.plan``.

    Raises:
        UnsupportedGraphError: the parser or the builder refuses it; names every violation.
        MissingPackageError: tensorrt is installed, but too old to build engines.
    """
    import onnx_ir as ir

    from lethe_compile.exporters.onnx import save_graph

    if has_tensorrt():
        import_tensorrt()  # what is too old is refused before any work
    specs = write_onnx(fast, directory, progress)
    for name, spec in specs.items():
        progress(f"{name}: bringing it within TensorRT's limits")
        path = directory / spec.file
        model = ir.load(path)
        within_limits(model)
        refuse_violations(model, name)
        save_graph(model, path)
    if not has_tensorrt():
        return specs
    for program in _programs(fast):
        onnx, plan = (directory / f"{program.name}{suffix}" for suffix in (".onnx", ".plan"))
        progress(f"{program.name}: building {plan.name}")
        build_engine(program, onnx, plan, options, progress)
    return {name: replace(spec, engine=f"{name}.plan") for name, spec in specs.items()}


def has_tensorrt() -> bool:
    return find_spec("tensorrt") is not None


def _programs(fast: OptimizedModel) -> list[ExportableProgram]:
    return [program for program in (step_program(fast), prune_program(fast)) if program is not None]


def refuse_violations(model: object, name: str, version: str = LATEST) -> None:
    """Raise `UnsupportedGraphError` naming all that TensorRT's parser would refuse."""
    found = violations(model, version)  # type: ignore[arg-type]
    if found:
        listed = "; ".join(map(str, found[:_SHOWN])) + (f"; and {len(found) - _SHOWN} more" if found[_SHOWN:] else "")
        raise UnsupportedGraphError(f"TensorRT {version} cannot take {name}.onnx: {listed}")


def tell_how_to_build(fast: OptimizedModel, directory: Path, options: EngineOptions) -> None:
    """Say how the engines of an artifact are built that was written where TensorRT is not.

    Raises:
        MissingPackageError: always; names the package, the ONNX files, and the commands that build the engines.
    """
    programs = _programs(fast)
    commands = [trtexec(program, directory, options) for program in programs]
    files = ", ".join(str(directory / f"{program.name}.onnx") for program in programs)
    raise MissingPackageError(
        f"the Python package 'tensorrt' is not installed, so no engine was built. {files} were written and are"
        f" within the limits of TensorRT {LATEST}. Build the engines with: {' && '.join(commands)}",
        "tensorrt",
    )


def trtexec(program: ExportableProgram, directory: Path, options: EngineOptions) -> str:
    """The command that builds a program's engine, ``NAME.plan``; of a step with profiles for decode and prefill."""
    profiles = options.profiles(program.name)
    path = directory / program.name
    parts = [f"trtexec --onnx={quote(f'{path}.onnx')} --saveEngine={quote(f'{path}.plan')} --stronglyTyped"]
    if options.timing_cache is not None:
        parts.append(f"--timingCacheFile={quote(str(options.timing_cache))}")
    dynamic = [operand for operand in program.inputs if operand.dynamic]
    for index, sizes in enumerate(profiles):
        if len(profiles) > 1:
            parts.append(f"--profile={index}")
        for at, kind in enumerate(("min", "opt", "max")):
            listed = (f"{one.name}:{'x'.join(map(str, shapes(one, sizes)[at]))}" for one in dynamic)
            parts.append(f"--{kind}Shapes={','.join(listed)}")
    return " ".join(parts)

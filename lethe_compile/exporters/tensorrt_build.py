"""TensorRT engines from ONNX: parsed, strongly typed, and built for profiles of sizes, where `tensorrt` is installed.

Written against the Python API that TensorRT 10 and 11 document
(https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethe_compile.errors import ConfigError, MissingPackageError, UnsupportedGraphError
from lethe_compile.exporters.programs import ExportableProgram, Operand

OLDEST = 10  # of TensorRT: int64 and strong types
Sizes = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class EngineOptions:
    """How TensorRT engines are built.

    Attributes:
        rows, tokens, capacity: sizes that engines are built for: the smallest, that to be fastest at, and the largest.
            `tokens` are those of a part of a prompt; a decode step has one.
        timing_cache: file that timings of layers are read from and added to, so that the next build takes less time.
        workspace: bytes that a layer may take for its own use; None: all of the device.

    Raises:
        ConfigError: sizes are not positive, or do not ascend.
    """

    rows: tuple[int, int, int] = (1, 8, 16)
    tokens: tuple[int, int, int] = (1, 256, 1024)
    capacity: tuple[int, int, int] = (32, 1024, 8192)
    timing_cache: Path | None = None
    workspace: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "capacity"):
            sizes = getattr(self, name)
            if len(sizes) != 3 or sizes[0] < 1 or list(sizes) != sorted(sizes):
                raise ConfigError(
                    f"{name}={sizes} is not allowed: must be three sizes that ascend from at least 1, such as 1,8,16"
                )
        if self.workspace is not None and self.workspace < 1:
            raise ConfigError(f"workspace={self.workspace} is not allowed: must be None or a number of bytes >= 1")

    def profiles(self, program: str) -> tuple[Sizes, ...]:
        """Optimisation profiles of a program: of a step decode first, then prefill."""
        decode = {"rows": self.rows, "tokens": (1, 1, 1), "capacity": self.capacity}
        return (decode, {**decode, "tokens": self.tokens}) if program == "step" else (decode,)


def shapes(operand: Operand, sizes: Sizes) -> tuple[tuple[int, ...], ...]:
    """Smallest, best and largest shape of an input under a profile."""
    return tuple(tuple(dim if isinstance(dim, int) else sizes[dim][at] for dim in operand.shape) for at in range(3))


def build_engine(
    program: ExportableProgram, onnx: Path, plan: Path, options: EngineOptions, progress: Callable[[str], None]
) -> None:
    """Build the engine of a program from its ONNX file, and write it to `plan`.

    Raises:
        MissingPackageError: tensorrt is not installed, or too old.
        UnsupportedGraphError: TensorRT does not take the program; names every error of its parser or builder.
        KeyboardInterrupt: the build was interrupted; TensorRT has ended it in order.
    """
    trt = import_tensorrt()
    monitor, logger = make_monitor(trt, program.name, progress), make_logger(trt, progress)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):  # from a file: weights lie beside it
        found = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise UnsupportedGraphError(
            f"TensorRT {trt.__version__} does not take {onnx.name}: {'; '.join(found or logger.errors)}"
        )
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    for sizes in options.profiles(program.name):
        _add_profile(builder, config, program, sizes)
    _use_timings(config, options.timing_cache, progress)
    engine = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if engine is None:
        reasons = "; ".join(logger.errors) or "it does not say why"
        raise UnsupportedGraphError(f"TensorRT {trt.__version__} built no engine of {onnx.name}: {reasons}")
    plan.write_bytes(engine)
    if options.timing_cache is not None:
        options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        options.timing_cache.write_bytes(config.get_timing_cache().serialize())


def import_tensorrt() -> Any:
    """The package, if it is there and no older than `OLDEST`.

    Raises:
        MissingPackageError: it is not.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise MissingPackageError(
            "the Python package 'tensorrt' is not installed: pip install tensorrt", "tensorrt"
        ) from error
    if int(tensorrt.__version__.partition(".")[0]) < OLDEST:
        raise MissingPackageError(
            f"the Python package 'tensorrt' is {tensorrt.__version__}, and engines need {OLDEST}.0 or later: pip"
            " install -U tensorrt",
            "tensorrt",
        )
    return tensorrt


def _add_profile(builder: Any, config: Any, program: ExportableProgram, sizes: Sizes) -> None:
    profile = builder.create_optimization_profile()
    for operand in program.inputs:
        if operand.dynamic:
            profile.set_shape(operand.name, *shapes(operand, sizes))
    if config.add_optimization_profile(profile) < 0:
        raise UnsupportedGraphError(f"TensorRT does not take these sizes for {program.name}: {dict(sizes)}")


def _use_timings(config: Any, file: Path | None, progress: Callable[[str], None]) -> None:
    """Give the builder the timings of earlier builds; those of another device or version are not of use."""
    if file is None:
        return
    known = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        progress(f"{file} holds timings of another device or version of TensorRT: it is written anew")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def make_logger(trt: Any, progress: Callable[[str], None]) -> Any:
    """A logger that collects errors and passes warnings on."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # not super(): bindings of C++ ask for it
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                progress(f"TensorRT warns: {message}")

    return Logger()


def make_monitor(trt: Any, name: str, progress: Callable[[str], None]) -> Any:
    """What TensorRT tells how far a build has come, phase by phase; Ctrl-C ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            try:
                if parent is None:  # phases inside of others come by the hundred
                    progress(f"{name}: {phase}, {steps} steps")
            except KeyboardInterrupt:  # must not reach the library's threads
                self.interrupted = True

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                return not self.interrupted
            except KeyboardInterrupt:
                self.interrupted = True
                return False

        def phase_finish(self, phase: str) -> None:
            return None

    return Monitor()

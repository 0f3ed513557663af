"""The part of TensorRT's documented Python API that we use, strict: what is not documented is not there.

Networks are ONNX files, engines name them with their profiles, and executing one runs ONNX Runtime on the memory that
its bindings point to. Classes have slots, so that no attribute can be set by a wrong name either; methods take their
arguments by the names of TensorRT's documentation.
"""

from __future__ import annotations

import ctypes
import enum
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

REAL_ONNX_TYPES = {1: "FLOAT", 10: "HALF", 6: "INT32", 7: "INT64", 9: "BOOL"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class ILogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    def __init__(self) -> None:
        pass


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = ILogger.Severity

    def __init__(self, min_severity: Any = ILogger.Severity.WARNING) -> None:
        assert isinstance(min_severity, ILogger.Severity)


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class Recorder:
    """What a test sets, and what it reads."""

    def __init__(self) -> None:
        self.parser_errors: list[str] = []
        self.build_error: str | None = None
        self.mismatched_cache = False
        self.moved_to: Path | None = (
            None  # an artifact's folder got another name: engines hold their weights, ours do not
        )
        self.calls: list[tuple[Any, ...]] = []

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class _Network:
    __slots__ = ("model", "path")

    def __init__(self) -> None:
        self.path: str | None = None
        self.model: Any = None


class _ParserError:
    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


class _Profile:
    __slots__ = ("shapes",)

    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [tuple(min), tuple(opt), tuple(max)]


class _TimingCache:
    __slots__ = ("blob",)

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def serialize(self) -> bytes:
        return self.blob + b"+timed"


def make(recorder: Recorder) -> ModuleType:
    """The module, whose classes tell `recorder` what they are asked."""

    class Config:
        __slots__ = ("_cache", "profiles", "progress_monitor")

        def __init__(self) -> None:
            self.profiles: list[_Profile] = []
            self._cache: _TimingCache | None = None
            self.progress_monitor: Any = None

        def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
            assert isinstance(pool, MemoryPoolType)
            recorder.calls.append(("workspace", pool_size))

        def add_optimization_profile(self, profile: _Profile) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> _TimingCache:
            return _TimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
            recorder.calls.append(("timing cache", cache.blob))
            if recorder.mismatched_cache and cache.blob and not ignore_mismatch:
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> _TimingCache | None:
            return self._cache

    class Builder:
        __slots__ = ("_logger",)

        def __init__(self, logger: ILogger) -> None:
            assert isinstance(logger, ILogger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> _Network:
            recorder.calls.append(("network", flags))
            return _Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> _Profile:
            return _Profile()

        def build_serialized_network(self, network: _Network, config: Config) -> bytes | None:
            monitor = config.progress_monitor
            if monitor is not None:
                assert isinstance(monitor, IProgressMonitor)
                monitor.phase_start("Building", None, 2)
                monitor.phase_start("Timing", "Building", 1)
                if not monitor.step_complete("Building", 0):
                    return None
                monitor.phase_finish("Timing")
                monitor.phase_finish("Building")
            error = recorder.build_error or _wrong_profiles(network, config.profiles)
            if error is not None:
                self._logger.log(ILogger.Severity.ERROR, error)  # type: ignore[attr-defined]
                return None
            self._logger.log(ILogger.Severity.WARNING, "a warning")  # type: ignore[attr-defined]
            self._logger.log(ILogger.Severity.INFO, "not of interest")  # type: ignore[attr-defined]
            profiles = [profile.shapes for profile in config.profiles]
            recorder.calls.append(("built", network.path, profiles))
            return json.dumps({"onnx": network.path, "profiles": profiles}).encode()

    class OnnxParser:
        __slots__ = ("_network",)

        def __init__(self, network: _Network, logger: ILogger) -> None:
            assert isinstance(network, _Network) and isinstance(logger, ILogger)
            self._network = network

        def parse_from_file(self, model: str) -> bool:
            self._network.path, self._network.model = model, onnx.load(model, load_external_data=False)
            return not recorder.parser_errors

        @property
        def num_errors(self) -> int:
            return len(recorder.parser_errors)

        def get_error(self, index: int) -> _ParserError:
            return _ParserError(recorder.parser_errors[index])

    class Runtime:
        __slots__ = ()

        def __init__(self, logger: ILogger) -> None:
            assert isinstance(logger, ILogger)

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            try:
                plan = json.loads(bytes(serialized_engine))
            except ValueError:
                return None
            return Engine(plan)

    class Engine:
        __slots__ = ("_inputs", "_outputs", "_profiles", "_session")

        def __init__(self, plan: dict[str, Any]) -> None:
            path = Path(plan["onnx"])
            path = path if recorder.moved_to is None else recorder.moved_to / path.name
            self._session = onnxruntime.InferenceSession(str(path))
            model = onnx.load(str(path), load_external_data=False).graph
            kinds = {v.name: REAL_ONNX_TYPES[v.type.tensor_type.elem_type] for v in (*model.input, *model.output)}
            self._inputs = {one.name: kinds[one.name] for one in model.input}
            self._outputs = {one.name: kinds[one.name] for one in model.output}
            self._profiles = plan["profiles"]

        @property
        def num_io_tensors(self) -> int:
            return len(self._inputs) + len(self._outputs)

        def get_tensor_name(self, index: int) -> str:
            return [*self._inputs, *self._outputs][index]

        def get_tensor_dtype(self, name: str) -> DataType:
            return DataType[{**self._inputs, **self._outputs}[name]]

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
            return list(self._profiles[profile_index][name])

        def create_execution_context(self) -> Context:
            return Context(self)

    class Context:
        __slots__ = ("_addresses", "_engine", "_profile", "_results", "_shapes")

        def __init__(self, engine: Engine) -> None:
            self._engine, self._profile = engine, 0
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._results: dict[str, Any] = {}

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            recorder.calls.append(("profile", profile_index))
            self._profile = profile_index
            return 0 <= profile_index < len(self._engine._profiles)

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert name in self._engine._inputs
            bounds = self._engine._profiles[self._profile].get(name)
            if bounds is not None and not all(a <= n <= b for a, n, b in zip(bounds[0], shape, bounds[2], strict=True)):
                return False
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert name in self._engine._inputs or name in self._engine._outputs
            self._addresses[name] = memory
            return memory != 0

        def infer_shapes(self) -> list[str]:
            if missing := [name for name in self._engine._inputs if name not in self._shapes]:
                return missing
            feed = {name: self._array(name, kind, self._shapes[name]) for name, kind in self._engine._inputs.items()}
            outputs = list(self._engine._outputs)
            self._results = dict(zip(outputs, self._engine._session.run(outputs, feed), strict=True))
            return []

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self._results[name].shape)

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert isinstance(stream_handle, int)
            for name, kind in self._engine._outputs.items():
                result = self._results[name]
                self._array(name, kind, result.shape)[...] = result
            recorder.calls.append(("executed", stream_handle))
            return True

        def _array(self, name: str, kind: str, shape: tuple[int, ...]) -> Any:
            dtype = np.dtype(NUMPY[kind])
            size = int(np.prod(shape)) * dtype.itemsize
            memory = (ctypes.c_char * size).from_address(self._addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

    class StrictModule(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"TensorRT documents no {name!r}")

    module = StrictModule("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.__dict__.update(
        __version__="10.13.3",
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag,
        MemoryPoolType=MemoryPoolType,
        TensorIOMode=TensorIOMode,
        DataType=DataType,
        ILogger=ILogger,
        Logger=Logger,
        IProgressMonitor=IProgressMonitor,
    )
    return module


def _wrong_profiles(network: _Network, profiles: list[_Profile]) -> str | None:
    """As the builder: every dynamic input needs a shape in every profile, ascending, and equal where it is fixed."""
    for profile in profiles or [_Profile()]:
        for given in network.model.graph.input:
            dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in given.type.tensor_type.shape.dim]
            if -1 not in dims:
                continue
            if given.name not in profile.shapes:
                return f"{given.name} has dynamic dimensions, and a profile gives no shape for it"
            shapes = profile.shapes[given.name]
            for at, dim in enumerate(dims):
                low, best, high = (shape[at] for shape in shapes)
                if not low <= best <= high or (dim != -1 and {low, best, high} != {dim}):
                    return f"{given.name} has wrong bounds in dimension {at}: {shapes}"
    unknown = {name for profile in profiles for name in profile.shapes} - {
        one.name for one in network.model.graph.input
    }
    return f"profiles name {sorted(unknown)}, which the network does not take" if unknown else None

"""Runs an ONNX artifact: ONNX Runtime, NumPy and the manifest are all it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethe_compile.artifact.manifest import Manifest
from lethe_compile.artifact.sampling import Floats, Ints
from lethe_compile.errors import ArtifactError, MissingPackageError

_STEP = 32  # capacities are multiples of it, so that ONNX Runtime meets few distinct shapes


class OnnxRunner:
    """`artifact.Runner` over ONNX Runtime sessions.

    Each program returns new caches, which become the next call's inputs without a copy. Capacity follows the longest
    row from round to round, so what a round evicts is memory given back.

    Args:
        manifest: of an artifact of kind "onnx".
        providers: ONNX Runtime's execution providers, in order of preference; the CPU's by default.
        threads: of ONNX Runtime; all cores by default.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ArtifactError: a program does not take what the manifest says.
    """

    def __init__(
        self, manifest: Manifest, *, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int | None = None
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingPackageError(
                f"{manifest.directory} runs on ONNX Runtime: pip install onnxruntime", "onnxruntime"
            ) from error
        self.manifest, self._runtime = manifest, onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._sessions = {
            name: onnxruntime.InferenceSession(str(manifest.path(program.file)), options, providers=list(providers))
            for name, program in manifest.programs.items()
        }
        for name, session in self._sessions.items():
            self._check(name, session)
        self._dtype = np.dtype(manifest.model["dtype"])
        self.begin(0)

    def _check(self, name: str, session: Any) -> None:
        program = self.manifest.programs[name]
        given = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
        if given != (list(program.inputs), list(program.outputs)):
            raise ArtifactError(f"{self.manifest.path(program.file)} takes {given[0]}, not what the manifest says")

    def begin(self, rows: int) -> None:
        count = len(self.manifest.caches)
        self._rows, self._capacity = rows, 0
        arrays: dict[str, NDArray[Any]] = {
            "position": np.zeros((count, rows, 0), np.int32),
            "mass": np.zeros((count, rows, 0), np.float32),
            "length": np.zeros((count, rows), np.int32),
        }
        for index, cache in enumerate(self.manifest.caches):
            arrays[f"k_{index}"] = np.zeros((rows, cache.kv_heads, 0, cache.k_dim), self._dtype)
            arrays[f"v_{index}"] = np.zeros((rows, cache.kv_heads, 0, cache.v_dim), self._dtype)
        self._arrays: dict[str, NDArray[Any]] = arrays
        self._cache: dict[str, Any] = {name: self._value(array) for name, array in arrays.items()}
        self._state = {
            one.name: self._value(
                np.full((count, rows), np.nan if one.initial is None else one.initial, np.dtype(one.dtype))
            )
            for one in self.manifest.state
        }

    @property
    def lengths(self) -> Ints:
        return np.asarray(self._cache["length"].numpy(), np.int64)

    def reserve(self, tokens: int) -> None:
        capacity = -(-(int(self.lengths.max(initial=0)) + tokens) // _STEP) * _STEP
        if capacity == self._capacity:
            return
        for name, value in self._cache.items():
            if name != "length":
                axis = 2
                self._cache[name] = self._value(_resized(value.numpy(), axis, capacity))
        self._capacity = capacity

    def step(self, ids: Ints, positions: Ints, new_lengths: NDArray[np.int32], decay: float) -> Floats:
        given = {
            "input_ids": ids,
            "positions": positions,
            "new_lengths": new_lengths,
            "decay": np.array([decay], np.float32),
        }
        after = self._run("step", {name: self._value(np.ascontiguousarray(x)) for name, x in given.items()})
        return np.asarray(after["logits"].numpy(), np.float32)

    def prune(self, active: NDArray[np.bool_], prompt_length: Ints, next_position: Ints) -> None:
        given = {"active": active, "prompt_length": prompt_length, "next_position": next_position}
        after = self._run("prune", {name: self._value(np.ascontiguousarray(x)) for name, x in given.items()})
        self._state = {one.name: after[f"{one.name}_after"] for one in self.manifest.state}

    def _run(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """One program; the caches that it returns take the place of those that it was given."""
        program = self.manifest.programs[name]
        known = {**given, **self._state, **self._cache}
        feed = {one: known[one] for one in program.inputs}
        results = self._sessions[name].run_with_ort_values(list(program.outputs), feed)
        after = dict(zip(program.outputs, results, strict=True))
        self._cache = {one: after[f"{one}_after"] for one in self._cache}
        return after

    def _value(self, array: NDArray[Any]) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(array)


def _resized(array: NDArray[Any], axis: int, size: int) -> NDArray[Any]:
    """`array` cut, or filled up with zeros, to `size` along an axis."""
    shape = list(array.shape)
    shape[axis] = size
    resized = np.zeros(shape, array.dtype)
    part = tuple(slice(min(size, n)) if dim == axis else slice(None) for dim, n in enumerate(array.shape))
    resized[part] = array[part]
    return resized

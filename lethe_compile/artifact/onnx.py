"""Runs an ONNX artifact: ONNX Runtime, NumPy and the manifest are all it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethe_compile.artifact.contiguous import ContiguousRunner
from lethe_compile.artifact.manifest import Manifest
from lethe_compile.errors import ArtifactError, MissingPackageError


class OnnxRunner(ContiguousRunner):
    """`artifact.Runner` over ONNX Runtime sessions.

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
        self._runtime = onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._sessions: dict[str, Any] = {}
        for name, program in manifest.programs.items():
            path = manifest.path(program.file)
            session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
            given = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
            if given != (list(program.inputs), list(program.outputs)):
                raise ArtifactError(f"{path} takes and returns {given}, which is not what the manifest says")
            self._sessions[name] = session
        super().__init__(manifest)

    def _full(self, shape: Sequence[int], dtype: str, value: float) -> Any:
        return self._given(np.full(shape, value, np.dtype(dtype)))

    def _given(self, array: NDArray[Any]) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(array)

    def _read(self, tensor: Any) -> NDArray[Any]:
        array: NDArray[Any] = tensor.numpy()
        return array

    def _resized(self, tensor: Any, size: int) -> Any:
        array = self._read(tensor)
        resized = np.zeros((*array.shape[:2], size, *array.shape[3:]), array.dtype)
        kept = min(size, array.shape[2])
        resized[:, :, :kept] = array[:, :, :kept]
        return self._given(resized)

    def _call(self, name: str, inputs: Mapping[str, Any]) -> Sequence[Any]:
        outputs = list(self.manifest.programs[name].outputs)
        results: Sequence[Any] = self._sessions[name].run_with_ort_values(outputs, dict(inputs))
        return results

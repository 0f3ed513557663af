"""Runs the engines of a TensorRT artifact: tensorrt, torch for memory on the device, and NumPy are all it takes.

Written against the Python API that TensorRT 10 and 11 document
(https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lethe_compile.artifact.manifest import Manifest, ProgramSpec
from lethe_compile.artifact.torch_device import check_device
from lethe_compile.artifact.torch_tensors import TorchRunner
from lethe_compile.errors import ArtifactError, InputError, MissingPackageError


class TensorRTRunner(TorchRunner):
    """`artifact.Runner` over engines; bindings go by name, and stay on the device between calls.

    Raises:
        MissingPackageError: tensorrt is not installed.
        ArtifactError: made for another device or version of TensorRT, or an engine does not take what the manifest
            says.
        InputError: more rows, tokens or capacity than the engines were built for; says which.
    """

    def __init__(self, manifest: Manifest) -> None:
        try:
            import tensorrt
        except ImportError as error:
            raise MissingPackageError(
                f"{manifest.directory} runs on TensorRT: pip install tensorrt", "tensorrt"
            ) from error
        device = check_device(manifest)
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engines = {
            name: _Engine(tensorrt, self._runtime, manifest, name, program)
            for name, program in manifest.programs.items()
        }
        super().__init__(manifest, device)

    def _call(self, name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return self._engines[name].run(inputs, self._device)


class _Engine:
    """One engine, and an execution context for each of its profiles."""

    def __init__(self, trt: Any, runtime: Any, manifest: Manifest, name: str, program: ProgramSpec) -> None:
        assert program.engine is not None, "an artifact without engines is run by ONNX Runtime"
        self.path, self.program, self._trt = manifest.path(program.engine), program, trt
        self.engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
        if self.engine is None:
            made = manifest.versions.get("tensorrt", "another version")
            raise ArtifactError(
                f"{self.path} was built with TensorRT {made}, and TensorRT {trt.__version__} here does not load it:"
                " export again on this machine"
            )
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        if sorted(names) != sorted((*program.inputs, *program.outputs)):
            raise ArtifactError(f"{self.path} takes and returns {sorted(names)}, which is not what the manifest says")
        self._dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.INT32: torch.int32,
            trt.DataType.INT64: torch.int64,
            trt.DataType.BOOL: torch.bool,
        }
        self._contexts: dict[int, Any] = {}

    def run(self, inputs: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
        """Outputs in the program's order."""
        stream = current_stream(device)
        profile = self._profile(inputs)
        context = self._context(profile, stream)
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                low, _, high = self.engine.get_tensor_profile_shape(name, profile)
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}, and {self.path.name} was built for {tuple(low)} to"
                    f" {tuple(high)}: export with larger --rows, --tokens or --capacity"
                )
            _check(context.set_tensor_address(name, tensor.data_ptr()), f"{self.path}: no address for {name}")
        if missing := context.infer_shapes():
            raise ArtifactError(f"{self.path} does not say how large its outputs are without {', '.join(missing)}")
        outputs = []
        for name in self.program.outputs:
            dtype = self._dtypes[self.engine.get_tensor_dtype(name)]
            outputs.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=device))
            _check(context.set_tensor_address(name, outputs[-1].data_ptr()), f"{self.path}: no address for {name}")
        _check(context.execute_async_v3(stream), f"{self.path} was not run: TensorRT's log says why")
        return outputs

    def _profile(self, inputs: Mapping[str, Tensor]) -> int:
        """The profile of decode for one token, that of prefill for more."""
        ids = inputs.get("input_ids")
        return 0 if ids is None or ids.shape[1] == 1 else 1

    def _context(self, profile: int, stream: int) -> Any:
        if profile not in self._contexts:
            context = self.engine.create_execution_context()
            if context is None:
                raise ArtifactError(f"{self.path}: there is not enough memory on the device to run it")
            _check(context.set_optimization_profile_async(profile, stream), f"{self.path} has no profile {profile}")
            self._contexts[profile] = context
        return self._contexts[profile]


def current_stream(device: torch.device) -> int:
    """Handle of the CUDA stream that torch works on."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def _check(done: bool, message: str) -> None:
    if not done:
        raise ArtifactError(message)

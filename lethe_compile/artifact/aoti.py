"""Runs an AOTInductor artifact: torch and NumPy are all it takes, neither transformers nor our own ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.artifact.contiguous import ContiguousRunner
from lethe_compile.artifact.manifest import Manifest
from lethe_compile.artifact.torch_device import check_device


class AotiRunner(ContiguousRunner):
    """`artifact.Runner` over packages that AOTInductor compiled.

    Raises:
        ArtifactError: it was made for a device that is not here.
    """

    def __init__(self, manifest: Manifest, *, threads: int | None = None) -> None:
        self._device = check_device(manifest)
        if threads is not None:
            torch.set_num_threads(threads)
        self._packages = {
            name: torch._inductor.aoti_load_package(str(manifest.path(program.file)))
            for name, program in manifest.programs.items()
        }
        super().__init__(manifest)

    def _full(self, shape: Sequence[int], dtype: str, value: float) -> Tensor:
        return torch.full(tuple(shape), value, dtype=getattr(torch, dtype), device=self._device)

    def _given(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _read(self, tensor: Tensor) -> NDArray[Any]:
        return np.asarray(tensor.cpu().numpy())

    def _resized(self, tensor: Tensor, size: int) -> Tensor:
        resized = tensor.new_zeros(*tensor.shape[:2], size, *tensor.shape[3:])
        kept = min(size, tensor.shape[2])
        resized[:, :, :kept] = tensor[:, :, :kept]
        return resized

    def _call(self, name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        results: Sequence[Tensor] = self._packages[name](*inputs.values())
        return results

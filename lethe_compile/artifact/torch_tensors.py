"""Contiguous caches in torch's tensors, for the runners of programs that take these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.artifact.contiguous import ContiguousRunner
from lethe_compile.artifact.manifest import Manifest


class TorchRunner(ContiguousRunner):
    """A `ContiguousRunner` whose tensors are torch's, on one device; a subclass calls the programs."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        self._device = device
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

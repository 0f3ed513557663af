"""Runs an AOTInductor artifact: torch and NumPy are all it takes, neither transformers nor our own ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lethe_compile.artifact.manifest import Manifest
from lethe_compile.artifact.torch_device import check_device
from lethe_compile.artifact.torch_tensors import TorchRunner


class AotiRunner(TorchRunner):
    """`artifact.Runner` over packages that AOTInductor compiled.

    Raises:
        ArtifactError: it was made for a device that is not here.
    """

    def __init__(self, manifest: Manifest, *, threads: int | None = None) -> None:
        device = check_device(manifest)
        if threads is not None:
            torch.set_num_threads(threads)
        self._packages = {
            name: torch._inductor.aoti_load_package(str(manifest.path(program.file)))
            for name, program in manifest.programs.items()
        }
        super().__init__(manifest, device)

    def _call(self, name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        results: Sequence[Tensor] = self._packages[name](*inputs.values())
        return results

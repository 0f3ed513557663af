"""Whether this machine has the device that an artifact of torch's was made for."""

from __future__ import annotations

import torch

from lethe_compile.artifact.manifest import Manifest
from lethe_compile.errors import ArtifactError


def check_device(manifest: Manifest) -> torch.device:
    """The device of an artifact.

    Raises:
        ArtifactError: this machine lacks it, or has another architecture of it.
    """
    made = manifest.device
    if made.type == "cpu":
        return torch.device("cpu")
    if made.type != "cuda" or not torch.cuda.is_available():
        raise ArtifactError(f"{manifest.directory} was made for a {made.type} device, and there is none here")
    here = torch.cuda.get_device_capability()
    if made.capability is not None and here != made.capability:
        raise ArtifactError(
            f"{manifest.directory} was made for compute capability {made.capability[0]}.{made.capability[1]}, and this"
            f" device has {here[0]}.{here[1]}: export again on such a device"
        )
    return torch.device("cuda")

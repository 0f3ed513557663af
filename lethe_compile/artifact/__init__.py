"""Artifacts: directories that `export` writes and `lethe run` executes.

Nothing here imports transformers, and nothing torch but the runners of torch's own formats.

A program that is to run alone needs `manifest`, `loop`, `sampling`, the module of its format, and NumPy.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lethe_compile.artifact.loop import Generation, Runner, generate
from lethe_compile.artifact.manifest import Manifest, load_manifest
from lethe_compile.errors import ArtifactError, MissingPackageError

__all__ = ["Generation", "Manifest", "Runner", "generate", "load_manifest", "open_artifact"]


def open_artifact(directory: str | Path, **options: Any) -> Runner:
    """The runner of an artifact, checked first: its files, their hashes, and the device that it was made for.

    `options` go to the runner of its format, such as `providers` of ONNX Runtime.

    Raises:
        ArtifactError: the directory is no artifact, a newer one, damaged, or made for another device; or a package that
            runs it is missing, which is named.
    """
    manifest = load_manifest(directory)
    if manifest.kind == "tensorrt" and any(program.engine for program in manifest.programs.values()):
        _require("torch", manifest)
        from lethe_compile.artifact.tensorrt import TensorRTRunner

        return TensorRTRunner(manifest, **options)
    if manifest.kind in ("onnx", "tensorrt"):  # as long as no engine was built, ONNX Runtime takes the latter too
        from lethe_compile.artifact.onnx import OnnxRunner

        return OnnxRunner(manifest, **options)
    if manifest.kind == "pt2":
        _require("torch", manifest)
        from lethe_compile.artifact.pt2 import Pt2Runner

        return Pt2Runner(manifest, **options)
    if manifest.kind == "aoti" and "decode" in manifest.programs:
        _require("torch", manifest)
        from lethe_compile.artifact.aoti_cuda import KernelRunner

        return KernelRunner(manifest, **options)
    if manifest.kind == "aoti":
        _require("torch", manifest)
        from lethe_compile.artifact.aoti import AotiRunner

        return AotiRunner(manifest, **options)
    raise ArtifactError(
        f"{manifest.directory}: an artifact of kind {manifest.kind!r} cannot be run by this version of Lethe Compile"
    )


def _require(package: str, manifest: Manifest) -> None:
    if find_spec(package) is None:
        raise MissingPackageError(f"{manifest.directory} runs on {package}: pip install {package}", package)

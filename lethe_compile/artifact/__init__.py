"""Artifacts: directories that `export` writes and `lethe run` executes. Nothing here imports torch or transformers.

A program that is to run alone needs `manifest`, `loop`, `sampling`, the module of its format, and NumPy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lethe_compile.artifact.loop import Generation, Runner, generate
from lethe_compile.artifact.manifest import Manifest, load_manifest
from lethe_compile.errors import ArtifactError

__all__ = ["Generation", "Manifest", "Runner", "generate", "load_manifest", "open_artifact"]


def open_artifact(directory: str | Path, **options: Any) -> Runner:
    """The runner of an artifact, checked first: its files, their hashes, and the device that it was made for.

    `options` go to the runner of its format, such as `providers` of ONNX Runtime.

    Raises:
        ArtifactError: the directory is no artifact, a newer one, damaged, or made for another device; or a package that
            runs it is missing, which is named.
    """
    manifest = load_manifest(directory)
    if manifest.kind == "onnx":
        from lethe_compile.artifact.onnx import OnnxRunner

        return OnnxRunner(manifest, **options)
    if manifest.kind == "pt2":
        from lethe_compile.exporters.run_pt2 import Pt2Runner

        return Pt2Runner(manifest, **options)
    raise ArtifactError(
        f"{manifest.directory}: an artifact of kind {manifest.kind!r} cannot be run by this version of Lethe Compile"
    )

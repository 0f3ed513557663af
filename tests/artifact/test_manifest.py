"""Manifests: what is written is read back, and whatever is not what was written is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lethe_compile.artifact import open_artifact
from lethe_compile.artifact.manifest import (
    FORMAT,
    CacheSpec,
    Device,
    Manifest,
    ProgramSpec,
    StateSpec,
    load_manifest,
    total_bytes,
    write_manifest,
)
from lethe_compile.errors import ArtifactError


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "kind": "onnx",
        "model": {"vocab_size": 97, "max_positions": None, "dtype": "float32"},
        "caches": (CacheSpec(2, 16, 24, 7, (0, 2)),),
        "policy": {"name": "lethe", "decay": 0.9, "interval": 32, "config": {}},
        "state": (StateSpec("threshold", "int64", 128), StateSpec("sparsity", "float32", None)),
        "programs": {"step": ProgramSpec("step.onnx", ("input_ids",), ("logits",))},
        "generation": {"eos_token_id": [2], "pad_token_id": 0},
        "device": Device("cuda", (9, 0)),
        "versions": {"torch": "2.13.0"},
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    (tmp_path / "step.onnx").write_bytes(b"a program")
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    write_manifest(manifest(), tmp_path)
    return tmp_path


def test_what_is_written_is_read_back(artifact: Path) -> None:
    read = load_manifest(artifact)
    assert {**vars(read), "files": {}, "directory": Path()} == vars(manifest())
    assert set(read.files) == {"step.onnx", "weights.bin"}
    assert total_bytes(read) == 1009 and total_bytes(read, ["step.onnx"]) == 9
    assert read.path("step.onnx") == artifact / "step.onnx"


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "manifest.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return apply


def altered(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(999) + b"!")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is no artifact"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text('{"format":'), "is damaged"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "is no manifest"),
    "newer": (edit(lambda values: values.update(format=FORMAT + 1)), f"format {FORMAT + 1}.*up to {FORMAT}: update"),
    "missing key": (edit(lambda values: values.pop("caches")), "malformed: KeyError: 'caches'"),
    "unknown key": (edit(lambda values: values.update(code="rm")), "malformed: TypeError"),
    "missing file": (lambda folder: (folder / "step.onnx").unlink(), "step.onnx is missing"),
    "truncated": (lambda folder: (folder / "weights.bin").write_bytes(bytes(10)), "truncated: 10 bytes, and 1000"),
    "longer": (lambda folder: (folder / "weights.bin").write_bytes(bytes(2000)), "longer than it was"),
    "altered": (altered, "weights.bin was altered"),
    "outside": (edit(lambda values: values["files"].update({"../x": {}})), "outside of the artifact: '../x'"),
    "absolute": (edit(lambda values: values["files"].update({"/etc/x": {}})), "outside of the artifact"),
    "no hash": (edit(lambda values: values["files"].pop("step.onnx")), "no hash of step.onnx"),
    "unknown kind": (edit(lambda values: values.update(kind="exe")), "kind 'exe' cannot be run"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused(artifact: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(artifact)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact)


@pytest.mark.parametrize("kind", ["pt2", "aoti"])
def test_another_device_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    edit(lambda values: values.update(kind=kind))(artifact)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArtifactError, match="was made for a cuda device, and there is none here"):
        open_artifact(artifact)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ArtifactError, match=r"compute capability 9.0, and this device has 8.0: export again"):
        open_artifact(artifact)


def test_an_engine_without_a_hash_is_refused(artifact: Path) -> None:
    edit(lambda values: values["programs"]["step"].update(engine="step.plan"))(artifact)
    with pytest.raises(ArtifactError, match=r"no hash of step\.plan"):
        open_artifact(artifact)

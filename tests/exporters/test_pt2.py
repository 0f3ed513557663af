"""pt2: the program with our ops inside, loaded and run by torch."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lethe_compile.artifact.manifest import load_manifest
from lethe_compile.artifact.pt2 import refuse_pickles
from lethe_compile.errors import ArtifactError
from lethe_compile.models.tiny import tiny
from tests.exporters.onnx_case import check_equal, optimized

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pt2") / "llama"
    check_equal(optimized(tiny("llama")), folder, format="pt2")
    return folder


def test_a_fresh_process_loads_it_after_importing_us(artifact: Path) -> None:
    code = (
        "import sys, torch, lethe_compile.kernels.ops\n"
        f"program = torch.export.load({str(artifact / 'step.pt2')!r})\n"
        "targets = {str(node.target) for node in program.graph.nodes}\n"
        "assert 'lethe.attention.default' in targets, targets\n"
        "assert 'transformers' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_weights_are_written_once_and_are_no_pickle(artifact: Path) -> None:
    with zipfile.ZipFile(artifact / "step.pt2") as archive:
        weights = [info for info in archive.infolist() if "/weights/weight_" in info.filename]
        assert sum(info.file_size for info in weights) < 1.1 * 4 * load_manifest(artifact).model["parameters"]
        assert all(archive.read(info)[:2] not in (b"PK", b"\x80\x02") for info in weights)


class Bomb:
    def __reduce__(self) -> Any:
        return Path.write_text, (Path("bomb"), "exploded")


def replaced(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of an archive, its entries changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def planted(name: str, data: bytes) -> bytes:
    if "/sample_inputs/" not in name:
        return data
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    return buffer.getvalue()


def flagged(name: str, data: bytes) -> bytes:
    return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("weights_config.json") else data


@pytest.mark.parametrize("change", [planted, flagged])
def test_a_program_with_pickled_objects_is_not_loaded(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str, bytes], bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_pickles(artifact / "step.pt2")
    with pytest.raises(ArtifactError, match="holds pickled objects, which may run any code"):
        refuse_pickles(replaced(artifact / "step.pt2", tmp_path / "step.pt2", change))
    assert not (tmp_path / "bomb").exists()

"""`export`: what it refuses, and that nothing half-made is left behind."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.exc import CppCompileError

import lethe_compile as lethe
from lethe_compile import exporters
from lethe_compile.artifact.manifest import ProgramSpec, load_manifest
from lethe_compile.errors import (
    ArtifactError,
    ConfigError,
    InputError,
    LetheError,
    MissingPackageError,
    UnsupportedGraphError,
)
from lethe_compile.exporters import aoti
from lethe_compile.exporters.programs import ExportableProgram, Operand
from lethe_compile.exporters.toolchain import check_compiler
from lethe_compile.models import reasoner
from lethe_compile.models.architectures import build
from lethe_compile.models.tiny import tiny
from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools import export as tool
from tests.exporters.onnx_case import optimized

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return optimized(tiny("llama"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing takes no time: one small file."""

    def write(fast: OptimizedModel, directory: Path, progress: Any) -> dict[str, ProgramSpec]:
        (directory / "step.onnx").write_bytes(b"program")
        return {"step": ProgramSpec("step.onnx", (), ())}

    monkeypatch.setattr(exporters, "_writer", lambda *options: write)


@pytest.mark.usefixtures("quick")
def test_an_artifact_is_written_and_replaced(fast: OptimizedModel, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "artifact"
    manifest = lethe.export(fast, folder, format="onnx")
    assert manifest == load_manifest(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]
    (folder / "left over").write_text("x")
    with pytest.raises(ConfigError, match="exists: choose another directory"):
        lethe.export(fast, folder, format="onnx")
    lethe.export(fast, folder, format="onnx", overwrite=True)
    assert not (folder / "left over").exists()


def test_only_kernels_of_a_gpu_limit_the_batch(fast: OptimizedModel, tmp_path: Path) -> None:
    for format in ("aoti", "onnx"):
        with pytest.raises(ConfigError, match=rf"format='{format}' of a model on cpu takes any number of sequences"):
            lethe.export(fast, tmp_path / "x", format=format, max_batch=8)


@pytest.mark.usefixtures("quick")
def test_what_is_no_artifact_is_not_overwritten(fast: OptimizedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is no artifact, and is not overwritten"):
        lethe.export(fast, tmp_path, format="onnx", overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, UnsupportedGraphError("no")])
def test_an_export_that_breaks_off_leaves_nothing(
    fast: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def write(fast: OptimizedModel, directory: Path, progress: Any) -> dict[str, ProgramSpec]:
        (directory / "weights.bin").write_bytes(b"half")
        raise error

    monkeypatch.setattr(exporters, "_writer", lambda *options: write)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        lethe.export(fast, tmp_path / "artifact", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused(fast: OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format='gguf' is not allowed: must be one of aoti, pt2, onnx, tensorrt"):
        lethe.export(fast, tmp_path / "x", format="gguf")


@pytest.mark.usefixtures("quick")
def test_a_tokenizer_joins_if_it_belongs_to_the_model(fast: OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"does not belong to this model: it has ids up to \d+, and the model knows 97"
    ):
        lethe.export(fast, tmp_path / "x", format="onnx", tokenizer=reasoner.path())
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        lethe.export(fast, tmp_path / "x", format="onnx", tokenizer=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jamba", "recurrent state cannot be exported: model.layers"),
        pytest.param(
            "doge", "masks that depend on the content of the sequence cannot be exported", marks=pytest.mark.slow
        ),
    ],
)
def test_what_no_format_carries_is_refused_before_work_begins(name: str, message: str, tmp_path: Path) -> None:
    fast = lethe.optimize(build(name), verified=False)
    with pytest.raises(UnsupportedGraphError, match=message):
        lethe.export(fast, tmp_path / "x", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_frequencies_that_change_with_length_are_refused(
    fast: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "restart_at", 64)
    with pytest.raises(UnsupportedGraphError, match="rotary frequencies change after 64 tokens"):
        lethe.export(fast, tmp_path / "x", format="onnx")


def test_a_dtype_that_onnx_runtime_lacks_is_refused(tmp_path: Path) -> None:
    fast = lethe.optimize(tiny("llama").to(torch.bfloat16), verified=False)
    with pytest.raises(UnsupportedGraphError, match=r"computes in bfloat16.*--dtype float16"):
        lethe.export(fast, tmp_path / "x", format="onnx")


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--set", "max_tokens"], InputError, "must be NAME=VALUE"),
        (["--set", "max_token=9"], ConfigError, "the nearest is 'max_tokens'"),
        (["--config", "nowhere.json"], InputError, "nowhere.json cannot be read: No such file"),
    ],
)
def test_bad_settings_are_refused(flags: list[str], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        tool.main(["reasoner", "--format", "onnx", "--out", str(tmp_path / "x"), *flags])


def test_what_the_compiler_said_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*args: Any, **options: Any) -> None:
        raise CppCompileError(["g++"], "x.cpp:1:10: fatal error: cuda.h: No such file or directory")

    monkeypatch.setattr(torch._inductor, "aot_compile", compile)
    program = ExportableProgram("step", torch.nn.Identity(), (Operand("x", (2,), torch.float32),), ("y",), CPU)
    message = r"step\.pt2 was not compiled: .*cuda\.h: No such file or directory.*set CUDA_HOME"
    with pytest.raises(LetheError, match=message):
        aoti._compile(program, tmp_path, {}, lambda text: None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", None),
        ("-static-libstdc++", r"links the C\+\+ standard library statically, .* crash in torch"),
        ("-no-such-option", r"does not make a shared library: .*no-such-option"),
    ],
)
def test_the_compiler_is_tried_first(options: str, message: str | None, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} {options} "$@"\n')
    compiler.chmod(0o755)
    refused = contextlib.nullcontext() if message is None else pytest.raises(LetheError, match=message)
    with torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}), refused:
        check_compiler()


def test_no_compiler() -> None:
    refused = pytest.raises(MissingPackageError, match=r"needs a C\+\+ compiler, such as g\+\+")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), refused:
        check_compiler()


def test_weights_with_strides_are_refused() -> None:
    model = tiny("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(UnsupportedGraphError, match=r"layers\.1\.mlp\.up_proj\.weight \[\d+, \d+\] has strides"):
        aoti._refuse_strides(lethe.optimize(model, verified=False).program.module.state_dict())

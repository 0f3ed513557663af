"""TensorRT's engines, built and run through a strict fake of its documented API: everything up to the library call."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from lethe_compile import exporters
from lethe_compile.artifact import generate, open_artifact
from lethe_compile.artifact import tensorrt as runner_module
from lethe_compile.artifact.manifest import Device, Manifest, ProgramSpec, load_manifest
from lethe_compile.artifact.tensorrt import TensorRTRunner
from lethe_compile.errors import ArtifactError, ConfigError, InputError, MissingPackageError, UnsupportedGraphError
from lethe_compile.exporters import export, tensorrt
from lethe_compile.exporters.programs import ExportableProgram, Operand
from lethe_compile.exporters.tensorrt_build import EngineOptions, build_engine
from lethe_compile.models.tiny import tiny
from lethe_compile.tools import export as tool
from tests.artifact.test_manifest import manifest as a_manifest
from tests.exporters.fake_tensorrt import Recorder, make
from tests.exporters.onnx_case import generated, optimized, ragged

OPTIONS = EngineOptions(rows=(1, 2, 4), tokens=(1, 8, 64), capacity=(32, 64, 256))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """TensorRT is installed, and a GPU is here."""
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "tensorrt", make(recorder))
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: object())
    monkeypatch.setattr(exporters, "_gpu", lambda device: Device("cuda", (9, 0)))
    monkeypatch.setattr(runner_module, "check_device", lambda manifest: torch.device("cpu"))
    monkeypatch.setattr(runner_module, "current_stream", lambda device: 7)
    return recorder


PROGRAM = ExportableProgram(
    "step",
    nn.Identity(),
    (
        Operand("input_ids", ("rows", "tokens"), torch.int64),
        Operand("k_0", ("rows", 2, "capacity", 4), torch.float32),
        Operand("decay", (1,), torch.float32),
    ),
    ("logits",),
    torch.device("cpu"),
)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A program of `PROGRAM`'s signature: it adds one to the ids, as numbers, and ignores the rest."""
    kinds = (TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT)
    inputs = [
        helper.make_tensor_value_info(operand.name, kind, list(operand.shape))
        for operand, kind in zip(PROGRAM.inputs, kinds, strict=True)
    ]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["numbers", "decay"], ["logits"]),
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", "tokens"])
    graph = helper.make_graph(nodes, "step", inputs, [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "step.onnx"))
    return tmp_path / "step.onnx"


def build(step: Path, options: EngineOptions = OPTIONS, heard: list[str] | None = None) -> Path:
    plan = step.with_suffix(".plan")
    build_engine(PROGRAM, step, plan, options, ([] if heard is None else heard).append)
    return plan


def test_a_network_is_strongly_typed_and_built_for_decode_and_prefill(recorder: Recorder, step: Path) -> None:
    heard: list[str] = []
    plan = build(step, replace(OPTIONS, workspace=1 << 30), heard)
    assert recorder.of("network") == [(2,)]  # 1 << STRONGLY_TYPED
    assert recorder.of("workspace") == [(1 << 30,)]
    ((path, (decode, prefill)),) = recorder.of("built")
    assert path == str(step) and plan.is_file()
    assert decode == {"input_ids": [(1, 1), (2, 1), (4, 1)], "k_0": [(1, 2, 32, 4), (2, 2, 64, 4), (4, 2, 256, 4)]}
    assert prefill == {**decode, "input_ids": [(1, 1), (2, 8), (4, 64)]}
    assert heard == ["step: Building, 2 steps", "TensorRT warns: a warning"]  # neither inner phases nor information


def test_every_error_of_the_parser_is_told(recorder: Recorder, step: Path) -> None:
    recorder.parser_errors = ["In node 3 (parseNode): UNSUPPORTED_NODE: one", "In node 9 (importTopK): INVALID: other"]
    with pytest.raises(
        UnsupportedGraphError, match=r"TensorRT 10\.13\.3 does not take step\.onnx: In node 3.*: one; In node 9"
    ):
        build(step)
    assert not step.with_suffix(".plan").exists()


def test_why_nothing_was_built_is_told(recorder: Recorder, step: Path) -> None:
    recorder.build_error = "out of memory"
    with pytest.raises(UnsupportedGraphError, match=r"built no engine of step\.onnx: out of memory"):
        build(step)


def test_profiles_must_fit_the_network(recorder: Recorder, step: Path) -> None:
    """The fake refuses what the builder does: else the test of profiles could not fail."""
    other = replace(PROGRAM, inputs=PROGRAM.inputs[:1])
    with pytest.raises(UnsupportedGraphError, match="k_0 has dynamic dimensions, and a profile gives no shape"):
        build_engine(other, step, step.with_suffix(".plan"), OPTIONS, print)


def test_timings_are_kept_for_the_next_build(recorder: Recorder, step: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "timings"
    options = replace(OPTIONS, timing_cache=file)
    build(step, options)
    assert file.read_bytes() == b"+timed"
    build(step, options)
    assert recorder.of("timing cache") == [(b"",), (b"+timed",)]
    recorder.mismatched_cache = True
    heard: list[str] = []
    build(step, options, heard)
    assert recorder.of("timing cache")[2:] == [(b"+timed+timed",), (b"",)] and file.read_bytes() == b"+timed"
    assert f"{file} holds timings of another device or version of TensorRT: it is written anew" in heard


def test_ctrl_c_ends_a_build(recorder: Recorder, step: Path) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(PROGRAM, step, step.with_suffix(".plan"), OPTIONS, interrupt)
    assert not step.with_suffix(".plan").exists() and not recorder.of("built")


def test_a_release_too_old_is_refused(recorder: Recorder, step: Path) -> None:
    sys.modules["tensorrt"].__version__ = "8.6.1"  # type: ignore[attr-defined]
    with pytest.raises(MissingPackageError, match=r"'tensorrt' is 8\.6\.1, and engines need 10\.0 or later"):
        build(step)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": (0, 1, 2)}, "rows="),
        ({"tokens": (1, 9, 8)}, "tokens="),
        ({"capacity": (1, 2)}, "capacity="),
        ({"workspace": 0}, "workspace=0"),
    ],
)
def test_sizes_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**given)


def test_only_tensorrt_has_engines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format='onnx' has no engines to be built"):
        export(optimized(tiny("llama")), tmp_path / "x", "onnx", engine=OPTIONS)
    flags = ["--rows", "1,2,4", "--timing-cache", "timings", "--workspace", "2GiB"]
    options = tool._engine(tool._arguments(["reasoner", "--format", "tensorrt", "--out", "x", *flags]))
    assert options == EngineOptions(rows=(1, 2, 4), timing_cache=Path("timings"), workspace=2 << 30)


@pytest.fixture
def engine(recorder: Recorder, step: Path) -> Manifest:
    build(step)
    program = ProgramSpec("step.onnx", ("input_ids", "k_0", "decay"), ("logits",), "step.plan")
    return a_manifest(kind="tensorrt", programs={"step": program}, directory=step.parent, versions={"tensorrt": "10.1"})


def feed(rows: int, tokens: int, capacity: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * tokens).view(rows, tokens)
    return {"input_ids": ids, "k_0": torch.zeros(rows, 2, capacity, 4), "decay": torch.ones(1)}


def test_an_engine_runs_on_the_memory_of_its_bindings(recorder: Recorder, engine: Manifest) -> None:
    runner = TensorRTRunner(engine)
    for tokens in (1, 5, 1):
        (logits,) = runner._call("step", feed(3, tokens))
        assert logits.tolist() == (torch.arange(3 * tokens).view(3, tokens) + 1.0).tolist()
    assert recorder.of("profile") == [(0,), (1,)]  # one context each, made once
    assert recorder.of("executed") == [(7,)] * 3


def test_sizes_beyond_the_profiles_are_refused(engine: Manifest) -> None:
    runner = TensorRTRunner(engine)
    with pytest.raises(
        InputError, match=r"input_ids has shape \(5, 1\), and step\.plan was built for \(1, 1\) to \(4, 1\).*--rows"
    ):
        runner._call("step", feed(5, 1))
    with pytest.raises(InputError, match="k_0 has shape"):
        runner._call("step", feed(1, 8, capacity=512))


def test_engines_of_another_release_are_refused(engine: Manifest) -> None:
    (engine.directory / "step.plan").write_bytes(b"other")
    with pytest.raises(
        ArtifactError, match=r"was built with TensorRT 10\.1, and TensorRT 10\.13\.3 here does not load"
    ):
        TensorRTRunner(engine)


def test_bindings_are_those_of_the_manifest(engine: Manifest) -> None:
    program = replace(engine.programs["step"], outputs=("scores",))
    with pytest.raises(ArtifactError, match="which is not what the manifest says"):
        TensorRTRunner(replace(engine, programs={"step": program}))


def test_without_the_package_a_runner_names_it(engine: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match="pip install tensorrt"):
        TensorRTRunner(engine)


@pytest.mark.slow
def test_an_artifact_with_engines_writes_the_tokens_of_the_model(recorder: Recorder, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    fast = optimized(tiny("llama"))
    manifest = export(fast, folder, "tensorrt", engine=OPTIONS)
    assert manifest == load_manifest(folder) and manifest.device == Device("cuda", (9, 0))
    assert {name: program.engine for name, program in manifest.programs.items()} == {
        "step": "step.plan",
        "prune": "prune.plan",
    }
    assert {"step.plan", "prune.plan", "step.onnx", "weights.bin"} <= set(manifest.files)
    recorder.moved_to = folder
    prompts = ragged(fast.vocab_size)
    expected = generated(fast, prompts, 100)
    result = generate(open_artifact(folder), prompts, max_new_tokens=100, eos_token_id=[])
    assert result.new_ids == expected and result.rounds >= 5
    assert result.retained == fast.cache_stats().retained

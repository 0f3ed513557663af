"""The reasoner, written by `lethe export` and run in processes that have neither torch nor transformers."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from lethe_compile import LetheConfig, optimize
from lethe_compile.artifact import generate, open_artifact
from lethe_compile.artifact.manifest import load_manifest
from lethe_compile.artifact.sampling import Sampler
from lethe_compile.errors import ArtifactError, InputError
from lethe_compile.exporters.tensorrt_limits import violations
from lethe_compile.exporters.tensorrt_rewrite import within_limits
from lethe_compile.models import reasoner
from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools import export
from lethe_compile.tools import run as run_tool
from tests.exporters.onnx_case import check_format, generated, lethe_without

pytestmark = pytest.mark.slow  # an export of its size takes most of a minute


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "reasoner"
    start = time.perf_counter()
    assert export.main(["reasoner", "--format", "onnx", "--out", str(folder), "--set", "prune_interval=16"]) == 0
    print(f"exported in {time.perf_counter() - start:.1f} s")
    return folder


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return optimize(reasoner.load_model(), LetheConfig(prune_interval=16), verified=False)


def prompts() -> list[list[int]]:
    problems = reasoner.problems(2, seed=5, min_tokens=1000, max_tokens=1200)
    return [problems.prompt(0), problems.prompt(1)]


def test_a_fresh_process_without_torch_writes_the_same_tokens(
    artifact: Path, fast: OptimizedModel, tmp_path: Path
) -> None:
    given, new, file = prompts(), 300, tmp_path / "result.json"
    flags = [flag for prompt in given for flag in ("--ids", ",".join(map(str, prompt)))]
    arguments = ["run", str(artifact), *flags, "--max-new-tokens", str(new), "--json", str(file)]
    ran = lethe_without(["torch", "transformers"], *arguments)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(file.read_text())
    expected = generated(fast, given, new)
    assert result["ids"] == [prompt + row for prompt, row in zip(given, expected, strict=True)]
    assert result["new_ids"] == expected
    stats = fast.cache_stats()
    assert result["retained"] == stats.retained
    assert result["retained_per_layer"] == np.mean(stats.retained, axis=1).tolist()
    assert result["rounds"] >= 5 and min(result["retained_per_layer"]) < 0.8 * max(map(len, result["ids"]))
    print(f"{artifact}: {sum(f.stat().st_size for f in artifact.iterdir())} bytes; {ran.stderr}")


def test_programs_pass_the_checker_and_weights_are_written_once(artifact: Path, fast: OptimizedModel) -> None:
    check_format(artifact)
    parameters = sum(weight.numel() for weight in fast.program.module.parameters())
    assert 3.99 * parameters < (artifact / "weights.bin").stat().st_size < 4.01 * parameters
    assert all(file.stat().st_size < 1 << 19 for file in artifact.glob("*.onnx"))


def test_nothing_in_it_tells_of_this_machine(artifact: Path) -> None:
    for file in artifact.iterdir():
        if file.name != "weights.bin":
            assert str(Path.cwd()).encode() not in file.read_bytes()
            assert b"site-packages" not in file.read_bytes()


def test_manifest_says_what_a_runner_needs(artifact: Path, fast: OptimizedModel) -> None:
    manifest = load_manifest(artifact)
    assert manifest.kind == "onnx" and manifest.device.type == "any"
    assert manifest.model["vocab_size"] == fast.vocab_size and manifest.model["dtype"] == "float32"
    assert [(c.kv_heads, c.k_dim, c.v_dim) for c in manifest.caches] == [site.geometry[:3] for site in fast.caches]
    assert manifest.policy["config"] == fast.config.to_dict() and manifest.policy["interval"] == 16
    assert manifest.generation["eos_token_id"] == [2]
    assert "tokenizer.json" in manifest.tokenizer
    assert {"torch", "lethe_compile", "onnxscript"} <= set(manifest.versions)


def test_text_goes_in_and_out(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool.main([str(artifact), "--prompt", "let init print", "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("<bos> let init print ") and len(out.split()) == 7


def test_sampling_repeats_with_its_seed(artifact: Path) -> None:
    runner = open_artifact(artifact, threads=1)
    first, second, other = (
        generate(runner, [[1, 5, 6]], max_new_tokens=30, sampler=Sampler(temperature=3.0, seed=seed), eos_token_id=[])
        for seed in (1, 1, 2)
    )
    assert first.ids == second.ids != other.ids


def test_a_prompt_in_parts_is_the_prompt(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_artifact(artifact, threads=1)
    ids = [torch.randint(3, 300, (length,)).tolist() for length in (150, 40)]
    whole = generate(runner, ids, max_new_tokens=40, eos_token_id=[])
    monkeypatch.setattr("lethe_compile.artifact.loop.PREFILL", 64)
    parts = generate(runner, ids, max_new_tokens=40, eos_token_id=[])
    assert parts == whole


def test_bad_arguments_are_refused(artifact: Path) -> None:
    for arguments, message in (
        ([], "nothing to continue"),
        (["--ids", "1,x"], "--ids '1,x' is not a list"),
        (["--ids", "1,99999"], "outside the vocabulary"),
        (["--ids", "1", "--top-p", "2"], "top_p=2.0"),
    ):
        with pytest.raises(InputError, match=message):
            run_tool.main([str(artifact), *arguments])


def test_a_tokenizer_of_another_model_is_refused(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(artifact, folder)
    values = json.loads((folder / "manifest.json").read_text())
    values["model"]["vocab_size"] = 100
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="does not belong to this model: it has ids up to"):
        run_tool.main([str(folder), "--prompt", "let"])


def test_an_altered_program_is_not_run(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(artifact, folder)
    with (folder / "weights.bin").open("r+b") as file:
        file.write(b"\0\1\2\3")
    ran = lethe_without([], "run", str(folder), "--ids", "1")
    assert ran.returncode == 2 and "weights.bin was altered" in ran.stderr


def test_without_onnxruntime_the_package_is_named(artifact: Path) -> None:
    ran = lethe_without(["onnxruntime"], "run", str(artifact), "--ids", "1")
    assert ran.returncode == 3 and "pip install onnxruntime" in ran.stderr


class TestTensorRT:
    """The same programs within the limits of TensorRT's parser; run on ONNX Runtime, where TensorRT is not."""

    @pytest.fixture(scope="class")
    @staticmethod
    def narrow(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("tensorrt") / "narrow"
        shutil.copytree(artifact, folder)
        for name in ("step", "prune"):
            model = ir.load(folder / f"{name}.onnx")
            within_limits(model)
            assert violations(model) == []
            ir.save(model, folder / f"{name}.onnx")
        return folder

    def test_what_the_rewrite_is_for(self, artifact: Path) -> None:
        found = violations(ir.load(artifact / "prune.onnx"))
        reasons = {(one.operator, one.reason.split(",")[0]) for one in found}
        assert ("CumSum", "the type INT64 is not supported") in reasons
        assert ("Clip", "the type INT64 is not supported") in reasons
        assert any(operator == "Mul" and "DOUBLE" in reason for operator, reason in reasons)

    def test_it_passes_the_checker(self, narrow: Path) -> None:
        check_format(narrow)

    def test_a_round_keeps_the_same_tokens(self, artifact: Path, narrow: Path) -> None:
        first, second = (onnxruntime.InferenceSession(str(folder / "prune.onnx")) for folder in (artifact, narrow))
        random = np.random.default_rng(0)
        feed: dict[str, Any] = {}
        for given in first.get_inputs():
            sizes = {"rows": 3, "capacity": 200}
            shape = [dim if isinstance(dim, int) else sizes[dim] for dim in given.shape]
            kind = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
            feed[given.name] = np.ones(shape, kind.get(given.type, np.float32))
        feed["mass"] = (random.random(feed["mass"].shape) ** 12).astype(np.float32)
        feed["position"] = np.cumsum(random.integers(1, 3, feed["position"].shape), axis=2).astype(np.int32)
        feed["length"][:] = [200, 150, 0]
        feed["next_position"][:] = 500
        feed["threshold"][:] = 128
        expected, got = (session.run(None, feed) for session in (first, second))
        names = [output.name for output in first.get_outputs()]
        lengths = expected[names.index("length_after")]
        assert (lengths[:, 0] < 200).all() and (lengths[:, 2] == 0).all()
        for name, one, other in zip(names, expected, got, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)

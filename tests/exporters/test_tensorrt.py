"""TensorRT's limits: every violation is named, and where TensorRT is not, what was written and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from lethe_compile.errors import ConfigError, MissingPackageError, UnsupportedGraphError
from lethe_compile.exporters import tensorrt
from lethe_compile.exporters.programs import prune_program, step_program
from lethe_compile.exporters.tensorrt_build import EngineOptions
from lethe_compile.exporters.tensorrt_limits import VERSIONS, violations
from lethe_compile.exporters.tensorrt_rewrite import within_limits
from lethe_compile.models.tiny import tiny
from lethe_compile.runtime import OptimizedModel
from tests.exporters.onnx_case import check_format, lethe_without, optimized

FLOAT, INT64, DOUBLE, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE, TensorProto.BOOL


def model(
    op: str,
    inputs: dict[str, int],
    output: int,
    constants: dict[str, list[int]] | None = None,
    domain: str = "",
    **attributes: Any,
) -> ir.Model:
    """One node over inputs of these types."""
    given = [helper.make_tensor_value_info(name, kind, ["n", "m"]) for name, kind in inputs.items()]
    values = [helper.make_tensor(name, INT64, [len(x)], x) for name, x in (constants or {}).items()]
    result = helper.make_tensor_value_info("y", output, ["n", "m"])
    node = helper.make_node(op, [*inputs, *(constants or {})], ["y"], name="node", domain=domain, **attributes)
    graph = helper.make_graph([node], "graph", given, [result], values)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return ir.from_proto(made)


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return optimized(tiny("llama"))


CASES: dict[str, tuple[Callable[[], ir.Model], str]] = {
    "operator": (lambda: model("Attention", {"x": FLOAT}, FLOAT), "Attention 'node': the operator is not supported"),
    "domain": (
        lambda: model("Gelu", {"x": FLOAT}, FLOAT, domain="com.microsoft"),
        "of com.microsoft are not supported",
    ),
    "double": (lambda: model("Sqrt", {"x": DOUBLE}, DOUBLE), "Sqrt 'node': the type DOUBLE is not supported"),
    "integer": (lambda: model("CumSum", {"x": INT64}, INT64, {"axis": [1]}), "CumSum 'node': the type INT64"),
    "axis": (lambda: model("CumSum", {"x": FLOAT, "axis": INT64}, FLOAT), "'axis' must be a constant"),
    "long top-k": (lambda: model("TopK", {"x": FLOAT}, FLOAT, {"k": [3841]}), "K = 3841 is more than 3840"),
    "any top-k": (lambda: model("TopK", {"x": FLOAT, "k": INT64}, FLOAT), "'K' must be a constant"),
    "unsorted": (lambda: model("TopK", {"x": FLOAT}, FLOAT, {"k": [8]}, sorted=0), "sorted must be 1"),
    "reduction": (
        lambda: model("ScatterElements", {"x": FLOAT, "i": INT64, "u": FLOAT}, FLOAT, reduction="add"),
        "reduction='add' is not supported",
    ),
    "axes": (lambda: model("ReduceSum", {"x": FLOAT, "axes": INT64}, FLOAT), "'axes' must be a constant"),
}


@pytest.mark.parametrize(("make", "message"), CASES.values(), ids=CASES)
def test_a_violation_is_named(make: Callable[[], ir.Model], message: str) -> None:
    found = violations(make())
    assert any(message in str(one) for one in found), [str(one) for one in found]
    with pytest.raises(UnsupportedGraphError, match=r"TensorRT .* cannot take step\.onnx"):
        tensorrt.refuse_violations(make(), "step")


@pytest.mark.parametrize(
    "made",
    [
        lambda: model("TopK", {"x": FLOAT}, FLOAT, {"k": [3840]}),
        lambda: model("ScatterElements", {"x": FLOAT, "i": INT64, "u": FLOAT}, FLOAT),
        lambda: model("CumSum", {"x": FLOAT}, FLOAT, {"axis": [1]}),
        lambda: model("Where", {"c": BOOL, "x": BOOL, "y0": BOOL}, BOOL),
        lambda: model("Gather", {"x": INT64, "i": INT64}, INT64),
    ],
)
def test_what_is_within_the_limits_passes(made: Callable[[], ir.Model]) -> None:
    assert violations(made()) == []


def test_every_violation_is_named() -> None:
    made = model("CumSum", {"x": DOUBLE, "axis": INT64}, DOUBLE)
    found = [str(one) for one in violations(made)]
    assert len(found) == 4  # of the input, of the output, and two of the node


def test_older_releases_take_less() -> None:
    made = model("ReduceMax", {"x": INT64}, INT64, {"axes": [1]})
    assert violations(made, "10.0") == []
    assert {one.operator for one in violations(made, "8.6")} == {"model", "ReduceMax"}
    with pytest.raises(ConfigError, match=r"version='7' is not allowed: must be one of 8\.6, 10\.0"):
        violations(made, "7")
    assert list(VERSIONS) == ["8.6", "10.0", "10.1"]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: model("CumSum", {"x": INT64}, INT64, {"axis": [1]}), ["Cast", "CumSum", "Cast"]),
        (lambda: model("Clip", {"x": INT64}, INT64, {"low": [0], "high": [9]}), ["Max", "Min"]),
        (lambda: model("Clip", {"x": FLOAT}, FLOAT), ["Clip"]),
        (lambda: model("Equal", {"x": BOOL, "z": BOOL}, BOOL), ["Xor", "Not"]),
    ],
)
def test_a_rewrite(made: Callable[[], ir.Model], expected: list[str]) -> None:
    one = made()
    within_limits(one)
    assert [node.op_type for node in one.graph] == expected
    onnx.checker.check_model(ir.to_proto(one))
    assert [value.name for value in one.graph.outputs] == ["y"]


def test_without_tensorrt_it_says_what_was_written_and_what_to_run(fast: OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError) as caught:
        tensorrt.tell_how_to_build(fast, tmp_path, EngineOptions())
    message = str(caught.value)
    assert caught.value.package == "tensorrt" and "'tensorrt' is not installed" in message
    assert f"{tmp_path / 'step.onnx'}, {tmp_path / 'prune.onnx'} were written" in message
    assert f"trtexec --onnx={tmp_path / 'step.onnx'} --saveEngine={tmp_path / 'step.plan'} --stronglyTyped" in message


@pytest.mark.slow
def test_the_command_line_exits_with_3_and_leaves_programs_that_run(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    command = ["export", "lethe_compile.models.tiny:llama", "--format", "tensorrt", "--out", str(folder)]
    ran = lethe_without(["tensorrt"], *command, "--set", "prune_interval=8", "--set", "prune_threshold=12")
    assert ran.returncode == 3, ran.stderr
    assert "'tensorrt' is not installed" in ran.stderr and "trtexec --onnx=" in ran.stderr
    check_format(folder)
    assert [violations(ir.load(folder / f"{name}.onnx")) for name in ("step", "prune")] == [[], []]
    again = lethe_without(["torch"], "run", str(folder), "--ids", "5,6,7", "--max-new-tokens", "40")
    assert again.returncode == 0 and "40 tokens in" in again.stderr


def test_trtexec_gets_a_profile_for_decode_and_one_for_prefill(fast: OptimizedModel, tmp_path: Path) -> None:
    options = EngineOptions(rows=(1, 2, 4), timing_cache=Path("with space"))
    step = tensorrt.trtexec(step_program(fast), tmp_path, options)
    assert "--timingCacheFile='with space'" in step
    decode, prefill = step.split("--profile=1")
    assert "--profile=0 --minShapes=input_ids:1x1,positions:1x1,new_lengths:1,k_0:1x2x32x16" in decode
    assert "--optShapes=input_ids:2x1,positions:2x1,new_lengths:2,k_0:2x2x1024x16" in decode
    assert "--maxShapes=input_ids:4x1," in decode and "--maxShapes=input_ids:4x1024," in prefill
    assert "decay" not in step  # its size is fixed
    program = prune_program(fast)
    assert program is not None
    prune = tensorrt.trtexec(program, tmp_path, EngineOptions())
    assert "--profile" not in prune and "threshold:3x16" in prune and "length:3x16" in prune

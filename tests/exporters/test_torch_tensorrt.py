"""Torch-TensorRT: what it is given, through a strict fake of its documented API that computes as a network would."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from lethe_compile.errors import MissingPackageError
from lethe_compile.exporters import torch_tensorrt as ours
from lethe_compile.exporters.programs import OTHER_SIZES, ExportableProgram, Operand, prune_program, step_program
from lethe_compile.exporters.tensorrt_build import EngineOptions
from lethe_compile.models.tiny import tiny
from tests.exporters.onnx_case import optimized

OPTIONS = EngineOptions(rows=(1, 2, 4), tokens=(1, 8, 64), capacity=(32, 64, 256), workspace=1 << 28)


class ITensor:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


class MatrixOperation(enum.Enum):
    NONE, TRANSPOSE, VECTOR = range(3)


class ElementWiseOperation(enum.Enum):
    SUM, PROD = range(2)


class Layer:
    __slots__ = ("_compute", "axis", "name", "reshape_dims")

    def __init__(self, compute: Callable[[Layer], Tensor]) -> None:
        self._compute = compute

    def get_output(self, index: int) -> ITensor:
        assert index == 0
        return ITensor(self._compute(self))


class Network:
    """INetworkDefinition, computed as it is built; ranks must be equal, as TensorRT wants them."""

    __slots__ = ()

    def add_matrix_multiply(
        self, input0: ITensor, op0: MatrixOperation, input1: ITensor, op1: MatrixOperation
    ) -> Layer:
        assert len(input0.shape) == len(input1.shape), "broadcasting needs equal ranks"
        left, right = (
            x.value.transpose(-1, -2) if op is MatrixOperation.TRANSPOSE else x.value
            for x, op in ((input0, op0), (input1, op1))
        )
        return Layer(lambda _: left @ right)

    def add_elementwise(self, input1: ITensor, input2: ITensor, op: ElementWiseOperation) -> Layer:
        assert len(input1.shape) == len(input2.shape) and op is ElementWiseOperation.SUM
        return Layer(lambda _: input1.value + input2.value)

    def add_concatenation(self, inputs: list[ITensor]) -> Layer:
        return Layer(lambda layer: torch.cat([one.value for one in inputs], layer.axis))

    def add_shuffle(self, input: ITensor) -> Layer:
        return Layer(lambda layer: input.value.reshape(layer.reshape_dims))


class Context:
    __slots__ = ("net",)

    def __init__(self) -> None:
        self.net = Network()


class Input:
    __slots__ = ("dtype", "name", "shapes")

    def __init__(
        self,
        *,
        shape: tuple[int, ...] | None = None,
        min_shape: tuple[int, ...] | None = None,
        opt_shape: tuple[int, ...] | None = None,
        max_shape: tuple[int, ...] | None = None,
        dtype: torch.dtype,
        name: str = "",
    ) -> None:
        assert (shape is None) == (min_shape is not None)
        self.dtype, self.name = dtype, name
        self.shapes = (shape,) * 3 if shape is not None else (min_shape, opt_shape, max_shape)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both packages are installed; what they were given, and the converters by operator."""
    seen: dict[str, Any] = {"converters": {}, "compiled": []}

    def dynamo_tensorrt_converter(
        key: Any, *, enabled: bool = True, supports_dynamic_shapes: bool = False
    ) -> Callable[[Any], Any]:
        assert enabled and supports_dynamic_shapes, "sizes differ from call to call"
        assert key not in seen["converters"], "a second registration is appended, and never used"
        return lambda function: seen["converters"].setdefault(key, function)

    def get_trt_tensor(ctx: Context, input_val: Any, name: str) -> ITensor:
        assert isinstance(ctx, Context) and name
        return input_val if isinstance(input_val, ITensor) else ITensor(input_val)

    def compile(
        exported_program: ExportedProgram,
        inputs: None = None,
        *,
        arg_inputs: list[Input],
        use_explicit_typing: bool = True,
        truncate_double: bool = False,
        min_block_size: int = 5,
        workspace_size: int = 0,
        timing_cache_path: str = "",
    ) -> Any:
        placeholders = [one for one in exported_program.graph_signature.user_inputs if isinstance(one, str)]
        assert len(arg_inputs) == len(placeholders)
        lowered = exported_program.run_decompositions()
        calls = [node for node in lowered.graph.nodes if node.op == "call_function"]
        namespaces = {node.target.namespace for node in calls if isinstance(node.target, torch._ops.OpOverload)}
        unknown = {
            str(node.target)
            for node in calls
            if getattr(node.target, "namespace", "") == "lethe" and node.target not in seen["converters"]
        }
        assert not unknown and namespaces <= {"aten", "prims", "lethe"}, (unknown, namespaces)
        signature = lowered.graph_signature
        assert not signature.user_inputs_to_mutate and not signature.buffers_to_mutate, "a network writes nowhere"
        seen["compiled"].append((arg_inputs, workspace_size, min_block_size, truncate_double, use_explicit_typing))
        return lowered.module(check_guards=False)

    modules = {
        "tensorrt": {"MatrixOperation": MatrixOperation, "ElementWiseOperation": ElementWiseOperation},
        "torch_tensorrt.dynamo.conversion.converter_utils": {"get_trt_tensor": get_trt_tensor},
        "torch_tensorrt.dynamo.conversion": {"dynamo_tensorrt_converter": dynamo_tensorrt_converter},
        "torch_tensorrt.dynamo": {"compile": compile},
        "torch_tensorrt": {"Input": Input},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["torch_tensorrt"].dynamo = sys.modules["torch_tensorrt.dynamo"]  # type: ignore[attr-defined]
    ours.register_converters.cache_clear()
    return seen


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_linears_are_converted(fake: dict[str, Any], shape: tuple[int, ...], biased: bool) -> None:
    ours.register_converters()
    ours.register_converters()
    x, weights = torch.randn(shape), [torch.randn(size, 8) for size in (4, 6, 2)]
    biases = [torch.randn(len(weight)) for weight in weights] if biased else []
    op = torch.ops.lethe.linears.default
    result = fake["converters"][op](Context(), op, (ITensor(x), weights, biases), {}, "layer")
    torch.testing.assert_close(result.value, op(x, weights, biases))


def test_inputs_are_described_with_their_bounds(fake: dict[str, Any]) -> None:
    operands = (Operand("k_0", ("rows", 2, "capacity", 4), torch.half), Operand("decay", (1,), torch.float32))
    program = ExportableProgram("step", torch.nn.Identity(), operands, ("logits",), torch.device("cpu"))
    cache, decay = ours._inputs(sys.modules["torch_tensorrt"], program, OPTIONS)
    assert cache.shapes == ((1, 2, 32, 4), (2, 2, 64, 4), (4, 2, 256, 4)) and cache.dtype == torch.half
    assert decay.shapes == ((1,), (1,), (1,)) and (cache.name, decay.name) == ("k_0", "decay")


@pytest.mark.slow
def test_the_lowered_programs_are_accepted_and_compute_the_same(fake: dict[str, Any]) -> None:
    fast = optimized(tiny("llama"))
    compiled = ours.compile_programs(fast, OPTIONS)
    assert set(compiled) == {"step", "prune"}
    assert [one[1:] for one in fake["compiled"]] == [(1 << 28, 1, True, True)] * 2
    ids = fake["compiled"][0][0][0]
    assert ids.name == "input_ids" and ids.shapes == ((1, 1), (2, 8), (4, 64)) and ids.dtype == torch.int64
    for program in (step_program(fast), prune_program(fast)):
        assert program is not None
        examples = zip(program.inputs, program.examples(OTHER_SIZES), strict=True)
        given = [_drawn(operand, tensor) for operand, tensor in examples]
        with torch.no_grad():
            expected, got = program.module(*given), compiled[program.name](*given)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


def _drawn(operand: Operand, tensor: Tensor) -> Tensor:
    """Numbers that mean something: positions ascend, rows hold some tokens, masses differ."""
    if operand.name in ("positions", "position"):
        return torch.arange(tensor.shape[-1], dtype=tensor.dtype).expand_as(tensor).contiguous()
    if operand.name == "length":
        return torch.full_like(tensor, 20)
    if operand.name in ("new_lengths", "active"):
        return torch.ones_like(tensor)
    if operand.name in ("next_position", "prompt_length", "threshold"):
        return torch.full_like(tensor, 16)
    return torch.rand(tensor.shape) if tensor.is_floating_point() else tensor


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingPackageError, match="'torch_tensorrt' is not installed: pip install torch-tensorrt"):
        ours._import()

"""A graph of module calls as one ONNX graph: each distinct module is translated once, and copied for every call.

A decoder of n layers calls the same two modules n times with other weights, so an export takes as long for 32 layers as
for two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from lethe_compile.exporters.programs import OTHER_SIZES, SIZES, ExportableProgram
from lethe_compile.passes.program import attribute

if TYPE_CHECKING:
    import onnx_ir as ir

Translate = Callable[[str, nn.Module, Sequence[Tensor], Sequence[set[int]]], "ir.Model"]


def assemble(program: ExportableProgram, translate: Translate) -> ir.Model:
    """The ONNX model of a program that is an FX graph of module calls; `translate` makes one of a module.

    Weights are the tensors of torch, each once.
    """
    module = program.module
    assert isinstance(module, fx.GraphModule), "a program without calls is translated as a whole"
    calls = _first_calls(program)
    templates = {
        name: translate(f"{program.name}: {name}", module.get_submodule(name), *call) for name, call in calls.items()
    }
    return _Assembly(program, templates).build()


def _first_calls(program: ExportableProgram) -> dict[str, tuple[Sequence[Tensor], Sequence[set[int]]]]:
    """What each module is called with first, and which dimensions of that depend on the program's sizes."""
    first, second = (_Record(program, sizes).calls for sizes in (SIZES, OTHER_SIZES))
    return {
        name: (
            args,
            [
                {dim for dim, (a, b) in enumerate(zip(one.shape, other, strict=True)) if a != b}
                for one, other in zip(args, (tensor.shape for tensor in second[name]), strict=True)
            ],
        )
        for name, args in first.items()
    }


class _Record(fx.Interpreter):
    """Runs a program on examples, and keeps the arguments of the first call of each module."""

    def __init__(self, program: ExportableProgram, sizes: dict[str, int]) -> None:
        super().__init__(program.module)
        self.calls: dict[str, Sequence[Tensor]] = {}
        with torch.no_grad():
            self.run(*program.examples(sizes))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        # ONNX knows no strides, and those of an example must not find their way into a program.
        self.calls.setdefault(str(target), tuple(tensor.contiguous() for tensor in args))
        return super().call_module(target, args, kwargs)


class _Assembly:
    def __init__(self, program: ExportableProgram, templates: dict[str, ir.Model]) -> None:
        self.program, self.templates = program, templates
        self.values: dict[fx.Node, Any] = {}
        self.nodes: list[ir.Node] = []
        self.constants: dict[ir.Value, ir.Value] = {}  # of a template to that of the graph: each once
        self.weights: list[ir.Value] = []

    def build(self) -> ir.Model:
        import onnx_ir as ir

        graph: fx.Graph = self.program.module.graph  # type: ignore[assignment]
        inputs = []
        for node in graph.nodes:
            if node.op == "placeholder":
                inputs.append(ir.Value(name=str(node.target)))
                self.values[node] = inputs[-1]
            elif node.op == "get_attr":
                self.values[node] = self._weight(str(node.target))
            elif node.op == "call_module":
                self.values[node] = self._copy(node)
            elif node.op == "call_function":
                assert node.target is getitem, node.target
                call: Any = node.args[0]
                self.values[node] = self.values[call][node.args[1]]
        results: Any = graph.output_node().args[0]
        outputs = [self.values[node] for node in results]
        opset = {"": max(model.opset_imports[""] for model in self.templates.values())}
        initializers = [*self.weights, *self.constants.values()]
        made = ir.Graph(inputs, outputs, nodes=self.nodes, initializers=initializers, opset_imports=opset, name="step")
        return ir.Model(made, ir_version=max(model.ir_version for model in self.templates.values()))

    def _weight(self, name: str) -> ir.Value:
        import onnx_ir as ir

        tensor = ir.tensor_adapters.TorchTensor(attribute(self.program.module, name).detach(), name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self.weights.append(value)
        return value

    def _copy(self, call: fx.Node) -> list[ir.Value | None]:
        """The template of a module with a call's operands; its results."""
        template = self.templates[str(call.target)]
        assert not template.functions, "functions of the exporter are inlined"
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        operands: Any = call.args
        values.update(zip(template.graph.inputs, (self.values[n] for n in operands), strict=True))
        for value in template.graph.initializers.values():
            values[value] = self._constant(str(call.target), value)
        for node in template.graph:
            self._copy_node(node, values, call.name)
        return [values[value] for value in template.graph.outputs]

    def _copy_node(self, node: ir.Node, values: dict[Any, Any], prefix: str) -> None:
        import onnx_ir as ir

        copy = ir.Node(
            node.domain,
            node.op_type,
            [values[value] for value in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=f"{prefix}/{node.name}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = f"{prefix}/{old.name}", old.type
            values[old] = new
        self.nodes.append(copy)

    def _constant(self, module: str, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        if value not in self.constants:
            tensor = value.const_value
            name = f"{module}/{value.name}"
            assert tensor is not None, f"{name} is no constant"
            self.constants[value] = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.numpy().shape)
            )
        return self.constants[value]

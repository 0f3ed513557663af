"""Normalising strips and inlines without changing a number; writes, autocast and state are dealt with at capture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lethe_compile.capture import capture
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.normalize import Normalize, tidy
from lethe_compile.passes.program import Program, is_call, written
from tests.passes.toy import VOCABULARY, Toy, assert_computes_the_same, causal, masked, optimized

aten = torch.ops.aten


def untidy(toy: Toy, x: Tensor) -> Tensor:
    """Aliases, conversions to the same dtype, dropout, constants, and regions within regions."""
    x = F.dropout(x.detach().to(torch.float32), 0.5, toy.training) * torch.tensor(3.0)
    with torch.autocast("cpu", enabled=False):
        x = x * toy.factor
        with torch.no_grad():
            x = x + toy.factor
    with torch.no_grad():
        return x - torch.tensor([2.0])


def run(program: Program) -> Program:
    return run_pipeline(program, [Normalize()]).program


def test_identities_go_and_the_numbers_stay() -> None:
    model = Toy(causal, embed=untidy, factor=torch.linspace(0, 1, 32))
    program = capture(model).program
    ids = torch.randint(VOCABULARY, (3, 11))
    before = program.module(ids)
    after = run(program).module(ids)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    gone = (aten.detach_, aten.detach, aten.lift_fresh_copy, aten.dropout, aten.view, aten._assert_tensor_metadata)
    assert not any(is_call(n, *gone) for n in program.graph.nodes)
    assert not any("wrap_with" in str(n.target) for n in program.graph.nodes)


def test_a_constant_is_sent_to_the_device_once() -> None:
    root = torch.nn.Module()
    root.register_buffer("constant", torch.tensor(2.0))
    root.register_parameter("weight", torch.nn.Parameter(torch.ones(2)))
    graph = fx.Graph()
    for name in ("constant", "weight"):
        node = graph.get_attr(name)
        node.meta["val"] = root.get_buffer(name) if name == "constant" else root.get_parameter(name)
        sent = graph.call_function(aten.to.dtype_layout, (node,), {"dtype": torch.float64, "device": "meta"})
        sent.meta["val"] = torch.empty(node.meta["val"].shape, dtype=torch.float64, device="meta")
    graph.output(tuple(n for n in graph.nodes if is_call(n, aten.to)))
    module = fx.GraphModule(root, graph)
    tidy(module)
    moved, kept = module.graph.output_node().args[0]
    assert moved.op == "get_attr" and module.get_buffer(moved.target).device.type == "meta"
    assert module.get_buffer(moved.target).dtype == torch.float64
    assert is_call(kept, aten.to), "weights stay the model's own"


def test_every_size_is_read_off_the_ids() -> None:
    program = run(capture(Toy(causal, masked(lambda toy, t: torch.ones(t, t, dtype=torch.bool).tril()))).program)
    sizes = [n for n in program.graph.nodes if is_call(n, aten.sym_size)]
    assert len(sizes) == 2 and all(n.args[0] is program.input_ids for n in sizes)


def in_place(toy: Toy, tokens: int) -> Tensor:
    mask = torch.full((tokens, tokens), -torch.inf)
    mask.triu_(1)
    mask[:1, 1:] = -torch.inf
    return mask


def test_writes_to_intermediate_tensors_are_kept() -> None:
    def fill(toy: Toy, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, :4] = 1.5  # nothing reads the result of this call, only the tensor that it writes
        return x

    model = Toy(masked(in_place), embed=fill)
    fast = optimized(model)
    writers = [n for n in fast.graph_module.graph.nodes if any(True for _ in written(n))]
    assert all(is_call(n, torch.ops.lethe.attention) for n in writers)
    assert_computes_the_same(model, fast)


def test_autocast_is_written_out() -> None:
    def cast(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal(toy, query, key, value).float()

    model = Toy(cast)
    fast = optimized(model)
    ids = torch.randint(VOCABULARY, (2, 9))
    torch.testing.assert_close(fast(ids), model(ids), rtol=2e-2, atol=2e-2)
    (pages,) = fast.graph_module.graph.find_nodes(op="placeholder", target="k_pages_0")
    assert pages.meta["val"].dtype == torch.bfloat16


def counting(toy: Toy, x: Tensor) -> Tensor:
    toy.calls.add_(1)
    return x + toy.calls


def test_a_model_that_keeps_state_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match="writes the buffer 'calls': the model keeps state of its own"):
        capture(Toy(causal, embed=counting, calls=torch.zeros(())))

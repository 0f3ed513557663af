"""Writes to intermediate tensors become values: the same numbers, no mutation; what cannot be is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lethe_compile.capture.functional import NotLocal, functionalize
from lethe_compile.passes.program import written

DYNAMIC = torch.export.Dim.DYNAMIC


def exported(function: Callable[[Tensor], Tensor]) -> torch.fx.GraphModule:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    program = torch.export.export(Model(), (torch.randn(3, 6),), dynamic_shapes=shapes, strict=False)
    module: torch.fx.GraphModule = program.module(check_guards=False)
    return module


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1).mul_(x)
    return y


def read_before(x: Tensor) -> Tensor:
    y = x * 2
    seen = y + 1
    y.sub_(3)
    return seen * y


def into_a_slice(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y[0] += x[1]
    return y


def seen_through_a_view(x: Tensor) -> Tensor:
    y = x.exp()
    turned, row = y.t(), y[1]
    y[:, :2].fill_(7.0)
    return turned.t() + row


def through_views_of_views(x: Tensor) -> Tensor:
    y = x.exp()
    y.t().unsqueeze(0)[0, 1:].permute(1, 0)[:, 2:].mul_(3)
    return y + y.reshape(-1).sum()


def by_index(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    order = x.argsort(0)
    y.scatter_(0, order, x)
    y.index_add_(0, torch.tensor([0, 1]), x[:2])
    y.masked_fill_(y > 1, 0.5)
    y[torch.tensor([2]), :] = 4.0
    return y


def views_made_after(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 0] = 0
    z = y[:, :3]
    z.clamp_(max=0.5)
    y[1:] -= 2
    return torch.cat([y, z], dim=1)


FUNCTIONS = [
    in_place,
    read_before,
    into_a_slice,
    seen_through_a_view,
    through_views_of_views,
    by_index,
    views_made_after,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_values_are_as_with_writes(function: Callable[[Tensor], Tensor]) -> None:
    module = exported(function)
    assert any(list(written(node)) for node in module.graph.nodes), "nothing to do"
    functionalize(module.graph)
    module.graph.lint()
    module.recompile()
    assert not any(list(written(node)) for node in module.graph.nodes)
    for shape in ((3, 6), (5, 9), (4, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(module(x.clone()), function(x.clone()), rtol=0, atol=0)


def test_recorded_values_follow() -> None:
    module = exported(views_made_after)
    functionalize(module.graph)
    module.recompile()

    class Checked(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor):
                assert (n.meta["val"].dim(), n.meta["val"].dtype) == (value.dim(), value.dtype)
                checked.append(n.name)
            return value

    checked: list[str] = []
    Checked(module).run(torch.randn(3, 6))
    assert len(checked) > 5


def of_an_input(x: Tensor) -> Tensor:
    return x.add_(1)


def of_an_expansion(x: Tensor) -> Tensor:
    y = x.sum(1, keepdim=True).expand(-1, 4)
    return y[:, :1].add_(1)


@pytest.mark.parametrize(("function", "reason"), [(of_an_input, "no intermediate"), (of_an_expansion, "expand")])
def test_other_writes_are_left_to_torch(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(NotLocal, match=reason):
        functionalize(exported(function).graph)


def test_writes_to_inputs_and_buffers_come_last() -> None:
    """With `state`, one copy at the end to each that is written, through views and several times too."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sums", torch.zeros(3, 6))

        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            self.get_buffer("sums")[:, 1:].add_(x[:, 1:])
            seen = self.get_buffer("sums") * 2
            past.index_copy_(0, torch.tensor([1]), x[:1])
            self.get_buffer("sums").mul_(past)
            return seen + past

    x, past = torch.randn(3, 6), torch.randn(3, 6)
    module = torch.export.export(Model(), (x, past.clone()), strict=False).module(check_guards=False)
    functionalize(module.graph, state=True)
    module.recompile()
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    assert [n.args[0].op for n in calls[-2:] if list(written(n))] == ["get_attr", "placeholder"]
    assert not any(list(written(n)) for n in calls[:-2])
    original, expected, given = Model(), past.clone(), past.clone()
    for _ in range(2):
        torch.testing.assert_close(module(x, given), original(x, expected))
        torch.testing.assert_close(given, expected)
    torch.testing.assert_close(module.get_buffer("sums"), original.get_buffer("sums"))

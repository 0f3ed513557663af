"""Linear maps of one input become one op with equal numbers; what does not qualify stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lethe_compile.capture import capture
from lethe_compile.models.tiny import tiny
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import PassResult, run_pipeline
from lethe_compile.passes.fuse_projections import LINEARS, FuseProjections
from lethe_compile.passes.normalize import Normalize
from lethe_compile.passes.program import Program, is_call


class Projections(nn.Module):
    """Logits from four maps of one input, two of them with a bias, and one map whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.plain = nn.ModuleList(nn.Linear(8, n, bias=False) for n in (4, 6))
        self.biased = nn.ModuleList(nn.Linear(8, n) for n in (4, 6))
        self.scale = nn.Parameter(torch.ones(11, 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        parts = [layer(x) for layer in (*self.plain, *self.biased)]
        return nn.functional.linear(x, self.embed.weight * self.scale) + torch.cat(parts, -1).sum(-1, keepdim=True)


def fused(model: nn.Module) -> tuple[Program, PassResult]:
    program = run_pipeline(capture(model).program, [Normalize()]).program
    records = run_pipeline(program, [FuseProjections()])
    return records.program, PassResult(records.program, records.records[0].matches)


def test_maps_of_one_input_are_fused_with_equal_numbers() -> None:
    torch.manual_seed(0)
    model = Projections().eval()
    program, result = fused(model)
    assert [note.text for note in result.matches] == ["2 linear maps", "2 linear maps"]
    ids = torch.randint(11, (3, 5))
    torch.testing.assert_close(program.module(ids), model(ids))


class Chained(nn.Module):
    """A map of low rank: the second reads what the first wrote, and nothing lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.down, self.up = nn.Embedding(11, 8), nn.Linear(8, 2), nn.Linear(2, 11)
        self.beside = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        result: Tensor = self.up(self.down(x)) + self.beside(x)
        return result


def test_a_map_of_a_map() -> None:
    torch.manual_seed(0)
    model = Chained().eval()
    program, result = fused(model)
    assert [note.text for note in result.matches] == ["2 linear maps", "1 linear maps"]
    ids = torch.randint(11, (3, 5))
    torch.testing.assert_close(program.module(ids), model(ids))


def test_a_computed_weight_is_left_alone() -> None:
    program, _ = fused(Projections().eval())
    left = [n for n in program.graph.nodes if is_call(n, torch.ops.aten.linear)]
    assert len(left) == 1 and left[0].args[1].op == "call_function"


@pytest.mark.parametrize(("name", "maps"), [("llama", 4), ("qwen2", 4)])
def test_a_layer_has_four_launches(name: str, maps: int) -> None:
    """Queries, keys and values; the output; gate and up; down. And one for the logits."""
    program = run_pipeline(capture(tiny(name)).program, pipeline(0.9, fuse=True)).program
    found = [n for n in program.graph.nodes if is_call(n, LINEARS)]
    assert len(found) == maps * len(program.sites) + 1
    assert max(len(n.args[1]) for n in found) == 3

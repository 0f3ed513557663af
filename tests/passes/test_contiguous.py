"""The decomposition: a step over contiguous caches computes what the model computes, of any batch and length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lethe_compile.capture import capture
from lethe_compile.models.tiny import tiny
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.contiguous import SHARED_STATE, _grouped_mm, contiguous_step, paged_step, state_names
from lethe_compile.passes.program import CACHED_OP, Program

CAPACITY = 16


def program(name: str, fuse: bool = False) -> Program:
    return run_pipeline(capture(tiny(name)).program, pipeline(0.9, fuse=fuse)).program


def empty(made: Program, rows: int) -> list[Tensor]:
    state = []
    for site in made.caches:
        kv_heads, k_dim, v_dim = site.geometry[:3]
        state += [torch.zeros(rows, kv_heads, CAPACITY, dim) for dim in (k_dim, v_dim)]
    slots = (len(made.caches), rows, CAPACITY)
    return [
        *state,
        torch.zeros(slots, dtype=torch.int32),
        torch.zeros(slots),
        torch.zeros(slots[:2], dtype=torch.int32),
    ]


@pytest.mark.parametrize(("name", "fuse"), [("gemma2", False), ("llama", True)])
def test_steps_compute_the_logits_of_the_model(name: str, fuse: bool) -> None:
    made = program(name, fuse)
    step = contiguous_step(made)
    assert {node.op for node in step.graph.nodes} <= {
        "placeholder",
        "get_attr",
        "call_module",
        "call_function",
        "output",
    }
    ids, lengths = torch.randint(3, 90, (3, 9)), torch.tensor([6, 1, 4], dtype=torch.int32)
    with torch.no_grad():
        expected = tiny(name)(ids).logits
        positions = torch.arange(6).repeat(3, 1)
        decay, state = torch.tensor([0.9]), empty(made, 3)
        logits, *state = step(ids[:, :6], positions, lengths, decay, *state)
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(logits[row], expected[row, length - 1], rtol=1e-4, atol=1e-4)
        before = lengths.long()
        for at in range(3):  # then a token at a time, the last row none
            new = torch.tensor([1, 1, 0], dtype=torch.int32)
            token = ids.gather(1, (before + at)[:, None])
            logits, *state = step(token, (before + at)[:, None], new, decay, *state)
            for row in (0, 1):
                torch.testing.assert_close(logits[row], expected[row, before[row] + at], rtol=1e-4, atol=1e-4)
    assert state[-1].tolist() == [[9, 4, 4]] * len(made.caches)


def test_layers_that_are_alike_call_the_same_modules() -> None:
    step = contiguous_step(program("llama"))
    calls = [str(node.target) for node in step.graph.nodes if node.op == "call_module"]
    assert calls == ["begin", "attention_0", "region_1", "attention_0", "region_1", "attention_0", "end"]


def test_a_paged_step_keeps_our_op_and_the_inputs() -> None:
    made = program("llama")
    step = paged_step(made)
    names = [str(node.target) for node in step.graph.find_nodes(op="placeholder")]
    assert names == [str(node.target) for node in made.placeholders()]
    assert len(step.graph.find_nodes(op="call_function", target=CACHED_OP)) == 3


def test_names_of_the_state() -> None:
    assert state_names(2) == ("k_0", "v_0", "k_1", "v_1", *SHARED_STATE)


def test_rows_meet_the_expert_that_they_are_sorted_to() -> None:
    x, weight = torch.randn(7, 4), torch.randn(3, 4, 5)
    ends = torch.tensor([2, 2, 6])  # the second expert has no row, and one row has no expert
    expected = torch.cat([x[:2] @ weight[0], x[2:6] @ weight[2], torch.zeros(1, 5)])
    torch.testing.assert_close(_grouped_mm(x, weight, ends), expected)

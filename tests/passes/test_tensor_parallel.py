"""The pass, without processes: both ranks' graphs run side by side, and what they say to each other is computed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from lethe_compile.capture import capture
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.models.tiny import tiny
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import PassResult, run_pipeline
from lethe_compile.passes.check import check
from lethe_compile.passes.evaluate import sample_inputs
from lethe_compile.passes.parts import collective
from lethe_compile.passes.placement import Placement
from lethe_compile.passes.program import Program, attribute
from lethe_compile.passes.tensor_parallel import TensorParallel

Result = list[tuple[Program, PassResult]]


LAYERS = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "mixtral": {"num_hidden_layers": 1}}


@cache
def model_of(name: str) -> Any:
    return tiny(name, **LAYERS.get(name, {}))


def located(model: Any) -> Program:
    """As the pass finds it: everything proved, attention not yet cached."""
    return run_pipeline(capture(model).program, pipeline(0.9)[:-1]).program


def split(model: Any, ranks: int, **options: Any) -> Result:
    plan = getattr(model, "tp_plan", None) or {}
    found = []
    for rank in range(ranks):
        result = TensorParallel(rank, ranks, "ranks", plan=plan, **options).run(located(model))
        check(result.program)
        found.append((result.program, result))
    return found


@torch.no_grad()
def together(programs: list[Program], inputs: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of graphs of equal calls, run node by node in step."""
    values: list[dict[fx.Node, Any]] = [{} for _ in programs]
    for nodes in zip(*(program.graph.nodes for program in programs), strict=True):
        args = [fx.node.map_arg((n.args, n.kwargs), own.__getitem__) for n, own in zip(nodes, values, strict=True)]
        first = nodes[0]
        if first.op == "output":
            return [arg[0][0] for arg in args]
        results: list[Any]
        if first.op == "placeholder":
            results = [inputs[str(first.target)]] * len(nodes)
        elif first.op == "get_attr":
            results = [attribute(p.module, str(n.target)) for p, n in zip(programs, nodes, strict=True)]
        elif first.target is collective.all_reduce.default:
            results = [sum(arg[0][0] for arg in args)] * len(nodes)
        elif first.target is collective.all_gather_into_tensor.default:
            results = [torch.cat([arg[0][0] for arg in args])] * len(nodes)
        elif first.target is collective.wait_tensor.default:
            results = [arg[0][0] for arg in args]
        else:
            results = [n.target(*a, **k) for n, (a, k) in zip(nodes, args, strict=True)]
        for own, node, value in zip(values, nodes, results, strict=True):
            own[node] = value
    raise AssertionError("a graph without an output")


def inputs_of(vocabulary: int = 97) -> dict[str, Tensor]:
    inputs = {k: v[:2] for k, v in sample_inputs(9).items()}
    inputs["input_ids"] = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(2))
    inputs["positions"] = torch.arange(9).repeat(2, 1)
    return inputs


def held(program: Program) -> int:
    return sum(tensor.numel() for tensor in [*program.module.parameters(), *program.module.buffers()])


def assert_equal_numbers(model: Any, found: Result) -> None:
    whole = located(model)
    expected = together([whole], inputs_of())[0]
    for actual in together([program for program, _ in found], inputs_of()):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_heads_mlps_and_vocabulary(ranks: int) -> None:
    """Four ranks share two KV heads, and 97 logits are no multiple of either."""
    model = model_of("llama")
    found = split(model, ranks)
    assert_equal_numbers(model, found)
    sites = found[0][0].sites
    assert [(s.heads, s.kv_heads, s.kv_parts) for s in sites] == [(4 // ranks, 2 // min(2, ranks), 2)]
    assert found[0][1].refusals == ()
    matrices = held(located(model)) - 97 * 64  # the embedding stays whole
    assert held(found[0][0]) - 97 * 64 < matrices * (0.55 if ranks == 2 else 0.4)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_fused_projections_and_experts(name: str) -> None:
    model = model_of(name)
    found = split(model, 2)
    assert_equal_numbers(model, found)
    assert found[0][1].refusals == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gemma2", "phi3", "gpt_oss", "bloom", "gpt_bigcode", "deepseek_v3", "falcon", "qwen3"]
)
def test_other_idioms(name: str) -> None:
    assert_equal_numbers(model_of(name), split(model_of(name), 2))


@pytest.mark.slow
def test_norms_over_all_heads_are_gathered_where_the_models_plan_splits_them() -> None:
    model = model_of("olmo2")
    found = split(model, 2)
    assert_equal_numbers(model, found)
    texts = [note.text for note in found[0][1].refusals]
    assert texts and all("mean" in text and "gathered" in text for text in texts)


def test_what_is_refused() -> None:
    program = located(model_of("llama"))
    with pytest.raises(UnsupportedGraphError, match="its 4 heads are no multiple of 3 ranks"):
        TensorParallel(0, 3, "ranks").run(program)
    with pytest.raises(UnsupportedGraphError, match="4 ranks share its 2 KV heads"):
        TensorParallel(0, 4, "ranks", per_head=True).run(program)
    site = replace(program.sites[0], kv_heads=3, heads=12)
    with pytest.raises(UnsupportedGraphError, match="3 KV heads neither divide 2 ranks"):
        TensorParallel(0, 2, "ranks").run(replace(program, sites=(site,)))
    with pytest.raises(UnsupportedGraphError, match="depends on the content"):
        TensorParallel(0, 2, "ranks").run(replace(program, sites=(replace(program.sites[0], content=True),)))


@pytest.mark.slow
def test_weights_from_elsewhere() -> None:
    """Every weight that a rank keeps is asked for, whole ones too, and none is copied from the model."""
    asked: dict[str, int] = {}

    def fetch(name: str, weight: Tensor, placement: Placement, rank: int) -> Tensor:
        asked[name] = placement.each
        return placement.cut(weight.detach(), rank).clone()

    model = model_of("llama")
    program, _ = split(model, 2, fetch=fetch)[0]
    names = {name for name, _ in model.named_parameters()}
    assert {name.removeprefix("model.") for name in asked} >= names - {"lm_head.weight"}
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {t.data_ptr() for t in [*program.module.parameters(), *program.module.buffers()]}


def test_placements() -> None:
    assert Placement.blocks(1, 4, 2).index == ((0, 1), (2, 3))
    assert Placement.blocks(1, 2, 4, parts=2).index == ((0,), (0,), (1,), (1,))
    assert Placement.covering(0, 5, 2).index == ((0, 1, 2), (2, 3, 4)) and not Placement.covering(0, 5, 2).divides
    assert Placement(0, 4, ((0, 2), (1, 3))).cut(torch.arange(4), 1).tolist() == [1, 3]

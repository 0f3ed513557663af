"""Programs with the Triton kernels inside: what they compute, and the graph that AOTInductor gets of them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import triton
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core
from torch._library.triton import is_wrap_triton_enabled
from torch._ops import OpOverload
from torch.export import ExportedProgram
from triton.backends.compiler import GPUTarget

from lethe_compile.artifact import generate
from lethe_compile.artifact.aoti_cuda import KernelRunner
from lethe_compile.artifact.loop import AheadRunner
from lethe_compile.artifact.manifest import ProgramSpec
from lethe_compile.errors import InputError
from lethe_compile.exporters import _manifest
from lethe_compile.exporters.aoti import kernel_programs
from lethe_compile.models.architectures import build
from lethe_compile.models.tiny import tiny
from lethe_compile.passes.kernel_step import MOST_ROWS, cache_names
from lethe_compile.runtime import OptimizedModel
from tests.exporters.onnx_case import generated, optimized, ragged
from tests.kernels.interpret import run_interpreted

NAME = os.environ.get("LETHE_TEST_MODEL", "llama")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return optimized(tiny("llama"))


def runner_of(fast: OptimizedModel, max_batch: int | None = None) -> KernelRunner:
    """The runner of an artifact over the programs themselves, op by op."""
    programs = {program.name: program for program in kernel_programs(fast, max_batch or MOST_ROWS)}
    specs = {
        name: ProgramSpec(f"{name}.pt2", tuple(operand.name for operand in program.inputs), program.outputs)
        for name, program in programs.items()
    }
    manifest = _manifest(fast, "aoti", specs, (), max_batch)
    calls = {name: torch.no_grad()(program.module) for name, program in programs.items()}
    return KernelRunner(manifest, programs=calls, device=CPU)


@pytest.mark.interpreted
def test_tokens_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several rounds, with prompts of unequal length handed over in parts, and a token that ends a row."""
    monkeypatch.setattr("lethe_compile.artifact.loop.PREFILL", 6)
    fast = optimized(build(NAME), prune_interval=3, prune_threshold=6)
    prompts = ragged(fast.vocab_size, (9, 5))
    expected = generated(fast, prompts, 8)
    runner = runner_of(fast)
    assert isinstance(runner, AheadRunner)
    result = generate(runner, prompts, max_new_tokens=8, eos_token_id=[])
    assert result.new_ids == expected and result.rounds >= 2
    assert result.retained == fast.cache_stats().retained
    end = expected[0][2]
    ended = generate(runner, prompts, max_new_tokens=8, eos_token_id=[end])
    for row, full in zip(ended.new_ids, expected, strict=True):
        assert row == (full[: full.index(end) + 1] if end in full else full)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_through_the_interpreter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LETHE_TEST_MODEL", name)
    run_interpreted(__file__, timeout=1200)


class _Driver:
    """Triton's driver of a Hopper GPU that is not there: enough to write its intermediate code."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels can be traced, and analysed as for a GPU, but a launch does nothing."""
    wrap = torch.library.wrap_triton

    class Nothing:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: None

    monkeypatch.setattr(torch.library, "wrap_triton", lambda k: wrap(k) if is_wrap_triton_enabled() else Nothing())
    monkeypatch.setattr(type(triton.runtime.driver), "active", _Driver())


@pytest.mark.slow
@pytest.mark.usefixtures("no_gpu")
def test_what_the_compiler_gets_writes_in_place(fast: OptimizedModel) -> None:
    """The graph that Inductor lowers: kernels and nothing of ours, caches written without a copy of any."""
    programs = {program.name: program for program in kernel_programs(fast)}
    for name in ("step", "decode"):
        graph, written = _functional(programs[name].trace())
        kernels = [node for node in graph.nodes if node.target is triton_kernel_wrapper_functional]
        assert len(kernels) == len(fast.caches) * (4 if name == "step" else 2)
        assert all(node.kwargs["tensors_to_clone"] == [] for node in kernels)
        assert not any(str(node.target).startswith("lethe") for node in graph.nodes)
        assert written == len(cache_names(fast.program)), "every tensor of every cache, and nothing else"
    prune = programs["prune"].trace()
    assert {node.target.namespace for node in prune.graph.nodes if isinstance(node.target, OpOverload)} == {"aten"}


def _functional(exported: ExportedProgram) -> tuple[torch.fx.Graph, int]:
    """A program as Inductor's passes leave it, and how many inputs it writes."""
    values = [node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")]
    kinds = [spec.kind.name for spec in exported.graph_signature.input_specs]
    given = [value for value, kind in zip(values, kinds, strict=True) if kind == "USER_INPUT"]
    with given[0].fake_mode, torch.no_grad():
        module, signature = aot_export_module(
            exported.module(check_guards=False), given, trace_joint=False, decompositions=select_decomp_table()
        )
    graph, written = module.graph, signature.user_inputs_to_mutate
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    output = graph.output_node()
    with graph.inserting_before(output):
        for result, name in zip(output.args[0], written.values(), strict=False):
            graph.call_function(torch.ops.aten.copy_.default, (inputs[name], result))
    output.args = (tuple(output.args[0][len(written) :]),)
    reinplace_inplaceable_ops_core(graph)
    return graph, len(written)


@pytest.mark.parametrize(("max_batch", "rows"), [(None, MOST_ROWS), (100, 100)])
def test_more_rows_than_the_kernels_take_are_refused(fast: OptimizedModel, max_batch: int | None, rows: int) -> None:
    runner = runner_of(fast, max_batch)
    runner.begin(rows)
    with pytest.raises(InputError, match=rf"{rows + 1} prompts at once are too many: the artifact takes {rows}"):
        runner.begin(rows + 1)


@pytest.mark.parametrize(("max_batch", "compiled"), [(1, 1), (16, 16), (100, 128)])
def test_kernels_are_compiled_for_the_next_power_of_two(fast: OptimizedModel, max_batch: int, compiled: int) -> None:
    decode = next(program for program in kernel_programs(fast, max_batch) if program.name == "decode")
    graph = decode.module.graph
    ops = graph.find_nodes(op="call_function", target=torch.ops.lethe.decode_attention.default)
    assert len(ops) == len(fast.caches) and {node.args[-1] for node in ops} == {compiled}


def test_caches_grow_and_shrink_with_what_is_in_them(fast: OptimizedModel) -> None:
    runner = runner_of(fast)
    runner.begin(2)
    runner.reserve(3 * runner.page)
    first, pages = runner.caches["k_0"], runner.row_pages
    assert pages >= 3 and len(first) == 2 * pages and runner.table.tolist()[1][0] == pages
    first[pages] = 7.0  # the first page of the second row
    runner.reserve(3 * runner.page)
    assert runner.caches["k_0"] is first, "what fits stays where it is"
    runner.reserve(20 * runner.page)
    assert runner.row_pages >= 20 and bool((runner.caches["k_0"][runner.row_pages] == 7).all())
    runner.reserve(1)
    assert runner.row_pages <= pages and bool((runner.caches["k_0"][runner.row_pages] == 7).all())


def test_the_next_generation_of_as_many_rows_finds_the_caches_in_their_place(fast: OptimizedModel) -> None:
    """And with them the CUDA graph of a decode step."""
    runner = runner_of(fast)
    runner.begin(2)
    runner.reserve(3 * runner.page)
    runner.caches["length_0"].fill_(5)
    before = dict(runner.caches)
    runner.begin(2)
    runner.reserve(3 * runner.page)
    assert all(runner.caches[name] is tensor for name, tensor in before.items()) and not runner.lengths.any()
    runner.begin(3)
    assert runner.row_pages == 0

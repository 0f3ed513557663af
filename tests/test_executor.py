"""Backends: what is chosen, compiled regions against the interpreted graph, and one compilation for all layers."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import lethe_compile as lethe
from lethe_compile.errors import ConfigError
from lethe_compile.executor import choose_backend, waits_for_host
from lethe_compile.models.tiny import tiny
from tests.hybrids import hybrid


def test_a_node_that_waits_for_the_host_forbids_cuda_graphs() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(3)
    moved = graph.call_function(torch.ops.aten._to_copy.default, (x,))
    moved.meta["val"] = torch.ones(3)
    assert waits_for_host(graph) is None
    found = graph.call_function(torch.ops.aten.nonzero.default, (moved,))
    graph.output(found)
    reason = waits_for_host(graph)
    assert reason is not None and "aten.nonzero.default (nonzero_default) waits for the host" in reason
    backend, why = choose_backend("auto", torch.device("cuda"), waits=reason)
    assert backend == "inductor" and reason in why
    with FakeTensorMode():
        moved.meta["val"] = torch.empty(3, device="cuda")
    reason = waits_for_host(graph)
    assert reason is not None and "reads a tensor of the host" in reason


def test_a_cpu_runs_the_graph_with_its_own_kernels() -> None:
    backend, reason = choose_backend("auto", torch.device("cpu"))
    assert backend == "eager" and "CPU kernels" in reason


def test_stateful_modules_get_a_cuda_graph_only_if_asked_for() -> None:
    pytest.importorskip("triton", reason="without it a GPU runs the reference kernels, with any model")
    assert choose_backend("auto", torch.device("cuda"))[0] == "cudagraphs"
    backend, reason = choose_backend("auto", torch.device("cuda"), stateful=True)
    assert backend == "inductor" and "no CUDA graphs, since modules that keep other state" in reason
    assert choose_backend("cudagraphs", torch.device("cuda"), stateful=True)[0] == "cudagraphs"


def test_masks_by_content_get_no_cuda_graph() -> None:
    backend, reason = choose_backend("auto", torch.device("cuda"), content=True)
    assert backend == ("inductor" if "Inductor" in reason else "eager")
    with pytest.raises(ConfigError, match="masks depend on the content"):
        choose_backend("cudagraphs", torch.device("cuda"), content=True)


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(lethe.ConfigError, match="needs a CUDA device"):
        choose_backend("cudagraphs", torch.device("cpu"))
    with pytest.raises(lethe.ConfigError, match="must be one of auto, eager, inductor, cudagraphs"):
        choose_backend("tvm", torch.device("cpu"))


def test_the_report_names_the_backend() -> None:
    report = lethe.optimize(tiny("llama"), backend="eager", verified=False).report()
    assert (report.backend, report.backend_reason) == ("eager", "asked for")
    assert "backend eager (asked for)" in str(report).replace("\n", " ")


def test_layers_are_compiled_once_and_tokens_are_the_same() -> None:
    """Five layers, three regions; the batch, the prompt and the cache then grow without another compilation."""
    from torch._dynamo.utils import counters

    model = tiny("llama", num_hidden_layers=5)
    config = lethe.LetheConfig(max_tokens=48, prune_threshold=16, prune_interval=8, page_size=4)
    eager = lethe.optimize(model, config, backend="eager", verified=False)
    fast = lethe.optimize(model, config, backend="inductor", verified=False)
    counters.clear()
    options = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
    for rows, tokens in ((3, 14), (2, 31), (5, 9)):
        ids = torch.randint(3, 97, (rows, tokens))
        assert fast.generate(ids, **options).tolist() == eager.generate(ids, **options).tolist()
    assert max(map(max, fast.cache_stats().rounds)) > 2, "the cache must have shrunk in between"
    # First, middle and last region; the first two for a prompt and for a single token.
    assert counters["stats"]["unique_graphs"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "zaya"])
def test_regions_between_stateful_modules_are_compiled(name: str) -> None:
    model = hybrid(name)
    config = lethe.LetheConfig(max_tokens=48, prune_threshold=16, prune_interval=8, page_size=4)
    eager = lethe.optimize(model, config, backend="eager", verified=False)
    fast = lethe.optimize(model, config, backend="inductor", verified=False)
    ids = torch.randint(3, 97, (3, 14))
    options = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
    assert fast.generate(ids, **options).tolist() == eager.generate(ids, **options).tolist()
    assert max(map(max, fast.cache_stats().rounds)) > 2, "the cache must have shrunk in between"

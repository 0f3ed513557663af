"""`torch.compile(model, backend="lethe")`: forwards without a cache, and transformers' generate with a static cache.

With pruning off the tokens are transformers' own; with pruning the logits are the eviction oracle's. All graphs are
counted.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

import lethe_compile as lethe
from lethe_compile import torch_backend
from lethe_compile.models.plain_decoder import PlainConfig, PlainDecoder
from lethe_compile.models.static_decoder import StaticDecoder
from lethe_compile.models.tiny import tiny
from lethe_compile.torch_backend.static import Sessions
from tests.oracle import PRUNING, Evictions, replay

ROOT = Path(__file__).parents[1]
UNPRUNED = {"policy": "full"}
PRUNED = PRUNING["lethe"].to_dict()
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    if "loop" not in request.fixturenames:  # whose tests share their graphs
        torch._dynamo.reset()
    counters.clear()


def model_of(name: str) -> Any:
    """Attention written out, which keeps Gemma 2's softcap; the same weights at each call."""
    if name == "plain":
        torch.manual_seed(0)
        return PlainDecoder(PlainConfig(windows=(7,))).eval()
    model = tiny(name, num_hidden_layers=2)
    model.set_attn_implementation("eager")
    return model


@cache
def shared(name: str) -> Any:
    """One for all tests, so that it is optimized once for each set of options."""
    return model_of(name)


def compiled(model: Any, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    return torch.compile(model, backend="lethe", options=options or UNPRUNED, fullgraph=True, **settings)


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


def prompts() -> tuple[Tensor, Tensor]:
    """Token ids [3, 11] and their mask: two rows are padded on the left."""
    ids, mask = torch.randint(3, 97, (3, 11)), torch.ones(3, 11, dtype=torch.int64)
    mask[0, :4], mask[2, :8] = 0, 0
    return ids, mask


# -------------------------------------------------------------------------------------------------- without a cache


@torch.no_grad()
def test_a_forward_without_a_cache() -> None:
    model, ids = shared("llama"), torch.randint(3, 97, (1, 9))
    fast = compiled(model)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(fast(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    last = fast(ids, use_cache=False, logits_to_keep=1).logits
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)
    assert graphs() == 2
    assert len(torch_backend.optimized(fast).sites) == 2


@pytest.mark.parametrize("name", [pytest.param("gemma2", marks=pytest.mark.slow), "gpt2"])
@torch.no_grad()
def test_a_padded_forward(name: str) -> None:
    """Nothing is evicted, whatever the options. GPT-2 that is given no positions counts columns, padding included."""
    model = shared(name)
    fast, (ids, mask) = compiled(model, PRUNED), prompts()
    options = {"attention_mask": mask, "use_cache": False}
    expected, actual = model(ids, **options).logits, fast(ids, **options).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert graphs() == 1


@torch.no_grad()
def test_a_plain_decoder() -> None:
    """Two graphs: for the first shape, and for any other."""
    model = shared("plain")
    fast = compiled(model)
    for shape in ((2, 9), (3, 30), (4, 3), (2, 70)):
        ids = torch.randint(97, shape)
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert graphs() == 2
    assert [site.mask and site.mask.window for site in torch_backend.optimized(fast).sites] == [7]


@pytest.mark.slow
@torch.no_grad()
def test_other_weights_are_compiled_anew() -> None:
    model = model_of("plain")
    fast, ids = compiled(model), torch.randint(97, (2, 9))
    fast(ids)
    first = torch_backend.optimized(fast)
    before = graphs()
    model.get_submodule("blocks.0.up").weight = nn.Parameter(torch.randn(128, 64))
    torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert graphs() == before, "torch.compile did not notice: the backend must"
    last = torch_backend.optimized(fast)
    assert last is not first
    references = [weakref.ref(each) for each in (model, first, last)]
    del model, fast, first, last
    gc.collect()
    assert [reference() for reference in references] == [None] * 3, "the backend must keep no model alive"


# ---------------------------------------------------------------------------------------- generate with a static cache


def generate(model: Any, ids: Tensor, mask: Tensor, new: int, **options: Any) -> Any:
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **GREEDY, **options)


def by_generate(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of generate with which it compiles its own steps, on a CPU too."""
    config = CompileConfig(backend="lethe", mode=None, options=options, fullgraph=True)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]
    return {"cache_implementation": "static", "compile_config": config}


@contextmanager
def forward_compiled(model: Any, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same for a compiled forward, prefills included."""
    model.forward = compiled(model.forward, options)
    try:
        yield {"cache_implementation": "static"}
    finally:
        del model.forward


@pytest.mark.parametrize(
    ("name", "steps"),
    [("llama", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("gemma2", "mistral"))],
)
def test_generate_compiles_its_own_steps(name: str, steps: int) -> None:
    """The prefill runs outside, its cache is taken over.

    Windows are full after it, and count tokens by a number, which becomes dynamic in a second graph. Mistral has
    nothing but windows, so that no counter says how many tokens came before.
    """
    model = shared(name)
    ids, mask = prompts()
    static = by_generate(UNPRUNED)
    assert torch.equal(generate(model, ids, mask, 20, **static), generate(model, ids, mask, 20))
    assert graphs() == steps
    assert torch_backend.optimized(model).cache_stats().seen == [7 + 19, 11 + 19, 3 + 19]
    ids, mask = ids[:, 3:], mask[:, 3:]
    assert torch.equal(generate(model, ids, mask, 20, **static), generate(model, ids, mask, 20))
    assert graphs() == steps, "another generation must need no other graph"


def assert_pruned_as_the_oracle(model: Any, static: dict[str, Any]) -> list[Any]:
    """Generate, prune, and replay every row on the original; returns the layers of generate's static cache."""
    ids, mask = (tensor.to(model.device) for tensor in prompts())
    generate(model, ids, mask, 60, **static)  # so that there is a model to watch
    fast, evictions, before = torch_backend.optimized(model), Evictions(), graphs()
    fast.on_round.append(evictions)
    out = generate(model, ids, mask, 60, return_dict_in_generate=True, output_logits=True, **static)
    fast.on_round.remove(evictions)
    assert graphs() == before
    logits = torch.stack(out.logits, dim=1)
    stats = fast.cache_stats()
    assert all(min(layer) >= 2 for layer in stats.rounds)
    assert min(map(min, stats.bytes_freed)) > 0
    assert max(map(max, stats.retained)) < 45 < min(stats.seen)
    for row, prompt in enumerate(mask.sum(1).tolist()):
        sequence = out.sequences[row : row + 1, -prompt - logits.shape[1] :]
        with torch.compiler.set_stance("force_eager"):
            expected, full = (one[prompt - 1 : -1] for one in replay(model, sequence, evictions, row))
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        assert (full - expected).abs().max() > 1e-2
    layers: list[Any] = out.past_key_values.layers
    return layers


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_compiled_forward_prunes_from_the_prompt_on(name: str) -> None:
    """Prefill and step share one cache; the static cache's layers without windows take no memory at all."""
    model = shared(name)
    with forward_compiled(model, PRUNED) as static:
        layers = assert_pruned_as_the_oracle(model, static)
        assert graphs() == 2
        for layer in layers:
            assert storage(layer) == (layer.keys.nbytes + layer.values.nbytes if layer.is_sliding else 2 * 4)
    pages = torch_backend.optimized(model).cache
    assert pages.bytes_in_use > 0
    del layers, layer
    gc.collect()
    assert pages.bytes_in_use == 0, "the pages go when the static cache does"


def storage(layer: Any) -> int:
    return int(layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes())


def test_steps_that_generate_compiles_are_pruned() -> None:
    assert_pruned_as_the_oracle(shared("gpt2"), by_generate(PRUNED))
    assert graphs() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gpu_generates_with_a_compiled_forward(name: str) -> None:
    """On a GPU, generate compiles its own steps as well."""
    torch.set_float32_matmul_precision("highest")
    model = model_of(name).cuda()
    ids, mask = (tensor.cuda() for tensor in prompts())
    expected = generate(model, ids, mask, 20)
    with forward_compiled(model, UNPRUNED) as static:
        assert torch.equal(generate(model, ids, mask, 20, **static), expected)
    torch._dynamo.reset()
    with forward_compiled(model, PRUNED) as static:
        assert_pruned_as_the_oracle(model, static)
    torch._dynamo.reset()
    assert torch.equal(generate(model, ids, mask, 20, **by_generate(UNPRUNED)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_generations_of_many_sizes(name: str) -> None:
    """Each size is a constant at first, then a symbol: the graphs are bounded, however many generations there are."""
    model = shared(name)
    with forward_compiled(model, UNPRUNED) as static:
        for tokens, new in ((11, 5), (9, 20), (5, 30), (7, 40), (10, 8), (8, 50)):
            ids, mask = (tensor[:, :tokens] for tensor in prompts())
            mask = mask.clone()
            mask[:, -1] = 1
            out = generate(model, ids, mask, new, **static)
            with torch.compiler.set_stance("force_eager"):
                assert torch.equal(out, generate(model, ids, mask, new))
    assert graphs() <= 8


# --------------------------------------------------------------------------------------- one's own loop over a cache


@pytest.fixture
def llama() -> Any:
    return shared("llama")


@pytest.fixture(scope="module")
def loop() -> Any:
    torch._dynamo.reset()
    return compiled(shared("llama"))


def static_cache(model: Any, rows: int = 2, slots: int = 24) -> StaticCache:
    cache, config = StaticCache(config=model.config, max_cache_len=slots), model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(rows, config.num_key_value_heads, size, torch.float32, torch.device("cpu"))
    return cache


@torch.no_grad()
def step(model: Any, cache: Any, ids: Tensor, past: int) -> Tensor:
    positions = torch.arange(past, past + ids.shape[1]).expand_as(ids)
    logits: Tensor = model(ids, past_key_values=cache, position_ids=positions).logits
    return logits


def test_a_cache_that_was_reset_begins_another_generation(llama: Any, loop: Any) -> None:
    fast, cache = loop, static_cache(llama)
    for _ in range(2):
        ids = torch.randint(3, 97, (2, 8))
        expected = llama(ids, use_cache=False).logits
        logits = [step(fast, cache, ids[:, :6], 0), step(fast, cache, ids[:, 6:7], 6), step(fast, cache, ids[:, 7:], 7)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
        assert int(cache.get_seq_length()) == 8
        cache.reset()
    assert graphs() == 2, "whichever generation it is"


def test_a_cache_that_was_taken_over_is_no_cache_for_others(llama: Any, loop: Any) -> None:
    fast, cache = loop, static_cache(llama)
    ids = torch.randint(3, 97, (2, 8))
    step(fast, cache, ids[:, :6], 0)
    assert step(llama, cache, ids[:, 6:7], 6).isnan().all(), "whoever reads it must notice"
    with pytest.raises(lethe.InputError, match="gone: a pruned cache has taken its place"):
        step(fast, cache, ids[:, 7:], 7)


@pytest.mark.slow
def test_two_generations_at_a_time_are_refused(llama: Any, loop: Any) -> None:
    fast, first, second = loop, static_cache(llama), static_cache(llama)
    ids = torch.randint(3, 97, (2, 8))
    step(fast, first, ids[:, :6], 0)
    step(fast, second, ids[:, :6], 0)
    with pytest.raises(lethe.InputError, match="ended when another began"):
        step(fast, first, ids[:, 6:7], 6)


def test_a_mask_of_ones_own_is_refused(llama: Any, loop: Any) -> None:
    fast, cache, ids = loop, static_cache(llama), torch.randint(3, 97, (2, 8))
    mask = torch.ones(2, 1, 8, 24, dtype=torch.bool).tril()
    mask[:, :, 5, 2] = False
    with pytest.raises(lethe.InputError, match="hides or shows other tokens"):
        fast(ids, past_key_values=cache, attention_mask=mask)


def test_chunks_of_a_prompt(llama: Any, loop: Any) -> None:
    cache, ids = static_cache(llama), torch.randint(3, 97, (2, 13))
    logits = [step(loop, cache, ids[:, :6], 0), step(loop, cache, ids[:, 6:12], 6), step(loop, cache, ids[:, 12:], 12)]
    expected = llama(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_whose_rows_move_is_refused(llama: Any, loop: Any) -> None:
    """As beam search does it."""
    cache, ids = static_cache(llama), torch.randint(3, 97, (2, 8))
    step(loop, cache, ids[:, :6], 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(lethe.InputError, match="a search with beams"):
        step(loop, cache, ids[:, 6:7], 6)


def test_inference_mode_counts_no_writes() -> None:
    """What tells then that others have written to a cache is that it holds numbers again."""
    with torch.inference_mode():
        sessions, session, tensors = Sessions(), object(), torch.zeros(2, 2, 1, 5, 4).unbind()
        sessions.add(session, tensors)  # type: ignore[arg-type]
        assert all(sessions.find(tensor) is session for tensor in tensors)
        tensors[0].zero_()
        assert sessions.find(tensors[0]) is None


# --------------------------------------------------------------------------------------------------------- refusals


def test_unknown_options_are_refused_with_the_known() -> None:
    model, ids = shared("plain"), torch.ones(2, 5, dtype=torch.int64)
    fast = compiled(model, {"sparse_ration": 3.0})
    with pytest.raises(
        lethe.ConfigError, match=r"'sparse_ration' is not .* nearest is 'sparse_ratio', .*prune_interval"
    ):
        fast(ids)
    with pytest.raises(lethe.ConfigError, match="mode='max-autotune' is not allowed"):
        torch.compile(model, backend="lethe", mode="max-autotune")(ids)


@pytest.mark.parametrize("cache", [None, DynamicCache()])
def test_a_growing_cache_is_refused(llama: Any, cache: Any) -> None:
    fast = compiled(llama)
    with pytest.raises(
        lethe.UnsupportedGraphError, match=r"logits .* alone, and returns .*use_cache=False, or a static"
    ):
        fast(torch.ones(2, 5, dtype=torch.int64), past_key_values=cache)


def test_training_is_refused() -> None:
    model = model_of("plain").train()
    with pytest.raises(lethe.InputError, match="PlainDecoder is in training mode"):
        compiled(model)(torch.ones(2, 5, dtype=torch.int64))


def test_a_part_of_a_model_is_refused() -> None:
    """After a graph break the graphs are parts, and none of them is the model."""
    model = model_of("plain")
    up = model.get_submodule("blocks.0.up")
    up.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(lethe.UnsupportedGraphError, match=r"fullgraph=True says where a graph breaks"):
        torch.compile(model, backend="lethe")(torch.ones(2, 5, dtype=torch.int64))


def test_a_function_without_a_model_is_refused() -> None:
    with pytest.raises(lethe.UnsupportedGraphError, match="computes with no model's weights"):
        compiled(lambda ids: ids * 2)(torch.ones(2, 5))


def test_a_function_around_a_model_is_told_from_it() -> None:
    model = shared("plain")
    ids = torch.randint(97, (2, 9))
    same = compiled(lambda ids: model(tokens=ids) * 1)
    torch.testing.assert_close(same(ids), model(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(lethe.UnsupportedGraphError, match="its logits are off by"):
        compiled(lambda ids: model(ids) * 2)(ids)


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 32), nn.Linear(32, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)[:, None]
        return self.head(F.scaled_dot_product_attention(x, x, x)[:, 0])  # type: ignore[no-any-return]


def test_what_is_not_causal_is_refused_by_its_reason() -> None:
    with pytest.raises(lethe.UnsupportedGraphError, match="layer 0"):
        compiled(Bidirectional().eval())(torch.randint(97, (2, 9)))


def test_a_module_that_keeps_its_own_cache_is_refused() -> None:
    model = StaticDecoder().eval()
    model.setup_caches(1, 32)
    with pytest.raises(lethe.LetheError, match=r"keeps a cache of its own goes to lethe_compile\.optimize"):
        compiled(model)(torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_nothing_has_been_compiled_yet() -> None:
    with pytest.raises(lethe.InputError, match="no forward of this PlainDecoder has run"):
        torch_backend.optimized(model_of("plain"))


# ----------------------------------------------------------------------------------------------------- registration


def test_the_entry_point_names_the_backend() -> None:
    group, value = "torch_dynamo_backends", "lethe_compile.torch_backend:lethe"
    assert f'[project.entry-points.{group}]\nlethe = "{value}"\n' in (ROOT / "pyproject.toml").read_text()
    assert EntryPoint("lethe", value, group).load() is torch_backend.lethe


def test_an_import_registers_the_backend() -> None:
    code = "import lethe_compile, torch; print(torch._dynamo.lookup_backend('lethe').__module__)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "lethe_compile.torch_backend"

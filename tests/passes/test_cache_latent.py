"""Keys and values that heads make of a narrow latent are not made, in any spelling; near misses stay, with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.capture import capture
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.cache_latent import CacheLatent
from lethe_compile.past import Past
from lethe_compile.pool import Geometry
from tests.passes.toy import HEADS, Attend, Toy, assert_computes_the_same, causal, optimized, program_after

LATENT, SHARED, NOPE, VALUE = 8, 4, 8, 8  # numbers: of the latent, of the part heads share, and of a head

KeysAndValues = Callable[[Toy, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A latent [B, T, 8] and what heads share [B, T, 4] -> key [B, 4, T, 12] and value [B, 4, T, 8]."""


def attending(make: KeysAndValues, width: int = VALUE) -> Attend:
    """Attention over what `make` returns; latent and shared part are no linear maps of anything."""

    def attend(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        latent, shared = F.silu(value[:, 0]), torch.cos(key[:, 1, :, :SHARED])
        keys, values = make(toy, latent, shared)
        queries = torch.cat([query, query], dim=-1)[..., : keys.shape[-1]]
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return F.pad(out, (0, VALUE - width))

    return attend


def heads(x: Tensor) -> Tensor:
    """[B, T, 4 * n] -> [B, 4, T, n]."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def both(toy: Toy, latent: Tensor) -> list[Tensor]:
    return list(heads(F.linear(latent, toy.up)).split([NOPE, VALUE], dim=-1))


def of_all(shared: Tensor) -> Tensor:
    return shared[:, None].expand(-1, HEADS, -1, -1)


def as_in_deepseek(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = both(toy, latent)
    return torch.cat([nope, of_all(shared)], dim=-1), value


def written_into(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = both(toy, latent[:, None].squeeze(1))
    key = nope.new_empty(*nope.shape[:-1], NOPE + SHARED)
    key[..., :NOPE] = nope
    key[..., NOPE:] = of_all(shared)
    return key, value


def of_two_maps(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([of_all(shared), heads(F.linear(latent, toy.k))], dim=-1), heads(F.linear(latent, toy.v))


def by_einsum(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    made = torch.einsum("btr,hdr->bhtd", latent, toy.up.view(HEADS, -1, LATENT))
    return torch.cat([made[..., :NOPE], shared.unsqueeze(1).repeat(1, HEADS, 1, 1)], dim=-1), made[..., NOPE:]


def by_matmul(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = (latent[:, None] @ toy.up.view(HEADS, -1, LATENT).mT).chunk(2, dim=-1)
    return torch.cat([nope, of_all(shared)], dim=-1), value


def scaled(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = both(toy, latent)
    return torch.cat([nope * 0.5 + nope, of_all(shared)], dim=-1), -value


def of_two_key_heads(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    key, value = as_in_deepseek(toy, latent, shared)
    return key[:, ::2], value[:, ::2]


def unshared(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(both(toy, latent))  # type: ignore[return-value]


def normed(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = both(toy, latent)
    return torch.cat([F.normalize(nope, dim=-1), of_all(shared)], dim=-1), value


def biased(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    nope, value = heads(F.linear(latent, toy.up, toy.bias)).split([NOPE, VALUE], dim=-1)
    return torch.cat([nope, of_all(shared)], dim=-1), value


def of_other_tokens(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Each key is that of the token before, the first its own."""
    before = torch.cat([latent[:, :1], latent[:, :-1]], dim=1)
    return both(toy, before)[0], both(toy, latent)[1]


def slim(toy: Toy, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    key, value = both(toy, latent)
    return key[..., :2], value[..., :3]


ABSORBED: dict[str, KeysAndValues] = {
    f.__name__: f
    for f in (as_in_deepseek, written_into, of_two_maps, by_einsum, by_matmul, scaled, of_two_key_heads, unshared)
}
KEPT: dict[str, tuple[Attend, str]] = {
    "keys normalised by head": (attending(normed), "44 numbers a token, they have 80, and attention would take 2.6"),
    "a bias": (attending(biased), "has a constant term"),
    "heads too slim": (attending(slim, 3), "8 numbers a token, they have 20, and attention would take 3.2"),
}


@pytest.fixture(scope="module")
def model() -> Toy:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (HEADS * (NOPE + VALUE), LATENT), "k": (HEADS * NOPE, LATENT), "v": (HEADS * VALUE, LATENT)}
    shapes["bias"] = (HEADS * (NOPE + VALUE),)
    buffers = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return Toy(*map(attending, ABSORBED.values()), *(attend for attend, _ in KEPT.values()), causal, **buffers)


def test_tokens_that_meet_before_attention_are_no_latent(model: Toy) -> None:
    mixing = Toy(attending(of_other_tokens), **dict(model.named_buffers()))
    (record,) = run_pipeline(program_after(mixing, "fold-repeat-kv"), [CacheLatent()]).records
    assert not record.matches and "is not computed from each token alone" in record.refusals[0].text


@pytest.fixture(scope="module")
def fast(model: Toy) -> lethe.OptimizedModel:
    return optimized(model)


@pytest.mark.slow
def test_every_spelling_is_absorbed_and_near_misses_are_refused(model: Toy) -> None:
    result = run_pipeline(program_after(model, "fold-repeat-kv"), [CacheLatent()])
    (record,), sites = result.records, result.program.sites
    assert [note.layer for note in record.matches] == list(range(len(ABSORBED)))
    for site, name in zip(sites, ABSORBED, strict=False):
        width = LATENT if name == "unshared" else LATENT + SHARED
        expanded = 2 if name == "of_two_key_heads" else HEADS
        key = NOPE if name == "unshared" else NOPE + SHARED
        assert site.geometry == (1, width, LATENT, True) and site.alternative == expanded * (key + VALUE), name
    refused = {note.layer: note.text for note in record.refusals}
    for layer, (name, (_, reason)) in enumerate(KEPT.items(), len(ABSORBED)):
        assert reason in refused.pop(layer) and not sites[layer].latent, name
    assert not refused, "an attention without a latent is no near miss"


def test_weights_are_the_models_own_where_they_are_parts_of_one(fast: lethe.OptimizedModel) -> None:
    made = {name for name, _ in fast.graph_module.named_buffers() if name.startswith("latent")}
    layers = {list(ABSORBED).index(name) for name in ("by_einsum", "by_matmul", "scaled")}
    assert {int(name.split("_")[2]) for name in made} == layers, made


def test_absorbed_or_not_the_numbers_stay(model: Toy, fast: lethe.OptimizedModel) -> None:
    assert_computes_the_same(model, fast, (1, 5, 11))


def test_off_it_stays_expanded_and_the_report_has_both_figures(fast: lethe.OptimizedModel) -> None:
    on, model = fast.report(), Toy(attending(as_in_deepseek), causal, up=torch.randn(HEADS * (NOPE + VALUE), LATENT))
    off = lethe.optimize(model, lethe.LetheConfig(policy="full", cache_latent=False), verified=False).report()
    (one, other), last = (on.layers[0], off.layers[0]), on.layers[-1]
    assert (one.cached, one.bytes_per_token, one.bytes_otherwise) == ("latent", 12 * 4, 80 * 4)
    assert (other.cached, other.bytes_per_token, other.bytes_otherwise) == ("keys and values", 80 * 4, 12 * 4)
    assert (last.cached, last.bytes_otherwise) == ("keys and values", None)
    assert "48 latent, expanded 320" in " ".join(str(on).split())
    assert "cache_latent is off" in str(off)


def test_one_cache_for_layers_that_attend_to_the_same() -> None:
    """A layer that attends again to the keys and values of the one before shares its latent."""

    def first(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        toy.now.kept = as_in_deepseek(toy, F.silu(value[:, 0]), torch.cos(key[:, 1, :, :SHARED]))
        return again(toy, query, key, value)

    def again(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries = torch.cat([query, query], dim=-1)[..., : NOPE + SHARED]
        return F.scaled_dot_product_attention(queries, *toy.now.kept, is_causal=True)

    model = Toy(first, again, up=torch.randn(HEADS * (NOPE + VALUE), LATENT) * 0.3)
    fast = optimized(model)
    assert [site.latent for site in fast.sites] == [True, True] and len(fast.caches) == 1
    assert_computes_the_same(model, fast)


@pytest.mark.slow
def test_deepseek_v3_caches_576_numbers_a_token_and_layer() -> None:
    """Its real attention, in a model that is narrow otherwise: 1,152 bytes instead of 81,920, 71 times less."""
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 1}
    settings |= {"vocab_size": 64, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 16}
    config = transformers.DeepseekV3Config(**settings, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128)
    assert config.v_head_dim == 128
    model = transformers.DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    program = run_pipeline(capture(model).program, pipeline(None)).program
    (site,) = program.sites
    assert site.geometry == (1, 576, 512, True) and site.scale == 192**-0.5
    latent, expanded = Geometry(*site.geometry), Geometry(128, 192, 128)
    assert latent.bytes_per_token(torch.bfloat16) == 1_152
    assert expanded.bytes_per_token(torch.bfloat16) == 2 * site.alternative == 81_920
    assert not any(name.startswith("latent") for name, _ in program.module.named_buffers()), "weights are views"


def test_a_past_of_keys_and_values_is_refused(fast: lethe.OptimizedModel) -> None:
    past = Past((), (), (), torch.tensor([3]))
    with pytest.raises(lethe.InputError, match="cache_latent=False"):
        fast.adopt(past)
    with pytest.raises(lethe.InputError, match="a cache from elsewhere holds these"):
        fast.forward_after(past, torch.zeros(1, 1, dtype=torch.int64))

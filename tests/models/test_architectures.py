"""Every causal language model of transformers as a tiny decoder: it builds, generates, and its features bite."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from lethe_compile.errors import ConfigError
from lethe_compile.models.architectures import ARCHITECTURES, KNOWN, NO_CACHE, NOT_CAUSAL, OTHERS, build

REPRESENTATIVE = (
    *("llama", "gpt2", "opt", "bloom", "gptj", "gemma2", "gemma3n_text", "gpt_oss"),
    *("deepseek_v3", "llama4_text", "qwen3_next", "diffllama"),
)
PROMPT, NEW = 24, 12


def prompt() -> Tensor:
    """[2, PROMPT] ids, none special and none twice in a row of the batch."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(94, generator=generator)[:PROMPT] + 3 for _ in range(2)])


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """The new tokens, [B, NEW]."""
    mask = torch.ones_like(ids)
    out: Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=None, **options
    )
    return out[:, ids.shape[1] :]


def check(name: str) -> None:
    model, ids = build(name), prompt()
    out = logits(model, ids)
    assert out.isfinite().all() and out.shape[:2] == ids.shape and out.shape[2] >= 97
    assert not model.training

    later = ids.clone()
    later[:, 20:] = (later[:, 20:] + 5) % 90 + 3
    leak = (logits(model, later) - out)[:, :20].abs().max() / out.std()
    assert (leak > 1e-2) if name in NOT_CAUSAL else (leak < 1e-4), f"a later token changes earlier logits by {leak}"
    moved = ids.clone()
    moved[:, [18, 19]] = moved[:, [19, 18]]
    shift = (logits(model, moved) - out)[:, -1].abs().max() / out.std()
    assert shift > 1e-3, f"swapping two tokens changes the last logits by {shift} only"
    tokens = generate(model, ids)
    assert max(len(set(row.tolist())) for row in tokens) > 1, "generates one token only"
    if name not in NOT_CAUSAL:
        assert torch.equal(tokens, generate(model, ids, use_cache=False)), "with a cache, other tokens than without"
    if name not in NOT_CAUSAL and name not in NO_CACHE:
        check_cache(model, ids)


def check_cache(model: Any, ids: Tensor) -> None:
    """A prefill of 16 tokens and single steps give the logits of one forward of the whole text."""
    positions = torch.arange(PROMPT).expand(2, -1)
    known = "position_ids" in inspect.signature(model.forward).parameters
    placed = [{"position_ids": positions[:, :16]}] + [
        {"position_ids": positions[:, t : t + 1]} for t in range(16, PROMPT)
    ]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False, **({"position_ids": positions} if known else {})).logits
        cache = None
        for ids_now, where in zip([ids[:, :16], *ids[:, 16:].split(1, dim=1)], placed, strict=True):
            out = model(input_ids=ids_now, past_key_values=cache, use_cache=True, **(where if known else {}))
            cache = out.past_key_values
            last = int(where["position_ids"][0, -1])
            assert (out.logits[:, -1] - whole[:, last]).abs().max() < 1e-3 * whole.std(), f"token {last}"


def test_the_keys_of_transformers_are_all_accounted_for() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(ARCHITECTURES) & OTHERS.keys() == set()
    assert set(ARCHITECTURES) | OTHERS.keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert KNOWN.keys() <= set(ARCHITECTURES)


def test_what_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with pytest.raises(ConfigError, match="'gemma3': a composite of text and vision; its text model is gemma3_text"):
        build("gemma3")
    with pytest.raises(ConfigError, match="'lama': the architectures are afmoe, "):
        build("lama")
    with pytest.raises(ConfigError, match="LlamaConfig of 'llama' has no setting num_layers"):
        build("llama", num_layers=2)
    monkeypatch.delitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "zaya")
    with pytest.raises(ConfigError, match=r"transformers \d.* has no causal language model 'zaya'"):
        build("zaya")


def test_overrides_go_by_any_name_and_layers_by_pattern() -> None:
    config = build("gpt2", num_hidden_layers=2).config
    assert (config.n_layer, config.n_embd) == (2, 64)
    config = build("gpt_oss", num_hidden_layers=3).config
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    config = build("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"]).config
    assert config.layer_types == ["full_attention"]
    assert build("llama", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_transformers_makes_no_cache_for_blt() -> None:
    model = build("blt")
    with pytest.raises(AttributeError, match="num_hidden_layers"):
        model(input_ids=prompt(), use_cache=True)


def test_seeds_fix_the_weights() -> None:
    first, again, other = (build("llama", seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "settings", "reach"),
    [
        ("mistral", {"num_hidden_layers": 3}, 18),
        ("gemma2", {"num_hidden_layers": 1}, 6),
        ("gpt_neo", {"num_hidden_layers": 1, "attention_types": [[["local"], 1]]}, 6),
        ("llama4_text", {"num_hidden_layers": 1}, 7),
        ("llama4_text", {"num_hidden_layers": 2}, PROMPT - 1),
    ],
)
def test_windows_and_chunks_hide_the_first_token(name: str, settings: dict[str, Any], reach: int) -> None:
    # Of several kinds of layers the first is local: windows of 7 tokens, chunks of 8.
    model, ids = build(name, **settings), prompt()
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 5) % 90 + 3
    moved = (logits(model, changed) - logits(model, ids)).abs().amax(dim=(0, 2)) > 1e-5
    assert moved.nonzero().max().item() == reach


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_representative_architectures_generate(name: str) -> None:
    check(name)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_generates(name: str) -> None:
    check(name)

"""What a policy is told at a round: the attention of the newest queries alone, and the keys in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lethe_compile as lethe
from lethe_compile import policies
from lethe_compile.models.tiny import tiny
from lethe_compile.policies import Policy, RoundState
from tests.hybrids import hybrid

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
INTERVAL, NEW = 6, 20


class Spy(Policy):
    """Evicts nothing and remembers what it was shown."""

    name = "spy"
    window: int | None = None
    seen: list[RoundState]
    keys: list[list[Tensor]]

    @property
    def decay(self) -> float | None:
        return 1.0

    @property
    def observation_window(self) -> int | None:
        return self.window

    def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        tensors = {name: value.clone() for name, value in vars(state).items() if isinstance(value, Tensor)}
        self.seen.append(RoundState(windows=state.windows, **tensors))
        self.keys.append([state.keys(layer).clone() for layer in range(len(state.windows))])
        return None


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "_registry", {**policies._registry, "spy": Spy})
        yield


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    monkeypatch.setattr(Spy, "seen", [], raising=False)
    monkeypatch.setattr(Spy, "keys", [], raising=False)
    return Spy


def prompts() -> tuple[Tensor, Tensor]:
    """Of 1, 5 and 14 tokens, padded on the left."""
    mask = torch.stack([torch.arange(14) >= 14 - length for length in (1, 5, 14)]).long()
    return torch.randint(3, 97, mask.shape, generator=torch.Generator().manual_seed(1)) * mask, mask


def optimized(model: Any) -> Any:
    config = lethe.LetheConfig(policy="spy", prune_interval=INTERVAL, page_size=4)
    return lethe.optimize(model, config, verified=False)


@cache
def pair(name: str) -> tuple[Any, Any]:
    """A model and what `optimize` makes of it, once for all tests: the spy's window is its class's."""
    model = hybrid(name) if name == "granitemoehybrid" else tiny(name)
    return model, optimized(model)


@torch.no_grad()
def attentions(model: Any, ids: Tensor) -> Tensor:
    """[layers, queries, keys] of one row, summed over heads, by transformers."""
    model.set_attn_implementation("eager")
    return torch.stack([layer[0].sum(0) for layer in model(ids[None], output_attentions=True).attentions])


@pytest.mark.parametrize("window", [1, 4, INTERVAL, 100])
def test_masses_are_those_of_the_newest_queries(spy: type[Spy], window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spy, "window", window)
    model, fast = pair("llama")
    ids, mask = prompts()
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW, **GREEDY)
    assert len(spy.seen) == 1 + NEW // INTERVAL
    for row, prompt in enumerate(mask.sum(1).tolist()):
        sequence = out[row, 14 - prompt :]
        expected = attentions(model, sequence)
        for index, state in enumerate(spy.seen):
            held = prompt + index * INTERVAL
            queries = min(window, INTERVAL if index else prompt - 1)  # the first token of a prompt is never observed
            mass = expected[:, held - queries : held, :held].sum(1)
            torch.testing.assert_close(state.mass[:, row, :held], mass, rtol=1e-4, atol=1e-5)
            assert not state.mass[:, row, held:].any()


def test_without_a_window_every_query_counts(spy: type[Spy]) -> None:
    model, fast = pair("llama")
    ids, mask = prompts()
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW, **GREEDY)
    held = 14 + INTERVAL * (len(spy.seen) - 1)
    expected = attentions(model, out[2])[:, :held, :held].sum(1)
    torch.testing.assert_close(spy.seen[-1].mass[:, 2, :held], expected, rtol=1e-4, atol=1e-5)


def test_keys_are_those_of_transformers(spy: type[Spy]) -> None:
    """Rotated, in order, 0 behind a row's tokens."""
    model, fast = pair("llama")
    ids, mask = prompts()
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW, **GREEDY)
    held = 5 + INTERVAL * (len(spy.seen) - 1)
    with torch.no_grad():
        cache = model(out[1:2, 9:][:, :held], use_cache=True).past_key_values
    for layer, keys in enumerate(spy.keys[-1]):
        expected = cache.layers[layer].keys[0].transpose(0, 1)  # [N, num_kv_heads, head_dim]
        torch.testing.assert_close(keys[1, :held], expected, rtol=1e-4, atol=1e-5)
        assert not keys[1, held:].any() and keys.shape[1] == 14 + INTERVAL * (len(spy.seen) - 1)


@pytest.mark.parametrize("window", [1, 5, 13, 100])
@pytest.mark.parametrize("name", ["gpt2", "granitemoehybrid", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_prompt_in_two_parts_gives_the_same_logits(
    spy: type[Spy], window: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every token and of the last ones; with learned positions, sliding windows, and state of other kinds."""
    _, fast = pair(name)
    lengths = torch.tensor([1, 5, 14])
    ids = torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(1))
    found = {}
    for observed in (None, window):
        monkeypatch.setattr(spy, "window", observed)
        for whole in (False, True):
            fast.begin(3, lengths)
            found[observed, whole] = fast.prefill(ids, lengths, whole=whole).clone()
            fast.end()
    torch.testing.assert_close(found[window, False], found[None, False], rtol=1e-4, atol=1e-4)
    for row, length in enumerate(lengths.tolist()):
        expected = found[None, True][row, :length]
        torch.testing.assert_close(found[window, True][row, :length], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("longrope", marks=pytest.mark.slow)])
def test_rotary_frequencies_follow_the_whole_prompt(spy: type[Spy], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part alone is shorter than the length at which frequencies change."""
    half = torch.linspace(1, 3, 8).tolist()
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": half, "original_max_position_embeddings": 12}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=12 if kind == "dynamic" else 48,
        rope_parameters=rope,
        initializer_range=0.3,  # attention that depends on positions
    )
    model = LlamaForCausalLM(config).eval()
    fast = optimized(model)
    fast.max_positions = None
    ids, lengths = torch.randint(3, 97, (2, 20)), torch.tensor([20, 7])
    found = []
    for observed in (None, 16):
        monkeypatch.setattr(spy, "window", observed)
        fast.begin(2, lengths)
        found.append(fast.prefill(ids, lengths).clone())
        fast.end()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(found[1][0], model(ids[:1]).logits[0, -1], rtol=1e-4, atol=1e-4)

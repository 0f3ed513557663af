"""Decoders with layers of other kinds: attention is pruned as anywhere, every other state is kept exactly."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lethe_compile as lethe
from lethe_compile.capture import Captured, capture
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.models.tiny import tiny
from lethe_compile.runtime import OptimizedModel
from tests.hybrids import CONFIGS, PADDING_SHOWS, QUICK, hybrid
from tests.oracle import PRUNING, assert_original_agrees

NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix) for name in CONFIGS]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ATTENTIONS = {"falcon_h1": 3, "zaya": 4}  # else 2
STATEFUL = {"falcon_h1": 3, "recurrent_gemma": 4, "zamba": 4, "zamba2": 4, "zaya": 4}  # else 2


class Hybrid:
    """A model, its graph, exported once, and what `optimize` makes of it with pruning off."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, hybrid(name)
        self.before = [dict(vars(module)) for module in self.model.modules()]
        self.unused = copy.deepcopy(self.model)
        self.captured: Captured = capture(self.model)
        with pytest.MonkeyPatch.context() as patch:
            self.hand_over(patch)
            self.fast = lethe.optimize(self.model, lethe.LetheConfig(policy="full", page_size=4))

    def hand_over(self, patch: pytest.MonkeyPatch) -> None:
        """Let `optimize` take a copy of the graph instead of exporting the model again."""
        program = replace(self.captured.program, module=copy.deepcopy(self.captured.program.module))
        patch.setattr("lethe_compile.api.capture", lambda model, example: replace(self.captured, program=program))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        out: Tensor = self.model(ids, use_cache=False).logits
        return out

    def generate(self, ids: Tensor, mask: Tensor, new: int) -> list[list[int]]:
        """New tokens of transformers' `generate`; of each row alone, without padding, where padding would show."""
        columns, options = ids.shape[1], {**GREEDY, "max_new_tokens": new}
        if self.name not in PADDING_SHOWS:
            out: list[list[int]] = self.model.generate(ids, attention_mask=mask, **options)[:, columns:].tolist()
            return out
        rows = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
        # Each by a fresh copy: a prompt of one token would go on from what the last generation left on the modules.
        return [copy.deepcopy(self.unused).generate(row, **options)[0, row.shape[1] :].tolist() for row in rows]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> Hybrid:
    return Hybrid(request.param)


def ragged(tokens: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Prompts of those lengths, padded on the left."""
    mask = torch.stack([torch.arange(tokens) >= tokens - length for length in lengths]).long()
    return torch.randint(3, 97, mask.shape) * mask, mask


def test_every_layer_is_found_and_reported(pair: Hybrid) -> None:
    report = pair.fast.report()
    assert len(report.layers) == ATTENTIONS.get(pair.name, 2)
    assert len(report.states) == STATEFUL.get(pair.name, 2)
    modules = dict(pair.model.named_modules())
    assert all(state.name in modules and state.bytes_per_row > 0 for state in report.states)
    assert "other state kept, not pruned" in str(report)
    assert report.to_dict()["states"][0]["name"] == report.states[0].name


def test_the_model_is_left_as_it_was(pair: Hybrid) -> None:
    for module, before in zip(pair.model.modules(), pair.before, strict=True):
        assert vars(module).keys() == before.keys()
        assert not module._forward_pre_hooks and not module._forward_hooks
        tensors = {key: value for key, value in before.items() if isinstance(value, Tensor)}
        assert all(vars(module)[key] is value for key, value in tensors.items())
    weights = {p.data_ptr() for p in pair.model.parameters()}
    assert {p.data_ptr() for p in pair.fast.stateful_modules.parameters()} <= weights


@pytest.mark.parametrize("lengths", [(14,), (5, 14, 1), (1, 1)])
def test_generated_tokens_are_the_same(pair: Hybrid, lengths: tuple[int, ...]) -> None:
    ids, mask = ragged(max(lengths), lengths)
    out = pair.fast.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY)
    assert out[:, ids.shape[1] :].tolist() == pair.generate(ids, mask, 20)


def test_logits_of_whole_sequences_are_the_same(pair: Hybrid) -> None:
    for length in (1, 2, 7, 8, 9, 40):
        ids = torch.randint(97, (2, length))
        torch.testing.assert_close(pair.fast(ids), pair.logits(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(pair: Hybrid, side: str) -> None:
    ids, mask = torch.randint(97, (3, 12)), ragged(12, (12, 7, 7))[1]
    mask = mask if side == "left" else mask.flip(1)
    logits = pair.fast(ids, attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        torch.testing.assert_close(logits[row, real], pair.logits(ids[row, real][None])[0], rtol=1e-4, atol=1e-4)


def test_decoding_step_by_step_is_the_whole_sequence(pair: Hybrid) -> None:
    ids = torch.randint(97, (3, 40))
    expected, prompts = pair.logits(ids), torch.tensor([1, 6, 8])
    pair.fast.begin(3, prompts)
    try:
        logits = pair.fast.prefill(ids[:, :8], prompts)
        for column in range(32):
            last = prompts + column
            torch.testing.assert_close(logits, expected[torch.arange(3), last - 1], rtol=1e-4, atol=1e-4)
            logits = pair.fast.decode(ids.gather(1, last[:, None])[:, 0], torch.ones(3, dtype=torch.bool))
    finally:
        pair.fast.end()


def test_a_row_that_takes_no_part_keeps_its_state(pair: Hybrid) -> None:
    fast = pair.fast
    fast.begin(3, torch.tensor([4, 4, 3]))
    try:
        fast.prefill(torch.randint(97, (3, 4)), torch.tensor([4, 4, 3]))
        before = {name: tensor.clone() for name, tensor in fast.states.tensors.items()}
        fast.decode(torch.randint(97, (3,)), torch.tensor([True, False, True]))
        for name, tensor in fast.states.tensors.items():
            assert torch.equal(tensor[1], before[name][1])
            assert not torch.equal(tensor[[0, 2]], before[name][[0, 2]])
        assert fast.cache_stats().state_bytes == [3 * state.bytes_per_row for state in fast.report().states]
    finally:
        fast.end()


def test_generations_are_independent(pair: Hybrid) -> None:
    ids, mask = ragged(9, (9, 4))
    run = lambda: pair.fast.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY).tolist()  # noqa: E731
    first = run()
    pair.fast.generate(torch.randint(97, (2, 11)), max_new_tokens=5, **GREEDY)
    pair.fast(torch.randint(97, (3, 6)))
    assert run() == first


@pytest.mark.parametrize("pruning", PRUNING)
def test_pruned_logits_match_the_original_with_evicted_tokens_hidden(
    pair: Hybrid, pruning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.hand_over(monkeypatch)
    assert_original_agrees(pair.model, PRUNING[pruning], tolerance=1e-4, evictions_show=pruning == "lethe")


# ---------------------------------------------------------------------------------------------------- near misses


class Convolved(nn.Module):
    """An MLP behind a causal depthwise convolution over tokens, whose tail it would need in a cache, and has none."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.convolution = nn.Conv1d(64, 64, 3, groups=64)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.convolution(F.pad(x.mT, (2, 0))).mT
        return self.mlp(mixed)  # type: ignore[no-any-return]


def test_mixing_tokens_without_a_cache_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp = Convolved(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedGraphError, match=r"step by step.* does anything but attention mix tokens"):
        lethe.optimize(model, policy="full")


def test_a_convolution_beside_stateful_layers_is_refused() -> None:
    model = hybrid("lfm2")
    model.model.layers[0].feed_forward = Convolved(model.model.layers[0].feed_forward)
    with pytest.raises(UnsupportedGraphError, match="does anything but attention mix tokens"):
        lethe.optimize(model, policy="full")


def test_a_model_without_attention_has_nothing_to_prune() -> None:
    with pytest.raises(UnsupportedGraphError, match="none of its layers caches keys and values"):
        lethe.optimize(hybrid("mamba"))


def conv_of(model: Any) -> Any:
    return model.model.layers[0].conv


def counting(model: Any) -> None:
    """Its first convolution counts tokens in the cache, as a plain number."""
    conv = conv_of(model)
    forward = conv.forward

    def counted(hidden_states: Tensor, past_key_values: Any = None, **options: Any) -> Tensor:
        if past_key_values is not None:
            layer = past_key_values.layers[0]
            layer.seen = getattr(layer, "seen", 0) + hidden_states.shape[1]
        return forward(hidden_states, past_key_values=past_key_values, **options)  # type: ignore[no-any-return]

    conv.forward = counted


def looking_elsewhere(model: Any) -> None:
    """Its first convolution also reads the state of the third layer's."""
    conv = conv_of(model)
    forward = conv.forward

    def looking(hidden_states: Tensor, past_key_values: Any = None, **options: Any) -> Tensor:
        out = forward(hidden_states, past_key_values=past_key_values, **options)
        other = None if past_key_values is None else past_key_values.layers[2].conv_states[0]
        return out if other is None else out + other.mean()  # type: ignore[no-any-return]

    conv.forward = looking


class Telling(nn.Module):
    """Tells a convolution the number of tokens, as a plain number."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        forward = conv.forward
        conv.forward = lambda hidden_states, length, **options: forward(hidden_states, **options)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return self.conv(hidden_states, hidden_states.shape[1], **options)  # type: ignore[no-any-return]


def told_the_length(model: Any) -> None:
    model.model.layers[0].conv = Telling(conv_of(model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (counting, "it keeps 'cache.layers.0.seen', a plain value that depends on the input: 3 or 9"),
        (looking_elsewhere, "cannot be called by itself: .* a tensor of another layer's cache"),
        (told_the_length, "is told 3 for one input and 9 for another"),
    ],
)
def test_state_that_cannot_be_moved_out_is_refused(change: Any, reason: str) -> None:
    model = hybrid("lfm2")
    change(model)
    with pytest.raises(UnsupportedGraphError, match=reason) as refused:
        lethe.optimize(model)
    assert str(refused.value.where).startswith("model.layers.0.conv")


def test_a_failing_cached_forward_says_so() -> None:
    # transformers squeezes a single token's dimension in this norm, and rows and tokens then mix.
    model = hybrid("falcon_h1", mamba_rms_norm=True)
    with pytest.raises(UnsupportedGraphError, match="the model does not run with its own cache: RuntimeError"):
        lethe.optimize(model)


@pytest.mark.slow
def test_half_precision_keeps_the_dtype_of_each_state() -> None:
    model = hybrid("qwen3_next").to(torch.bfloat16)
    fast: OptimizedModel = lethe.optimize(model, policy="full")
    assert fast.report().states[0].dtypes == ("bfloat16", "float32")
    out = fast.generate(torch.randint(97, (2, 5)), max_new_tokens=4, **GREEDY)
    assert out.shape == (2, 9)

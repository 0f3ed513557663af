"""The decoder in gpt-fast's idiom: as a module and exported, its own cache replaced, with and without pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import lethe_compile as lethe
from lethe_compile.models.static_decoder import StaticDecoder, factory
from tests.oracle import PRUNING, assert_original_agrees

SLOTS = 128


def module() -> StaticDecoder:
    return factory(slots=SLOTS)


def four_rows() -> StaticDecoder:
    model = module()
    model.setup_caches(4, SLOTS)
    return model


def one_token() -> torch.export.ExportedProgram:
    return torch.export.export(module(), (torch.ones(1, 1, dtype=torch.int64), torch.tensor([0])), strict=False)


def any_number() -> torch.export.ExportedProgram:
    arguments = (torch.ones(1, 4, dtype=torch.int64), torch.arange(4))
    return torch.export.export(module(), arguments, dynamic_shapes=({1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}), strict=False)


@torch.no_grad()
def decoded(model: StaticDecoder, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens of the model with its own cache, one at a time."""
    tokens = list(prompt)
    for position in range(len(prompt) + new - 1):
        logits = model(torch.tensor([[tokens[position]]]), torch.tensor([position]))
        if position >= len(prompt) - 1:
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


def test_its_cache_changes_nothing() -> None:
    model, ids = module(), torch.randint(97, (1, 20))
    with torch.no_grad():
        whole = model(ids, torch.arange(20))
        steps = [model(ids[:, at : at + 1], torch.tensor([at])) for at in range(20)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [module, four_rows, one_token, any_number])
def test_tokens_are_its_own(make: Callable[[], Any]) -> None:
    fast = lethe.optimize(make(), policy="full")
    assert fast.max_positions == SLOTS
    assert [site.name for site in fast.sites] == [f"layers.{layer}.attention" for layer in range(3)]
    ids = torch.randint(3, 97, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :8] = 0, 0
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    for row, real in zip(out, mask, strict=True):
        start = 11 - int(real.sum())
        assert row[start:].tolist() == decoded(module(), row[start:11].tolist(), 40)


def test_logits_are_its_own() -> None:
    model, ids = module(), torch.randint(97, (2, 40))
    logits = lethe.optimize(model, policy="full")(ids)
    with torch.no_grad():
        expected = torch.cat([model(row[None], torch.arange(40)) for row in ids])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruning", PRUNING)
def test_pruned_logits_match_the_original_with_evicted_tokens_hidden(pruning: str) -> None:
    shows = pruning != "literal"
    assert_original_agrees(module(), PRUNING[pruning], tolerance=1e-4, evictions_show=shows)


def test_the_model_keeps_its_cache() -> None:
    model = module()
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.int64), torch.arange(5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    lethe.optimize(model, policy="full")
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_more_tokens_than_slots_are_refused() -> None:
    fast = lethe.optimize(one_token(), policy="full", verified=False)
    ids: Tensor = torch.ones(1, 8, dtype=torch.int64)
    with pytest.raises(lethe.InputError, match=f"the model has {SLOTS}"):
        fast.generate(ids, max_new_tokens=SLOTS)

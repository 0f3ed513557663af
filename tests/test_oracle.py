"""Pruned logits against the eviction oracle of `tests/oracle.py`, for every tiny model and kind of pruning."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from lethe_compile import LetheConfig
from lethe_compile.capture import Captured, capture
from lethe_compile.models.plain_decoder import plain
from lethe_compile.models.tiny import CONFIGS, tiny
from tests.oracle import POLICIES, PRUNING, assert_original_agrees

MODELS = [*CONFIGS, "plain"]


@pytest.fixture(scope="module", params=MODELS)
def captured(request: pytest.FixtureRequest) -> tuple[str, Any, Captured]:
    """A model's name, the model, and its graph: exported once, and optimized once for each policy."""
    model = plain() if request.param == "plain" else tiny(request.param)
    return request.param, model, capture(model)


def assert_oracle_agrees(
    captured: tuple[str, Any, Captured], config: LetheConfig, shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, model, exported = captured
    program = replace(exported.program, module=copy.deepcopy(exported.program.module))
    monkeypatch.setattr("lethe_compile.api.capture", lambda model, example: replace(exported, program=program))
    shows = shows and name != "mistral"  # a windowed layer may lose only what it cannot see
    assert_original_agrees(model, config, tolerance=1e-4, evictions_show=shows)


@pytest.mark.parametrize("pruning", PRUNING)
def test_pruned_logits_match_the_original_with_evicted_tokens_hidden(
    captured: tuple[str, Any, Captured], pruning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_oracle_agrees(captured, PRUNING[pruning], pruning != "literal", monkeypatch)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "captured",
    [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in MODELS],
    indirect=True,
)
def test_every_policy_evicts_what_it_says(
    captured: tuple[str, Any, Captured], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_oracle_agrees(captured, POLICIES[policy], True, monkeypatch)

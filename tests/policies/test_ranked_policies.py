"""The policies that Lethe is compared with: their choices, their caps, their options, on states of random shape."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError, LetheError
from lethe_compile.policies import make_policy
from lethe_compile.policies.base import RoundState
from tests.policies import definitions
from tests.policies.simulated import Decode, begun
from tests.policies.states import FLOOR, NAMES, SMALL, kept, made, random_state

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "h2o": [{"recent": 0.2}],
    "snapkv": [{"window": 3, "kernel": 3, "pooling": "max"}, {"kernel": 1, "window": 5}],
    "pyramid": [{"steepness": 2.0, "pooling": "max", "kernel": 5}, {"steepness": 1}],
    "morph": [{"window": 4, "fusion": "max"}],
    "rkv": [{"importance": 0.5, "window": 3, "kernel": 1}, {"similar": 0.1, "importance": 0.02}],
    "random": [{"seed": 12345}],
}
CASES = [(name, options) for name in NAMES for options in [{}, *OPTIONS.get(name, [])]]


def picked(state: RoundState, row: int) -> RoundState:
    """The state of one row alone, without slots that it does not use."""
    only = slice(row, row + 1)
    width = max(1, int(state.length[:, row].max()))
    return replace(
        state,
        mass=state.mass[:, only, :width],
        position=state.position[:, only, :width],
        length=state.length[:, only],
        prompt_length=state.prompt_length[only],
        next_position=state.next_position[only],
        active=state.active[only],
        key_source=lambda layer: state.keys(layer)[only, :width],
    )


def by_definition(name: str, options: dict[str, Any], config: LetheConfig, state: RoundState) -> Tensor:
    """What stays [L, R, N], by `definitions`, one layer of one row at a time."""
    layers, rows, _ = state.mass.shape
    keep = (state.position >= 0).clone()
    most = [10**9] * layers
    if config.max_tokens is not None:
        most = definitions.ceilings(name, layers, FLOOR, config.max_tokens, options)
    for row in range(rows):
        if not state.active[row]:
            continue
        ahead = int(state.next_position[row])
        visible = [
            [
                slot
                for slot in range(int(state.length[layer, row]))
                if (window := state.windows[layer]) is None or ahead - int(state.position[layer, row, slot]) < window
            ]
            for layer in range(layers)
        ]
        shares = [10**9] * layers
        if config.budget is not None:
            budget = _tokens(config, state, row)
            if sum(len(slots) + 4 for slots in visible) > budget:
                shares = definitions.caps(name, layers, FLOOR, budget, options)
        for layer, slots in enumerate(visible):
            cap = min(most[layer], shares[layer])
            stay = [True] * len(slots)
            starved = shares[layer] < 10**9
            if len(slots) + 4 > most[layer] or starved:
                one = definitions.Row(
                    layer,
                    layers,
                    state.mass[layer, row, slots].numpy(),
                    state.position[layer, row, slots].numpy(),
                    state.keys(layer)[row, slots].numpy(),
                    ahead,
                    int(state.prompt_length[row]),
                )
                target = cap - 4
                newest = definitions.recent(name, min(target, len(slots)), options, config.recent_ratio)
                value = definitions.scores(name, one, options)
                stay = definitions.keep(value, one, target, newest, config.sink_tokens, config.protect_prompt)
            keep[layer, row] = False
            keep[layer, row, slots] = torch.tensor(stay)
    return keep


def _tokens(config: LetheConfig, state: RoundState, row: int) -> float:
    """What a row's budget comes to, where each token has 64 bytes."""
    if isinstance(config.budget, str):
        return int(config.budget.removesuffix("B")) / 64
    if isinstance(config.budget, int):
        return config.budget
    assert config.budget is not None
    windows = [10**9 if window is None else window for window in state.windows]
    full = sum(min(int(state.next_position[row]) + 4, window) for window in windows)
    prompt = int(state.prompt_length[row]) if config.protect_prompt else 0
    least = sum(FLOOR + min(prompt, window) for window in windows)
    return max(least, math.floor(full * 64 * config.budget) / 64)


# --- choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("caps", [{"max_tokens": 20}, {"budget": 66}, {"budget": 0.4}, {"budget": "4500B"}], ids=str)
def test_the_choice_is_that_of_the_definition(name: str, options: dict[str, Any], caps: dict[str, Any]) -> None:
    evicted = 0
    for seed in range(6):
        extra = {**caps, "protect_prompt": seed % 2 == 0}
        state = random_state(seed, windows=seed % 3 == 0)
        policy = made(name, options, 3, 4, **extra)
        keep = kept(policy, state)
        assert torch.equal(keep, by_definition(name, options, policy.config, state))
        evicted += int((state.length - keep.sum(2)).sum())
    assert evicted > 100, "states in which nothing goes show nothing"


@pytest.mark.parametrize("name", NAMES)
def test_a_row_chooses_in_a_batch_as_it_does_alone(name: str) -> None:
    for seed in range(4):
        state = random_state(seed, rows=5, windows=True)
        together = kept(made(name, {}, 3, 5, budget=66, max_tokens=30), state)
        for row in range(5):
            alone = kept(made(name, {}, 3, 1, budget=66, max_tokens=30), picked(state, row))
            assert torch.equal(together[:, row, : alone.shape[2]], alone[:, 0])
            assert not together[:, row, alone.shape[2] :].any()


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 60)),
    caps=st.sampled_from([{"max_tokens": 14}, {"max_tokens": 25}, {"budget": 0.2}, {"budget": 90, "max_tokens": 50}]),
    limit=st.one_of(st.none(), st.integers(10, 40)),
    windows=st.booleans(),
    protect=st.booleans(),
)
def test_whatever_the_state_the_caps_hold(
    case: tuple[str, dict[str, Any]],
    seed: int,
    shape: tuple[int, int, int],
    caps: dict[str, Any],
    limit: int | None,
    windows: bool,
    protect: bool,
) -> None:
    layers, rows, longest = shape
    state = random_state(seed, layers=layers, rows=rows, longest=longest, windows=windows)
    policy = made(*case, layers, rows, protect_prompt=protect, **caps)
    within = None if limit is None else torch.full((layers, rows), limit)
    keep = kept(policy, state, within)
    valid, count, active = state.position >= 0, keep.sum(2), state.active
    assert not (keep & ~valid).any()
    assert (count >= 1).all(), "never an empty set"
    assert torch.equal(keep[:, ~active], valid[:, ~active]), "rows that are done are left alone"
    assert keep[:, active].gather(2, (state.length[:, active] - 1).unsqueeze(2)).all(), "the newest token stays"
    sinks = valid & (state.position < 2) & state.visible()
    assert (keep | ~sinks).all()
    if "max_tokens" in caps:
        assert (count[:, active] + 4 <= caps["max_tokens"]).all()
    if "budget" in caps:
        most = [_tokens(policy.config, state, row) for row in active.nonzero().flatten().tolist()]
        assert ((count[:, active] + 4).sum(0) <= torch.tensor(most)).all()
    if limit is not None:
        assert (count[:, active] <= limit).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("caps", [{"max_tokens": 24}, {"budget": 50, "max_tokens": 40}, {"budget": 0.5}], ids=str)
def test_caps_hold_in_every_step_between_rounds(name: str, caps: dict[str, Any]) -> None:
    config = LetheConfig(policy=name, **SMALL, **caps)
    decode = Decode(begun(config, 2, 3), [5, 40, 17], [None, None])
    highest = torch.zeros(2, 3, dtype=torch.int64)
    for step, lengths in enumerate(decode.run(12)):
        assert (lengths <= caps.get("max_tokens", 10**9)).all()
        if isinstance(caps.get("budget"), float):
            least = 2 * (FLOOR + torch.tensor([5, 40, 17]))  # with the prompt
            assert (lengths.sum(0) <= torch.maximum(2 * decode.next * caps["budget"], least)).all()
        elif "budget" in caps:
            assert (lengths.sum(0) <= caps["budget"]).all()
        highest = torch.maximum(highest, lengths)
        if step == 30:
            decode.active[1] = False
    if name != "pyramid" and "budget" not in caps:
        assert int(highest.max()) == caps["max_tokens"], "the cap is used to the full"


# --- single rules ---------------------------------------------------------------------------------


def test_pyramid_gives_low_layers_more() -> None:
    policy = made("pyramid", {}, 4, 1, budget=400)
    state = random_state(3, layers=4, rows=1, longest=200)
    state = replace(state, active=torch.ones(1, dtype=torch.bool))
    position = torch.arange(200, dtype=torch.int32).expand(4, 1, 200)
    state = replace(
        state,
        position=position,
        length=torch.full((4, 1), 200),
        next_position=torch.tensor([200]),
        mass=torch.rand(4, 1, 200),
    )
    sizes = kept(policy, state).sum(2).flatten().tolist()
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[3]
    steps = np.diff(sizes)
    assert steps.max() - steps.min() <= 1, "on a line"
    assert sum(sizes) + 4 * 4 <= 400 < sum(sizes) + 4 * 5


def test_rkv_keeps_the_newest_of_tokens_that_are_alike() -> None:
    """Positions 8, 16, 24, … have one key, all others keys of their own; attention is flat."""
    state = random_state(0, layers=1, rows=1, longest=60)
    n = 60
    keys = torch.eye(64)[:n].reshape(1, n, 1, 64).clone()
    alike = list(range(8, 56, 8))
    keys[0, alike] = torch.eye(64)[63]
    state = replace(
        state,
        position=torch.arange(n, dtype=torch.int32).expand(1, 1, n),
        length=torch.tensor([[n]]),
        mass=torch.ones(1, 1, n),
        next_position=torch.tensor([n]),
        prompt_length=torch.tensor([2]),
        active=torch.tensor([True]),
        key_source=lambda layer: keys,
    )
    keep = kept(made("rkv", {}, 1, 1, max_tokens=n - len(alike) + 1 + 4), state)[0, 0]
    assert keep[alike].tolist() == [False] * (len(alike) - 1) + [True]
    assert int(keep.sum()) == n - len(alike) + 1


def test_random_is_seeded_and_draws_anew_in_each_round() -> None:
    state = random_state(1)
    draw = {seed: kept(made("random", {"seed": seed}, 3, 4, max_tokens=16), state) for seed in (0, 1)}
    assert torch.equal(draw[0], kept(made("random", {}, 3, 4, max_tokens=16), state))
    assert not torch.equal(draw[0], draw[1])
    later = replace(state, next_position=state.next_position + 1)
    assert not torch.equal(draw[0], kept(made("random", {}, 3, 4, max_tokens=16), later))


def test_random_draws_are_uniform() -> None:
    n = 4096
    state = replace(
        random_state(1, layers=1, rows=1),
        position=torch.arange(n, dtype=torch.int32).expand(1, 1, n),
        next_position=torch.tensor([n]),
    )
    value = made("random", {}, 1, 1, max_tokens=16).scores(state).flatten() / 2**24
    counts = torch.histc(value, bins=16, min=0, max=1)
    assert counts.sum() == n and ((counts - n / 16).square() / (n / 16)).sum() < 40  # chi square of 15, p < 0.001


@pytest.mark.parametrize(
    ("name", "decay", "peak", "window"),
    [
        ("streaming", None, False, None),
        ("random", None, False, None),
        ("h2o", 1.0, False, None),
        ("tova", 1.0, False, 1),
        ("snapkv", 1.0, False, 32),
        ("pyramid", 1.0, False, 8),
        ("morph", 1.0, False, 32),
        ("rkv", 1.0, False, 8),
    ],
)
def test_what_is_scored(name: str, decay: float | None, peak: bool, window: int | None) -> None:
    policy = make_policy(LetheConfig(policy=name, max_tokens=64))
    assert (policy.decay, policy.peak, policy.observation_window) == (decay, peak, window)


def test_max_fusion_follows_the_peak() -> None:
    assert make_policy(LetheConfig(policy="morph", policy_options={"fusion": "max"}, max_tokens=64)).peak


def test_keys_that_nobody_gave_are_refused() -> None:
    with pytest.raises(LetheError, match="gave no keys"):
        replace(random_state(0), key_source=None).keys(0)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "lethe-rasr"])
def test_without_a_cap_nothing_would_ever_go(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*set max_tokens or budget"):
        make_policy(LetheConfig(policy=name))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rkv", {"importance": 1.5}, r"importance=1.5 is not allowed: must be a number in \[0, 1\]"),
        ("rkv", {"importanse": 0.1}, r"'importanse' is not a setting of policy_options of 'rkv'; .* 'importance'"),
        ("rkv", {"kernel": 4}, "kernel=4 is not allowed: must be an odd integer"),
        ("snapkv", {"pooling": "mean"}, "must be 'avg' or 'max'"),
        ("morph", {"fusion": "avg"}, "must be 'sum' or 'max'"),
        ("pyramid", {"steepness": 0.5}, "steepness=0.5 is not allowed"),
        ("h2o", {"recent": True}, "recent=True is not allowed"),
        ("random", {"seed": -1}, "seed=-1 is not allowed"),
        ("lethe", {"breakpoint": 0}, "breakpoint=0 is not allowed: must be True or False"),
        ("lethe", {"shares": "equal"}, "must be 'density' or 'uniform'"),
        ("streaming", {"window": 3}, "'window' is not a setting of policy_options of 'streaming', which has none"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(LetheConfig(policy=name, policy_options=options, max_tokens=64))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_rule(name: str) -> None:
    policy = make_policy(LetheConfig(policy=name, max_tokens=64))
    assert all("rule" in one.metadata for one in fields(policy.Options))


def test_a_budget_in_bytes_counts_each_layers_own() -> None:
    """Tokens of the second layer take four times as many bytes; both get as many tokens."""
    policy = make_policy(LetheConfig(policy="streaming", budget="10000B", **SMALL))
    policy.begin(2, 4, [40, 160])
    state = replace(random_state(5, layers=2, longest=90), active=torch.ones(4, dtype=torch.bool))
    keep = policy.round(state)
    assert keep is not None
    count = keep.sum(2)
    cost = torch.tensor([[40], [160]])
    starved = ((state.length + 4) * cost).sum(0) > 10000
    assert starved.any()
    assert (((count + 4) * cost).sum(0) <= 10000).all()
    most = 10000 // 200 - 4
    assert (count[:, starved] == torch.minimum(state.length[:, starved], torch.tensor(most))).all()


@pytest.mark.parametrize(
    ("budget", "message"),
    [(27, "an integer >= 28 for 2 layers of at least 14"), ("2799B", "2800 bytes or more for 2 layers")],
)
def test_budgets_below_the_least_are_refused(budget: Any, message: str) -> None:
    policy = make_policy(LetheConfig(policy="streaming", budget=budget, **SMALL))
    with pytest.raises(ConfigError, match=message):
        policy.begin(2, 1, [100, 100])


def test_bytes_need_to_know_what_a_token_takes() -> None:
    policy = make_policy(LetheConfig(policy="streaming", budget="1MiB", **SMALL))
    with pytest.raises(ConfigError, match="nothing says what a token takes"):
        policy.begin(2, 1)

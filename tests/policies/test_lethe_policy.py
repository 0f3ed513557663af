"""Policies over simulated decodes: thresholds, hard caps, the shared budget, windows, batches, the registry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lethe_compile import policies
from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.kernels.select.reference import hoyer_sparsity, select
from lethe_compile.policies import FullPolicy, LethePolicy, Policy, make_policy, register
from lethe_compile.policies.base import NEVER
from lethe_compile.policies.budgets import share_budget
from tests.policies.simulated import Decode, begun, chosen, hold_round, layer

SMALL = LetheConfig(
    sparse_ratio=10.0, segments=4, sink_tokens=2, recent_ratio=0.25, prune_threshold=16, prune_interval=4
)


def flat(n: int) -> list[float]:
    return [1.0] * n


def steep(n: int) -> list[float]:
    """Two strong tokens behind two sinks, and nothing else."""
    return [100.0, 100.0, 50.0, 50.0] + [0.01] * (n - 4)


# --- thresholds -----------------------------------------------------------------------------------


def test_below_the_threshold_nothing_is_looked_at() -> None:
    policy = begun(SMALL, 1, 1)
    assert hold_round(policy, [layer([steep(15)])]) == [None]
    assert policy.sparsity.isnan().all()


def test_no_breakpoint_keeps_everything_and_doubles_that_threshold_only() -> None:
    policy = begun(SMALL, 2, 2)
    selections = hold_round(policy, [layer([flat(16), steep(16)]), layer([flat(15), steep(15)])])
    assert policy.thresholds.tolist() == [[32, 16], [16, 16]]
    assert chosen(selections[0]).pruned.tolist() == [False, True]
    assert chosen(selections[0]).keep[0].all()
    assert selections[1] is None
    assert policy.sparsity[0, 0] == 0 and policy.sparsity[0, 1] > 0.3 and policy.sparsity[1].isnan().all()
    for n, threshold in ((31, 32), (32, 64), (63, 64), (64, 128)):
        hold_round(policy, [layer([flat(n), flat(4)]), layer([flat(4), flat(4)])])
        assert policy.thresholds[0, 0] == threshold


def test_breakpoint_keeps_sinks_salient_and_recent() -> None:
    policy = begun(SMALL, 1, 1)
    selection = chosen(hold_round(policy, [layer([steep(16)])])[0])
    # 14 candidates, first boundary ceil(14 / 4) = 4: two strong ones and the two newest; recent: floor(16 / 4) = 4
    assert selection.keep[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


def test_after_a_prune_the_row_rests_for_an_interval() -> None:
    policy = begun(replace(SMALL, prune_threshold=8), 1, 1)
    kept = int(chosen(hold_round(policy, [layer([steep(40)])])[0]).keep.sum())
    assert kept > 8
    assert hold_round(policy, [layer([steep(kept + 3)])]) == [None]
    assert hold_round(policy, [layer([steep(kept + 4)])]) != [None]


def test_rows_that_are_done_are_left_alone() -> None:
    policy = begun(SMALL, 1, 2)
    selection = chosen(hold_round(policy, [layer([steep(40), steep(40)], active=[False, True], window=20)])[0])
    assert selection.pruned.tolist() == [False, True]
    assert policy.sparsity[0].isnan().tolist() == [True, False]
    assert hold_round(policy, [layer([steep(40), steep(8)], active=[False, True])]) == [None]


def test_prompt_is_protected_by_default() -> None:
    state = layer([steep(40)], prompt=20)
    kept = chosen(hold_round(begun(SMALL, 1, 1), [state])[0]).keep[0]
    assert kept[:20].all() and not kept.all()
    bare = chosen(hold_round(begun(replace(SMALL, protect_prompt=False), 1, 1), [state])[0]).keep[0]
    assert not bare[:20].all()


def test_begin_forgets_the_last_generation() -> None:
    policy = begun(SMALL, 1, 1)
    hold_round(policy, [layer([flat(16)])])
    policy.begin(2, 3)
    assert policy.thresholds.tolist() == [[16] * 3] * 2
    assert policy.sparsity.shape == (2, 3) and policy.sparsity.isnan().all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.sampled_from([0.0, 2.0, 6.0, 20.0]), cap=st.sampled_from([None, 24, 40]))
def test_batched_rounds_equal_a_scalar_state_machine(seed: int, power: float, cap: int | None) -> None:
    """Every layer and row behaves as the rule's text says, written here one row at a time."""
    config = replace(SMALL, max_tokens=cap)
    decode = Decode(begun(config, 2, 3), [3, 12, 30], [None, None], seed=seed, power=power)
    cells = [(i, r) for i in range(2) for r in range(3)]
    threshold, resume = dict.fromkeys(cells, config.prune_threshold), dict.fromkeys(cells, 0)
    for step in range(8):
        decode.active = torch.tensor([True, True, step < 5])
        states, selections = decode.round()
        for i, r in cells:
            state, n = states[i], int(states[i].length[r])
            over = cap is not None and n + config.interval > cap
            expected = state.position[r] >= 0
            if state.active[r] and (n >= max(threshold[i, r], resume[i, r]) or over):
                keep, broke = select(
                    state.mass[r : r + 1],
                    state.position[r : r + 1],
                    state.length[r : r + 1],
                    sparse_ratio=config.sparse_ratio,
                    segments=config.segments,
                    sink_tokens=config.sink_tokens,
                    recent_ratio=config.recent_ratio,
                    protected_length=state.prompt_length[r : r + 1],
                    cap=None if cap is None else torch.tensor([cap - config.interval]),
                )
                expected = keep[0]
                if not broke and n >= threshold[i, r]:
                    threshold[i, r] *= 2
                resume[i, r] = int(expected.sum()) + config.interval
                measured = hoyer_sparsity(state.mass[r : r + 1], state.length[r : r + 1])
                assert decode.policy.sparsity[i, r] == measured[0]
            selection = selections[i]
            actual = state.position[r] >= 0 if selection is None else selection.keep[r]
            assert torch.equal(actual, expected)
            assert decode.policy.thresholds[i, r] == threshold[i, r]
        for _ in range(config.interval):
            decode.step()


# --- hard caps ------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    power=st.sampled_from([0.0, 1.0, 6.0]),
    slack=st.integers(0, 20),
    literal=st.booleans(),
    protect=st.booleans(),
)
def test_max_tokens_is_never_exceeded(seed: int, power: float, slack: int, literal: bool, protect: bool) -> None:
    cap = SMALL.cap_floor + slack
    config = replace(SMALL, max_tokens=cap, paper_literal=literal, protect_prompt=protect)
    decode = Decode(begun(config, 2, 3), [5, 70, 33], [None, 12], seed=seed, power=power)
    for step, lengths in enumerate(decode.run(10)):
        assert (lengths <= cap).all()
        newest = [rows[-1] for rows in decode.positions[0]]
        assert newest == (decode.next - 1).tolist()
        if step == 22:
            decode.active[1] = False
    assert decode.policy.thresholds.max() <= 2 * 70  # rounds forced by the cap do not double it for ever


def test_cap_is_used_to_the_full_when_nothing_else_prunes() -> None:
    config = replace(SMALL, max_tokens=40)
    decode = Decode(begun(config, 1, 1), [10], [None], power=0.0)
    assert max(int(lengths.max()) for lengths in decode.run(15)) == 40


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    power=st.sampled_from([0.0, 1.0, 6.0]),
    slack=st.integers(0, 120),
    cap=st.sampled_from([None, 30]),
    literal=st.booleans(),
)
def test_budget_is_never_exceeded(seed: int, power: float, slack: int, cap: int | None, literal: bool) -> None:
    budget = 3 * SMALL.cap_floor + slack
    config = replace(SMALL, budget=budget, max_tokens=cap, paper_literal=literal)
    decode = Decode(begun(config, 3, 2), [60, 9], [None, None, 16], seed=seed, power=power)
    for lengths in decode.run(10):
        assert (lengths.sum(0) <= budget).all()
        assert cap is None or (lengths <= cap).all()


def test_budget_is_not_touched_while_it_suffices() -> None:
    decode = Decode(begun(replace(SMALL, budget=200), 2, 1), [10], [None, None], power=0.0)
    seen = list(decode.run(22))  # flat scores: only the budget can prune
    assert torch.equal(seen[87], torch.tensor([[98], [98]]))
    assert max(int(lengths.sum()) for lengths in seen) <= 200


def test_a_layer_above_its_share_is_not_trimmed_while_the_budget_suffices() -> None:
    policy = begun(replace(SMALL, budget=100), 2, 1)
    assert hold_round(policy, [layer([flat(80)]), layer([flat(8)])]) == [None, None]


def test_dense_layers_get_more_of_the_budget() -> None:
    config = replace(SMALL, budget=100, sparse_ratio=1e9)  # no breakpoint: only the budget prunes
    policy = begun(config, 2, 1)
    selections = hold_round(policy, [layer([flat(80)]), layer([steep(80)])])
    dense, sparse = (int(chosen(selection).keep.sum()) for selection in selections)
    caps = share_budget(100, 1 - policy.sparsity, config.cap_floor).flatten().tolist()
    assert (dense, sparse) == (caps[0] - 4, caps[1] - 4)
    assert dense > 2 * sparse


def test_budget_below_the_floor_of_all_layers_is_refused() -> None:
    policy = make_policy(replace(SMALL, budget=3 * SMALL.cap_floor - 1))
    policy.begin(2, 1)
    with pytest.raises(ConfigError, match=r"budget=41 .* >= 42 for 3 layers of at least 14"):
        policy.begin(3, 1)


@settings(max_examples=200, deadline=None)
@given(
    density=st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=40),
    floor=st.integers(1, 60),
    spare=st.integers(0, 10**7),
)
def test_shares(density: list[float], floor: int, spare: int) -> None:
    budget = floor * len(density) + spare
    columns = torch.tensor([density, density[::-1]]).T  # two rows of the batch
    caps = share_budget(budget, columns, floor)
    first, second = caps.T.tolist()
    assert first == second[::-1]
    assert budget - len(density) <= sum(first) <= budget
    assert min(first) >= floor
    by_density = [cap for _, cap in sorted(zip(density, first, strict=True))]
    assert by_density == sorted(by_density)
    assert torch.equal(caps, share_budget(budget, columns, floor))


# --- rounds for lack of pages ---------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    power=st.sampled_from([0.0, 1.0, 6.0]),
    limit=st.integers(SMALL.cap_floor - SMALL.interval, 60),
    literal=st.booleans(),
)
def test_a_limit_holds_and_adapts_nothing(seed: int, power: float, limit: int, literal: bool) -> None:
    """It follows an ordinary round, and leaves finished rows, and rows within it, as they are."""
    config = replace(SMALL, paper_literal=literal, prune_threshold=30)
    decode = Decode(begun(config, 2, 3), [5, 70, 33], [None, 12], seed=seed, power=power)
    decode.active[2] = False
    decode.round()
    thresholds, before = decode.policy.thresholds.clone(), decode.lengths()
    decode.round(torch.full((2, 3), limit))
    after = decode.lengths()
    assert (after[:, :2] <= limit).all()
    assert torch.equal(after[:, 2], before[:, 2])
    assert literal or torch.equal(after[before <= limit], before[before <= limit])
    assert torch.equal(decode.policy.thresholds, thresholds)
    for rows in decode.positions:
        assert [rows[r][-1] for r in range(2)] == (decode.next[:2] - 1).tolist(), "the newest token stays"
    assert decode.positions[0][1][: SMALL.sink_tokens] == list(range(SMALL.sink_tokens)), "and so do the sinks"


def test_a_limit_takes_the_tokens_that_a_cap_would() -> None:
    scores = [float(j % 11) for j in range(60)]
    capped = replace(SMALL, max_tokens=24, sparse_ratio=1e9)
    expected = chosen(hold_round(begun(capped, 1, 1), [layer([scores], prompt=20)])[0]).keep
    policy = begun(replace(SMALL, sparse_ratio=1e9), 1, 1)
    limited = chosen(hold_round(policy, [layer([scores], prompt=20)], torch.tensor([[20]]))[0]).keep
    assert torch.equal(limited, expected) and int(limited.sum()) == 20


def test_full_cannot_be_pressed() -> None:
    policy = begun(replace(SMALL, policy="full"), 1, 1)
    assert hold_round(policy, [layer([flat(40)])], torch.tensor([[10]])) == [None]


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "lethe"])
@pytest.mark.parametrize("window", [1, 5, 11])
def test_window_trim_loses_nothing_a_query_can_see(name: str, window: int) -> None:
    config = replace(SMALL, policy=name, sparse_ratio=1e9)
    decode = Decode(begun(config, 2, 2), [3, 25], [window, None])
    for _ in range(6):
        decode.round()
        for r, upcoming in enumerate(decode.next.tolist()):
            assert decode.positions[0][r] == list(range(max(0, upcoming - window + 1), upcoming))
            assert decode.positions[1][r] == list(range(upcoming))
        for _ in range(config.interval):
            decode.step()


def test_hidden_tokens_count_for_nothing() -> None:
    """A layer with a window decides as if it held the visible tokens alone."""
    scores = [1e6] * 30 + [0.0, 1.0, 9.0, 80.0, 0.1] * 5
    windowed, visible = layer([scores], window=26), layer([scores])
    visible = replace(
        visible,
        mass=visible.mass[:, 30:],
        position=visible.position[:, 30:],
        length=visible.length - 30,
    )
    policies_ = [begun(SMALL, 1, 1), begun(SMALL, 1, 1)]
    outer, inner = (chosen(hold_round(p, [s])[0]) for p, s in zip(policies_, (windowed, visible), strict=True))
    assert not outer.keep[0, :30].any() and not inner.keep.all()
    assert torch.equal(outer.keep[0, 30:], inner.keep[0])
    assert torch.equal(policies_[0].sparsity, policies_[1].sparsity)


def test_full_without_windows_touches_nothing() -> None:
    policy = begun(replace(SMALL, policy="full", max_tokens=32), 2, 1)
    assert policy.decay is None
    assert hold_round(policy, [layer([steep(99)]), layer([steep(99)], window=100)]) == [None, None]
    assert (policy.thresholds == NEVER).all() and policy.sparsity.isnan().all()


# --- paper_literal --------------------------------------------------------------------------------


def test_literal_batch_shares_one_keep_set() -> None:
    """The loud row's scores decide for the quiet one; by default each decides for itself."""
    loud = [0.0] * 8 + [500.0] * 4 + [0.0] * 12
    quiet = [0.0] * 4 + [5.0] * 4 + [0.0] * 8
    literal = replace(SMALL, paper_literal=True, recent_ratio=0.1, sink_tokens=0, segments=6)
    own = chosen(hold_round(begun(replace(literal, paper_literal=False), 1, 2), [layer([loud, quiet])])[0]).keep
    shared = chosen(hold_round(begun(literal, 1, 2), [layer([loud, quiet])])[0]).keep
    assert own[0, 8:12].all() and own[1, 4:8].all()
    assert shared[0, 8:12].all() and not shared[1, 4:8].any()
    assert torch.equal(shared[0, 8:], shared[1, :16])  # the same columns, counted from the newest token
    assert not shared[1, 16:].any()


def test_literal_rows_that_are_done_do_not_vote() -> None:
    loud = [0.0] * 12 + [500.0] * 4 + [0.0] * 16
    quiet = [0.0] * 4 + [5.0] * 4 + [0.0] * 8
    config = replace(SMALL, paper_literal=True)
    policy = begun(config, 1, 2)
    selection = chosen(hold_round(policy, [layer([loud, quiet], active=[False, True])])[0])
    alone = chosen(hold_round(begun(config, 1, 1), [layer([quiet])])[0])
    assert selection.keep[0].all()
    assert torch.equal(selection.keep[1, :16], alone.keep[0]) and not alone.keep.all()


def test_literal_sparsity_is_that_of_the_sum() -> None:
    """Two rows that are each sparse add up to flat scores."""
    policy = begun(replace(SMALL, paper_literal=True), 1, 2)
    hold_round(policy, [layer([[1.0, 0.0] * 8, [0.0, 1.0] * 8])])
    assert policy.sparsity.tolist() == [[0.0, 0.0]]


def test_literal_thresholds_follow_the_longest_row() -> None:
    policy = begun(replace(SMALL, paper_literal=True), 1, 3)
    assert hold_round(policy, [layer([flat(8), flat(15), flat(40)], active=[True, True, False])]) == [None]
    hold_round(policy, [layer([flat(8), flat(16), flat(40)], active=[True, True, False])])
    assert policy.thresholds.tolist() == [[32, 32, 16]]


# --- registry -------------------------------------------------------------------------------------


class Halving(FullPolicy):
    name = "halving"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_registry", dict(policies._registry))


def test_builtin_policies_by_name() -> None:
    assert type(make_policy(LetheConfig())) is LethePolicy
    assert type(make_policy(LetheConfig(policy="full"))) is FullPolicy
    assert make_policy(LetheConfig(decay=0.9)).decay == 0.9


@pytest.mark.usefixtures("registry")
def test_registered_policy() -> None:
    with pytest.raises(ConfigError, match=r"policy='halving' is not allowed: must be one of full, .*h2o, .*lethe, "):
        make_policy(LetheConfig(policy="halving"))
    assert register(Halving) is Halving and register(Halving) is Halving
    assert type(make_policy(LetheConfig(policy="halving"))) is Halving


@pytest.mark.usefixtures("registry")
def test_a_name_has_one_owner() -> None:
    with pytest.raises(ConfigError, match="'full' belongs to FullPolicy"):
        register(type("Impostor", (FullPolicy,), {}))


def test_unknown_policy_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lethe'"):
        make_policy(LetheConfig(policy="leth"))


def test_plugins_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        name = "halving"

        @staticmethod
        def load() -> type[Policy]:
            return Halving

    def installed(*, group: str) -> list[Any]:
        assert group == "lethe_compile.policies"
        return [Plugin]

    monkeypatch.setattr(policies, "entry_points", installed)
    assert type(make_policy(LetheConfig(policy="halving"))) is Halving
    with pytest.raises(ConfigError, match=r"full, .*h2o, halving, lethe"):
        make_policy(LetheConfig(policy="none"))

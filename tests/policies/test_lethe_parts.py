"""Lethe with a part switched off: what each switch changes, and what it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lethe_compile.config import LetheConfig
from lethe_compile.policies import LethePolicy, make_policy
from tests.policies.simulated import Decode, begun, chosen, hold_round, layer

SMALL: dict[str, Any] = {
    "sparse_ratio": 10.0,
    "segments": 4,
    "sink_tokens": 2,
    "recent_ratio": 0.25,
    "prune_threshold": 16,
    "prune_interval": 4,
}
STEEP = [100.0, 100.0, 50.0, 50.0] + [0.01] * 36  # two strong tokens behind two sinks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lethe-budgets", {"choice": "recent"}),
        ("lethe-rasr", {"breakpoint": False, "shares": "uniform"}),
        ("lethe-uniform", {"shares": "uniform"}),
    ],
)
def test_names_stand_for_options(name: str, options: dict[str, Any]) -> None:
    caps = {"max_tokens": 30, "budget": 50}
    named = Decode(begun(LetheConfig(policy=name, **SMALL, **caps), 2, 2), [5, 40], [None, None])
    spelled = Decode(begun(LetheConfig(policy_options=options, **SMALL, **caps), 2, 2), [5, 40], [None, None])
    whole = Decode(begun(LetheConfig(**SMALL, **caps), 2, 2), [5, 40], [None, None])
    for _ in zip(named.run(12), spelled.run(12), whole.run(12), strict=True):
        pass
    assert named.positions == spelled.positions != whole.positions


def test_budgets_only_keeps_as_many_tokens_but_the_newest() -> None:
    state = [layer([STEEP]), layer([[1.0] * 40])]
    scored = hold_round(begun(LetheConfig(**SMALL), 2, 1), state)
    newest = hold_round(begun(LetheConfig(policy="lethe-budgets", **SMALL), 2, 1), state)
    assert scored[1] is None and newest[1] is None, "flat scores have no breakpoint, whoever is chosen"
    kept, expected = chosen(newest[0]).keep[0], chosen(scored[0]).keep[0]
    count = int(expected.sum())
    assert expected[2:4].all() and not kept[2:4].any()
    assert kept.nonzero().flatten().tolist() == [0, 1, *range(40 - count + 2, 40)]


def test_rasr_only_prunes_at_caps_alone_and_by_score() -> None:
    config = LetheConfig(policy="lethe-rasr", max_tokens=40, **SMALL)
    assert hold_round(begun(config, 1, 1), [layer([STEEP[:36]])]) == [None], "steep scores, and room"
    kept = chosen(hold_round(begun(config, 1, 1), [layer([STEEP])])[0]).keep[0]
    assert int(kept.sum()) == 36 and kept[:4].all()


def test_rasr_only_gives_every_layer_as_much() -> None:
    config = LetheConfig(policy="lethe-rasr", budget=60, **SMALL)
    policy = begun(config, 2, 1)
    selections = hold_round(policy, [layer([STEEP]), layer([[1.0] * 40])])
    assert [int(chosen(one).keep.sum()) for one in selections] == [26, 26]
    assert not policy.sparsity.isnan().any()


def test_uniform_shares_ignore_density() -> None:
    config = {**SMALL, "sparse_ratio": 1e9, "budget": 60}
    layers = [layer([STEEP]), layer([[1.0] * 40])]
    for name, equal in (("lethe", False), ("lethe-uniform", True)):
        selections = hold_round(begun(LetheConfig(policy=name, **config), 2, 1), layers)
        counts = [int(chosen(one).keep.sum()) for one in selections]
        assert (counts[0] == counts[1]) == equal


def test_the_whole_is_the_default() -> None:
    policy = make_policy(LetheConfig())
    assert isinstance(policy, LethePolicy)
    assert policy.options.to_dict() == {"breakpoint": True, "choice": "score", "shares": "density"}


@pytest.mark.parametrize("name", ["lethe", "lethe-budgets", "lethe-rasr", "lethe-uniform"])
@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("budget", [60, 0.3, "3840B"])
def test_budgets_of_every_kind_hold_in_every_step(name: str, literal: bool, budget: Any) -> None:
    config = LetheConfig(policy=name, paper_literal=literal, budget=budget, **SMALL)
    policy = make_policy(config)
    decode = Decode(policy, [5, 40], [None, None])
    for lengths in decode.run(12):
        most = torch.tensor([60, 60])
        if budget == 0.3:
            most = torch.maximum(
                2 * decode.next * 0.3, 2 * (config.cap_floor + torch.tensor([5, 40]))
            )  # with the prompt
        if literal and budget == 0.3:
            most = most.amax().expand(2)  # the batch counts as one row
        assert (lengths.sum(0) <= most).all()

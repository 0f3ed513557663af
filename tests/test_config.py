"""Configuration: every field refuses what it cannot use, and says so."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest

from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError, LetheError, UnsupportedGraphError, VerificationError

REFUSED: dict[str, list[Any]] = {
    "policy": ["", None, 3, True],
    "policy_options": [None, "importance=1", 3, [("a", 1)], {1: 2}],
    "sparse_ratio": [1, 1.0, 0.5, -400.0, math.nan, math.inf, "400", True, None],
    "recent_ratio": [-0.1, 1.01, math.nan, "0.3", False, None],
    "segments": [1, 0, -8, 1025, 8.0, True, "8", None],
    "decay": [0, 0.0, -0.5, 1.01, math.nan, "0.9", True, None],
    "score": ["max", "", None, True],
    "sink_tokens": [-1, 1025, 4.0, True, None],
    "prune_threshold": [0, -128, 128.0, True, "128", None],
    "prune_interval": [0, -1, 32.0, True],
    "max_tokens": [0, -1, 19, 512.0, True, "512"],  # 19 = 8 + 4 + 8 - 1
    "budget": [0, -1, 4096.0, 0.0, -0.5, math.nan, True, "4096", "0B", "64 mib", "MiB", "-1MiB", "0.1B"],
    "paper_literal": [0, 1, "yes", None],
    "protect_prompt": [0, 1, "no", None],
    "cache_latent": [0, 1, "no", None],
    "page_size": [0, 3, 12, 512, -16, 16.0, True],
}

ACCEPTED: dict[str, list[Any]] = {
    "policy": ["full", "mine"],
    "policy_options": [{}, {"importance": 0.1}],
    "sparse_ratio": [1.01, 2, 1e30],
    "recent_ratio": [0, 0.0, 1, 1.0],
    "segments": [2, 1024],
    "decay": [1e-6, 1, 1.0],
    "score": ["peak", "sum"],
    "sink_tokens": [0, 1024],
    "prune_threshold": [1, 10**9],
    "prune_interval": [None, 1, 10**6],
    "max_tokens": [None, 44, 10**9],
    "budget": [None, 1, 10**12, 0.125, 1.0, "64MiB", "1.5 GB", "800kB", "7B"],
    "paper_literal": [True, False],
    "protect_prompt": [True, False],
    "cache_latent": [True, False],
    "page_size": [1, 2, 16, 256, None],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_refuses(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        LetheConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} is not allowed: must be ")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, LetheError)


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_accepts(name: str, value: Any) -> None:
    assert getattr(LetheConfig(**{name: value}), name) == value


def test_every_field_is_covered() -> None:
    names = {field.name for field in dataclasses.fields(LetheConfig)}
    assert names == set(REFUSED) == set(ACCEPTED)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("recent_ratio", 1.5, "a number in [0, 1]"),
        ("segments", 1, "an integer in 2..1024"),
        ("page_size", 12, "a power of two in 1..256"),
        ("max_tokens", 19, "None or an integer >= 20 (prune_interval 8 + sink_tokens 4 + 8)"),
    ],
)
def test_message_states_the_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LetheConfig(**{name: value})
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "cpu", "gpu"),
    [
        ({}, 32, 128),
        ({"max_tokens": 20}, 8, 8),
        ({"max_tokens": 192}, 24, 24),
        ({"max_tokens": 512}, 32, 64),
        ({"max_tokens": 4096}, 32, 128),
        ({"budget": 10**5}, 32, 32),
        ({"prune_interval": 7, "max_tokens": 4096}, 7, 7),
    ],
    ids=str,
)
def test_interval_on_a_device(settings: dict[str, int], cpu: int, gpu: int) -> None:
    config = LetheConfig(**settings)
    assert (config.interval_on("cpu"), config.interval_on("cuda")) == (cpu, gpu)
    assert dataclasses.replace(config, prune_interval=gpu).cap_floor == gpu + 12, "the cap has room for it"


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LetheConfig().decay = 0.5  # type: ignore[misc]


def test_paper_values() -> None:
    paper = LetheConfig.paper()
    assert (paper.policy, paper.sparse_ratio, paper.recent_ratio) == ("lethe", 400.0, 0.3)
    assert paper.score == "sum"
    assert paper.paper_literal and not paper.protect_prompt
    assert paper.max_tokens is None and paper.budget is None


def test_dict_round_trip_through_json() -> None:
    config = LetheConfig(sparse_ratio=20.0, max_tokens=512, budget=4096, protect_prompt=False)
    assert LetheConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LetheConfig.from_dict({}) == LetheConfig()


@pytest.mark.parametrize(
    ("key", "nearest"), [("sparse_ration", "sparse_ratio"), ("maxtokens", "max_tokens"), ("sinks", "sink_tokens")]
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}'.*'{nearest}'"):
        LetheConfig.from_dict({key: 1})


def test_unknown_key_far_from_all_is_still_refused() -> None:
    with pytest.raises(ConfigError, match="'zzz' is not a setting"):
        LetheConfig.from_dict({"zzz": 1})


def test_from_dict_checks_values() -> None:
    with pytest.raises(ConfigError, match="decay=2"):
        LetheConfig.from_dict({"decay": 2})


def test_graph_error_composes_where_and_what_to_do() -> None:
    error = UnsupportedGraphError(
        "Scale is not a constant", layer=3, node="mul_7", where="model.py:12", hint="Pass it."
    )
    assert str(error) == "Scale is not a constant (layer 3, node mul_7, at model.py:12). Pass it."
    assert str(UnsupportedGraphError("No attention found")) == "No attention found"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_verification_error_names_the_passes() -> None:
    error = VerificationError("Shape changed", pass_name="insert", earlier=["normalize", "locate"], node="add")
    assert str(error) == "Shape changed (pass insert, after normalize, locate, node add)"

"""Policies, their options and budgets as a command line gives them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.policies import make_policy
from lethe_compile.tools import _policies


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("0.125", 0.125), ("1.0", 1.0), ("64MiB", "64MiB"), ("1.5 GB", "1.5 GB")]
)
def test_budgets_of_every_kind(text: str, value: Any) -> None:
    read = _policies.budget(text)
    assert (read, type(read)) == (value, type(value))
    assert LetheConfig(budget=read).budget == value


def test_options_are_those_of_the_policy() -> None:
    parser = argparse.ArgumentParser()
    _policies.add_arguments(parser)
    given = parser.parse_args(["--policy", "rkv", "--policy-option", "importance=0.2", "--policy-option", "window=4"])
    options = _policies.options_of(given.policy_option)
    assert options == {"importance": 0.2, "window": 4}
    policy = make_policy(LetheConfig(policy=given.policy, policy_options=options, max_tokens=64))
    assert (policy.options.importance, policy.options.window) == (0.2, 4)
    assert _policies.options_of(["pooling=max", "breakpoint=false"]) == {"pooling": "max", "breakpoint": False}
    assert "streaming" in parser.format_help()


@pytest.mark.parametrize(
    ("given", "message"),
    [(["importance"], "must be NAME=VALUE"), (["=3"], "must be NAME=VALUE"), (["a=1", "a=2"], "twice")],
)
def test_options_that_cannot_be_read(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _policies.options_of(given)

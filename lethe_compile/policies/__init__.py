"""Eviction policies by name: the built-in ones, those registered here, and installed plugins.

A plugin package names its class under the entry point group `lethe_compile.policies`.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.policies.base import Policy, RoundState
from lethe_compile.policies.budgeted import BudgetedPolicy, RankedPolicy
from lethe_compile.policies.full import FullPolicy
from lethe_compile.policies.h2o import H2OPolicy
from lethe_compile.policies.lethe import LethePolicy
from lethe_compile.policies.lethe_variants import BudgetsOnlyPolicy, HeadsPolicy, RasrOnlyPolicy, UniformPolicy
from lethe_compile.policies.morph import MorphPolicy
from lethe_compile.policies.pyramid import PyramidPolicy
from lethe_compile.policies.random import RandomPolicy
from lethe_compile.policies.rkv import RkvPolicy
from lethe_compile.policies.snapkv import SnapKVPolicy
from lethe_compile.policies.streaming import StreamingPolicy
from lethe_compile.policies.tova import TovaPolicy

__all__ = [
    "BudgetedPolicy", "FullPolicy", "LethePolicy", "Policy", "RankedPolicy", "RoundState", "make_policy",
    "policy_names", "register",
]  # fmt: skip

ENTRY_POINT_GROUP = "lethe_compile.policies"

_registry: dict[str, type[Policy]] = {}

P = TypeVar("P", bound=Policy)


def register(cls: type[P]) -> type[P]:
    """Make a policy available under `cls.name`; usable as a decorator.

    Raises:
        ConfigError: another class has that name.
    """
    holder = _registry.setdefault(cls.name, cls)
    if holder is not cls:
        raise ConfigError(f"policy name {cls.name!r} belongs to {holder.__qualname__}; give {cls.__qualname__} another")
    return cls


def make_policy(config: LetheConfig) -> Policy:
    """A fresh policy as `config.policy` names it.

    Raises:
        ConfigError: nobody registered that name, of which the message lists the known ones; what is installed under it
            is no policy; or the config cannot serve the policy.
    """
    if config.policy in _registry:
        return _registry[config.policy](config)
    plugins = [plugin for plugin in entry_points(group=ENTRY_POINT_GROUP) if plugin.name == config.policy]
    if plugins:
        return _load(plugins)(config)
    known = policy_names()
    nearest = get_close_matches(config.policy, known, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ConfigError(f"policy={config.policy!r} is not allowed: must be one of {', '.join(known)}{hint}")


def _load(plugins: Sequence[EntryPoint]) -> type[Policy]:
    """The class behind the one entry point that there should be."""
    name = plugins[0].name
    if len(plugins) > 1:
        where = " and ".join(plugin.value for plugin in plugins)
        raise ConfigError(f"policy={name!r} is installed twice, from {where}: uninstall one")
    cls = plugins[0].load()
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise ConfigError(
            f"policy={name!r} is installed from {plugins[0].value}, which is no subclass of Policy: {cls!r}"
        )
    return cls


def policy_names() -> list[str]:
    """All names that `LetheConfig.policy` may be: built in, registered, installed."""
    return sorted({*_registry, *(plugin.name for plugin in entry_points(group=ENTRY_POINT_GROUP))})


for _policy in (
    LethePolicy,
    BudgetsOnlyPolicy,
    RasrOnlyPolicy,
    UniformPolicy,
    HeadsPolicy,
    FullPolicy,
    StreamingPolicy,
    H2OPolicy,
    TovaPolicy,
    SnapKVPolicy,
    PyramidPolicy,
    MorphPolicy,
    RkvPolicy,
    RandomPolicy,
):
    register(_policy)

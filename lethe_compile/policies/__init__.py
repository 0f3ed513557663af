"""Eviction policies by name: the built-in ones, those registered here, and installed plugins.

A plugin package names its class under the entry point group `lethe_compile.policies`.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import TypeVar

from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.policies.base import Policy, RoundState
from lethe_compile.policies.full import FullPolicy
from lethe_compile.policies.lethe import LethePolicy

__all__ = ["FullPolicy", "LethePolicy", "Policy", "RoundState", "make_policy", "register"]

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
        ConfigError: nobody registered that name; the message lists the known ones.
    """
    if config.policy in _registry:
        return _registry[config.policy](config)
    plugins = {plugin.name: plugin for plugin in entry_points(group=ENTRY_POINT_GROUP)}
    if config.policy in plugins:
        cls: type[Policy] = plugins[config.policy].load()
        return cls(config)
    known = sorted({*_registry, *plugins})
    nearest = get_close_matches(config.policy, known, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ConfigError(f"policy={config.policy!r} is not allowed: must be one of {', '.join(known)}{hint}")


register(LethePolicy)
register(FullPolicy)

"""Settings that say what they accept: dataclasses whose fields are checked when one is made, by one kind of message.

`LetheConfig` is one; the options of a policy, built in or of a plugin, are another:

    @dataclass(frozen=True)
    class MyOptions(Settings):
        strength: float = setting(0.5, number("in [0, 1]", lambda v: 0 <= v <= 1))
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from lethe_compile.errors import ConfigError, InputError


@dataclass(frozen=True)
class Rule:
    """Which values a field accepts, in code and in words that follow "must be"."""

    allowed: str
    accepts: Callable[[Any], bool]


def setting(default: Any, rule: Rule, **options: Any) -> Any:
    """A dataclass field with a default whose values `Settings` checks by `rule`; `options` go to `dataclasses.field`.

    A mutable default is given as ``default_factory``, and `default` is then None.
    """
    given = options if "default_factory" in options else {"default": default, **options}
    return field(metadata={"rule": rule}, **given)


S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of a frozen dataclass of settings.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            rule = one.metadata.get("rule")
            if rule is not None and not rule.accepts(getattr(self, one.name)):
                raise ConfigError(f"{one.name}={getattr(self, one.name)!r} is not allowed: must be {rule.allowed}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[S], values: Mapping[str, Any], owner: str | None = None) -> S:
        """Build from field names and values; fields left out take their defaults. `owner` is named in messages.

        Raises:
            ConfigError: an unknown key, or a value that is not allowed.
        """
        owner = owner or cls.__name__
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                if not known:
                    raise ConfigError(f"{key!r} is not a setting of {owner}, which has none")
                nearest = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"{key!r} is not a setting of {owner}; the nearest is {nearest!r}, of {', '.join(known)}"
                )
        return cls(**values)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int to Python, never to a user


def integer(low: int, high: int | None = None) -> Rule:
    span = f">= {low}" if high is None else f"in {low}..{high}"
    return Rule(f"an integer {span}", lambda v: is_integer(v) and low <= v and (high is None or v <= high))


def number(allowed: str, within: Callable[[float], bool]) -> Rule:
    return Rule(f"a number {allowed}", lambda v: (is_integer(v) or isinstance(v, float)) and within(v))


SHARE = number("in [0, 1]", lambda v: 0 <= v <= 1)


def one_of(*names: str) -> Rule:
    return Rule(" or ".join(map(repr, names)), lambda v: isinstance(v, str) and v in names)


def optional(rule: Rule) -> Rule:
    return Rule(f"None or {rule.allowed}", lambda v: v is None or rule.accepts(v))


BOOL = Rule("True or False", lambda v: isinstance(v, bool))


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises:
        InputError: it cannot be read, or is not TOML; says where.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, which names line and column, or not UTF-8
        raise InputError(f"{path}: {error}") from error

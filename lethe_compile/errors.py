"""Every error that Lethe Compile raises on purpose.

All derive from `LetheError`. A message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class LetheError(Exception):
    """Base of all errors raised by Lethe Compile."""


class ConfigError(LetheError, ValueError):
    """A setting has the wrong type, is out of range, or contradicts another one.

    The message names the field, the value given, and what is allowed.
    """


class InputError(LetheError, ValueError):
    """Inputs to `forward` or `generate` that the compiled model cannot run."""


class WholeOnlyError(InputError):
    """A checkpoint that cannot be read part by part; loaded as a whole, it may well work. The message says why."""


class OutOfPagesError(LetheError, RuntimeError):
    """The page pool has a hard limit, and that limit is reached."""


class EngineBusyError(LetheError, RuntimeError):
    """As many requests wait as the engine may queue: try again later."""


class EngineClosedError(LetheError, RuntimeError):
    """The engine takes no requests any more: it was closed, or it failed, and then the cause is attached."""


class ArtifactError(LetheError):
    """An exported directory that cannot be loaded: damaged, too new, made for another device or vocabulary."""


class MissingPackageError(LetheError):
    """A package that a format needs is not installed; `package` is its name. What could be done without it is done."""

    def __init__(self, message: str, package: str) -> None:
        super().__init__(message)
        self.package = package


class UnsupportedGraphError(LetheError):
    """The captured graph holds something that cannot be rewritten safely.

    `layer` is the attention site in graph order, `node` an FX node's name, `where` a source
    location or module path, `hint` what the user can do.
    """

    def __init__(
        self,
        reason: str,
        *,
        layer: int | None = None,
        node: str | None = None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.layer, self.node, self.where, self.hint = reason, layer, node, where, hint

    def __str__(self) -> str:
        place = [
            f"layer {self.layer}" if self.layer is not None else "",
            f"node {self.node}" if self.node else "",
            f"at {self.where}" if self.where else "",
        ]
        return _compose(self.reason, place, self.hint)


class VerificationError(LetheError):
    """A pass left the graph broken: names that pass, the passes that ran before it, and the node."""

    def __init__(
        self,
        reason: str,
        *,
        pass_name: str | None = None,
        earlier: Sequence[str] = (),
        node: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.pass_name, self.earlier, self.node = reason, pass_name, tuple(earlier), node

    def __str__(self) -> str:
        place = [
            f"pass {self.pass_name}" if self.pass_name else "",
            f"after {', '.join(self.earlier)}" if self.earlier else "",
            f"node {self.node}" if self.node else "",
        ]
        return _compose(self.reason, place, None)


def _compose(reason: str, place: Sequence[str], hint: str | None) -> str:
    """`reason (a, b). hint`, leaving out what is empty."""
    where = ", ".join(part for part in place if part)
    message = f"{reason} ({where})" if where else reason
    return f"{message.rstrip('.')}. {hint}" if hint else message

"""Where the inputs of a torch.compile graph come from: Dynamo's paths, read in the frame that is being compiled."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lethe_compile.capture.graph import ROLES

# Of a path such as L['kwargs']['past_key_values'].layers[0].keys
_PART = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")


def frame_scope() -> dict[str, Any]:
    """The variables of the frame that is being compiled, by the letters that Dynamo's paths begin with."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    return {"L": output.local_scope, "G": output.global_scope}


def path_of(source: Any) -> str:
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def owner_of(source: Any, scope: Mapping[str, Any]) -> nn.Module | None:
    """The outermost module that an input is reached through."""
    chain = []
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    for link in reversed(chain):
        try:
            value = eval(path_of(link), dict(scope))  # Dynamo's own expression for it
        except (NameError, AttributeError, KeyError, IndexError, TypeError, SyntaxError):
            continue  # a path by Dynamo's helpers
        if isinstance(value, nn.Module):
            return value
    return None


def argument_of(path: str, scope: Mapping[str, Any], model: nn.Module | None) -> tuple[str, ...]:
    """The argument of the model's forward that a path means, and the path within it."""
    parts = [next(part for part in match if part) for match in _PART.findall(path)] or [path]
    container = scope["L"].get(parts[0]) if path.startswith("L[") else None
    if len(parts) > 1 and isinstance(container, dict) and parts[0] not in ROLES["attention_mask"]:
        return tuple(parts[1:])
    if len(parts) > 1 and isinstance(container, tuple) and parts[1].isdigit() and model is not None:
        names = list(inspect.signature(model.forward).parameters)
        index = int(parts[1])
        return (names[index] if index < len(names) else parts[1], *parts[2:])
    return tuple(parts)

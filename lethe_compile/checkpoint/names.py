"""Which tensors of a checkpoint make up which weight of a model of transformers, as `from_pretrained` would have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lethe_compile.checkpoint.stored import Joined, Source, Stacked, Stored, whole
from lethe_compile.errors import InputError, WholeOnlyError

_ROWS = 1 << 12  # compared at a time


def sources_of(model: Any, stored: Mapping[str, Stored]) -> dict[str, Source]:
    """The sources of a model's weights, by their names in its state dict; names that it does not know are left out.

    Transformers' own renamings apply, and of its conversions those that stack and concatenate (experts, fused gates).

    Raises:
        WholeOnlyError: a weight is converted in another way.
        InputError: tensors that belong together do not fit.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    entries = get_model_conversion_mapping(model)
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in entries if not isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Source] = {}
    converted: dict[str, tuple[Any, dict[str, list[Source]]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            continue
        if pattern is None:
            found[name] = stored[key]
        else:
            _, parts = converted.setdefault(name, (by_pattern[pattern], {}))
            parts.setdefault(pattern, []).append(stored[key])
    for name, (converter, parts) in converted.items():
        found[name] = _converted(name, converter, parts)
    return found


def _converted(name: str, converter: Any, parts: dict[str, list[Source]]) -> Source:
    """What a converter makes of the tensors that were collected under each of its patterns."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [type(operation) for operation in converter.operations]
    if len(converter.target_patterns) > 1 or any(kind not in (MergeModulelist, Concatenate) for kind in kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise WholeOnlyError(
            f"transformers converts the checkpoint's tensors to {name}, which takes them whole: {names}"
        )
    if missing := [pattern for pattern in converter.source_patterns if pattern not in parts]:
        raise InputError(f"the checkpoint has no {', '.join(missing)}, of which {name} is made")
    groups = [parts[pattern] for pattern in converter.source_patterns]
    for operation, kind in zip(converter.operations, kinds, strict=True):
        if kind is MergeModulelist:
            groups = [[Stacked(_alike(name, group), operation.dim)] for group in groups]
        else:
            joined = [source for group in groups for source in group]
            groups = [[Joined(_alike(name, joined, operation.dim), operation.dim)]]
    if len(groups) != 1 or len(groups[0]) != 1:
        raise WholeOnlyError(f"transformers makes {name} of {sum(map(len, groups))} tensors in a way that is not known")
    return groups[0][0]


def _alike(name: str, sources: list[Source], joined: int | None = None) -> tuple[Source, ...]:
    """The sources as they are, if their shapes are one, but for the dimension along which they are joined."""
    shapes = {tuple(size for dim, size in enumerate(source.shape) if dim != joined) for source in sources}
    if len(shapes) > 1:
        told = ", ".join(str(list(source.shape)) for source in sources[:4])
        raise InputError(f"the checkpoint's tensors that make up {name} do not fit together: {told}")
    return tuple(sources)


def tie(model: Any, sources: Mapping[str, Source]) -> None:
    """Tie weights as `from_pretrained` does: not those that the checkpoint holds twice with different numbers."""
    missing = set(model.state_dict()) - set(sources)
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in sources and source in sources and not _equal(sources[target], sources[source]):
            del model.all_tied_weights_keys[target]
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def _equal(one: Source, other: Source) -> bool:
    """Whether two weights are the same numbers, read some rows at a time."""
    if one.shape != other.shape or not one.shape:
        return one.shape == other.shape and torch.equal(whole(one), whole(other))
    rows = (range(at, min(at + _ROWS, one.shape[0])) for at in range(0, one.shape[0], _ROWS))
    return all(torch.equal(one.read(0, some), other.read(0, some)) for some in rows)

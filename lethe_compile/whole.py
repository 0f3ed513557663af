"""Sequences computed at once, nothing evicted, on a cache that nobody else uses."""

from __future__ import annotations

import torch
from torch import Tensor

from lethe_compile.cache import KVCache
from lethe_compile.compiled import CompiledGraph
from lethe_compile.errors import InputError
from lethe_compile.past import Past


def logits_of(
    compiled: CompiledGraph, cache: KVCache, ids: Tensor, lengths: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Logits ``[R, T, vocab_size]`` of right-padded ids ``[R, T]``, by a new cache; positions count, if not given.

    Raises:
        InputError: positions ``[R, T]`` that do not increase, where masks tell tokens apart by them.
    """
    furthest = ids.shape[1]
    counted = torch.arange(furthest, device=ids.device).repeat(len(ids), 1) if positions is None else positions
    states = compiled.new_states()
    cache.begin(len(ids) * compiled.keep_sets.heads)
    cache.reserve_rows(compiled.keep_sets.fetched(lengths))
    states.begin(len(ids))
    if positions is not None:
        furthest = _checked(compiled, positions, lengths)
    return compiled.run(cache, states, ids, counted, lengths, furthest)


def _checked(compiled: CompiledGraph, positions: Tensor, lengths: Tensor) -> int:
    """One more than the furthest position; masks by content need positions [rows, T] that tell tokens apart."""
    real = torch.arange(1, positions.shape[1], device=positions.device) < lengths[:, None]
    if compiled.content and bool(((positions.diff(dim=1) <= 0) & real).any() | (positions < 0).any()):
        raise InputError("position_ids must increase within each row: this model's masks tell tokens apart by them")
    return int(positions.max()) + 1


def logits_after(compiled: CompiledGraph, cache: KVCache, past: Past, ids: Tensor) -> Tensor:
    """Logits ``[R, T, vocab_size]`` of tokens ``[R, T]`` after a past, by a new cache.

    Raises:
        InputError: see `check_past`.
    """
    check_past(compiled)
    states = compiled.new_states()
    rows, tokens = ids.shape
    cache.begin(rows * compiled.keep_sets.heads)
    past.fill(cache, compiled.keep_sets.fetched(past.lengths))
    cache.reserve(tokens)
    states.begin(rows)
    positions = past.lengths[:, None] + torch.arange(tokens, device=ids.device)
    furthest = int(past.lengths.max()) + tokens
    return compiled.run(cache, states, ids, positions, torch.full_like(past.lengths, tokens), furthest)


def check_past(compiled: CompiledGraph) -> None:
    """Raises `InputError` where masks read more of earlier tokens than a past holds, or layers cache something else."""
    if compiled.ranks is not None:
        raise InputError("a past from elsewhere holds the keys of all heads, and a rank its own: generate from ids")
    if latent := [site.layer for site in compiled.sites if site.latent]:
        raise InputError(
            f"layers {latent} cache the latent of their keys and values, and a cache from elsewhere holds these:"
            " generate from the prompt, or optimize with LetheConfig(cache_latent=False)"
        )
    layers = [site.layer for site in compiled.sites if site.columns]
    if layers:
        raise InputError(
            f"the masks of layers {layers} read more of earlier tokens than keys and values, which a cache from"
            " elsewhere does not hold: generate from the prompt"
        )

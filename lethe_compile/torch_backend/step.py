"""What one call with a static cache says: which tokens came before, which are padding, what the cache holds of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lethe_compile.capture.region import Roles
from lethe_compile.errors import InputError, UnsupportedGraphError
from lethe_compile.passes.program import Mask
from lethe_compile.past import Past
from lethe_compile.runtime import OptimizedModel
from lethe_compile.torch_backend.forward import HINT

if TYPE_CHECKING:
    from lethe_compile.hf_cache import LetheCache

INSTEAD = "lethe_compile.optimize(model).generate takes this model"


class StaticStep:
    """New tokens ``[R, T]`` of one call, after `columns` others of the sequence, padding included.

    Attributes:
        positions: [R, T] int64 as the graph gets them, or None.
        columns: those before this call, as far as anybody counts them: at least what the cache holds.
        lengths: [R] int64: how many of them are tokens.
    """

    def __init__(self, fast: OptimizedModel, roles: Roles, inputs: Sequence[Any], session: LetheCache | None) -> None:
        self._roles, self._session = roles, session
        ids: Tensor = inputs[roles.input_ids]
        (self._rows, self._tokens), self._device = ids.shape, ids.device
        self.positions: Tensor | None = None if roles.position_ids is None else inputs[roles.position_ids]
        masks: list[Tensor] = [inputs[place] for place in roles.masks]
        self._padding = next((mask.bool() for mask in masks if mask.dim() == 2), None)
        self._seen = [_seen(mask) for mask in masks if mask.dim() == 4]
        self._bands = {Mask(), *(site.mask for site in fast.sites if site.mask is not None)}
        self.columns = self._count(inputs)
        self.lengths = self._count_tokens()

    def _count(self, inputs: Sequence[Any]) -> int:
        if self._session is not None:
            return int(self._session.get_seq_length())
        if not self._roles.static:  # the graph allocates it
            return 0
        counts = [layer.count for layer in self._roles.static if layer.count is not None]
        if self._roles.cache_position is not None:  # transformers before 5.4
            return int(inputs[self._roles.cache_position][0])
        if counts:
            return int(inputs[counts[0]])
        if self.positions is None:
            raise UnsupportedGraphError("nothing that the compiled graph takes says how many tokens came before")
        return int(self.positions[:, 0].max())  # every window is full, and what lies before them is gone

    def _count_tokens(self) -> Tensor:
        if self._session is not None:
            return self._session.lengths
        old = self._old()
        if old is not None:
            counted: Tensor = old.sum(1)
            return counted
        if self.positions is not None:
            return self.positions[:, 0].expand(self._rows).long()
        return torch.full((self._rows,), self.columns, device=self._device)

    def _old(self) -> Tensor | None:
        """[R, columns] bool: the tokens before this call, by the first mask that shows them all."""
        width = self.columns + self._tokens
        if self._padding is not None:
            return self._padding[:, : self.columns]
        wide: Tensor | None = next((seen for seen in self._seen if seen.shape[2] >= width), None)
        return None if wide is None else wide[:, 0, : self.columns]

    def real_columns(self) -> Tensor:
        """[R, columns + T] bool: which columns are tokens and not padding.

        Raises:
            InputError: a mask hides or shows anything else than padding and what the model's own masks do.
        """
        if self._session is not None:
            before = self._session.mask
        else:
            index = torch.arange(self.columns, device=self._device)
            before = index >= (self.columns - self.lengths)[:, None]
        if self._padding is not None:
            new = self._padding[:, self.columns :]
        elif self._seen:
            first = self._first_column(self._seen[0])
            new = self._seen[0].diagonal(self.columns - first, 1, 2)[:, : self._tokens]  # each token sees itself
        else:
            new = torch.ones(self._rows, self._tokens, dtype=torch.bool, device=self._device)
        real = torch.cat([before, new], dim=1)
        old = self._old()
        agree = old is None or bool((old == before).all())
        if not agree or not all(self._explained(seen, real) for seen in self._seen):
            raise InputError(
                "the attention mask hides or shows other tokens than left padding and the model's own masks do: a "
                "pruned cache cannot follow it"
            )
        return real

    def _first_column(self, seen: Tensor) -> int:
        """Which column a mask begins with: a window's shows the last ones only."""
        return max(0, self.columns + self._tokens - int(seen.shape[2]))

    def _explained(self, seen: Tensor, real: Tensor) -> bool:
        """Whether a mask ``[R, T, K]`` is padding and one of the model's own bands, as far as real tokens ask it."""
        width, first = real.shape[1], self._first_column(seen)
        column = torch.arange(first, first + seen.shape[2], device=self._device)
        there = column < width
        column = column.clamp(max=width - 1)
        query = torch.arange(self.columns, width, device=self._device)[:, None]  # [T, 1]
        causal = real[:, None, column] & there & (column <= query)  # [R, T, K]
        position = real.long().cumsum(1) - 1
        new, old = position[:, self.columns :, None], position[:, None, column]
        ignored = ~real[:, self.columns :, None]
        bands = [causal & _within(band, new, old) for band in self._bands]
        return any(bool(((seen == band) | ignored).all()) for band in bands)

    def past(self, fast: OptimizedModel, inputs: Sequence[Any]) -> Past:
        """What the static cache holds.

        Raises:
            UnsupportedGraphError: its layers are not the model's attentions.
            InputError: its keys and values are gone.
        """
        keys = [inputs[layer.keys] for layer in self._roles.static]
        values = [inputs[layer.values] for layer in self._roles.static]
        found = [(k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(keys, values, strict=True)]
        wanted = [(site.kv_heads, site.k_dim, site.v_dim) for site in fast.sites]
        if found != wanted:
            raise UnsupportedGraphError(
                f"the static cache's layers are of (heads, key size, value size) {found}, the attentions of {wanted}",
                hint=INSTEAD,
            )
        if bool(values[0].isnan().any()):
            raise InputError(
                "the keys and values of this static cache are gone: a pruned cache has taken its place, and another "
                "generation, a copy of it, or a search with beams came in between. Begin again with a new cache"
            )
        positions = []
        for key in keys:
            held = min(self.columns, key.shape[2])
            column = torch.arange(held, device=self._device)
            positions.append((column + (self.lengths - held)[:, None]).clamp(min=-1))
        keys, values = ([t[:, :, : p.shape[1]] for t, p in zip(ts, positions, strict=True)] for ts in (keys, values))
        return Past(keys, values, positions, self.lengths)


def _seen(mask: Tensor) -> Tensor:
    """A mask of scores ``[R, 1, T, K]``, boolean or additive, as ``[R, T, K]`` bool."""
    if mask.shape[1] != 1:
        raise UnsupportedGraphError(f"the attention mask {list(mask.shape)} differs from head to head", hint=HINT)
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0


def _within(band: Mask, new: Tensor, old: Tensor) -> Tensor:
    """Whether tokens at positions `new` see those at `old`, which are not later."""
    if band.window is None:
        return torch.ones_like(new - old, dtype=torch.bool)
    return new // band.window == old // band.window if band.chunked else new - old < band.window

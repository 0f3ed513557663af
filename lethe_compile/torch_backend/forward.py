"""A compiled forward without a cache: whole sequences, nothing evicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lethe_compile.capture.region import Region, Roles
from lethe_compile.capture.region_outputs import Outputs
from lethe_compile.errors import InputError, UnsupportedGraphError
from lethe_compile.passes.program import same_size
from lethe_compile.runtime import OptimizedModel
from lethe_compile.verify import compare, rounding

HINT = "compile the model's own forward, called with padding masks [batch, tokens] and ordinary positions"


class Forward:
    """A graph ``token ids [, positions] [, padding mask] -> logits``, as the forward of an optimized model.

    `verify` comes first: it also finds out how the graph counts positions that it is not given, by column or by token.
    """

    def __init__(self, region: Region, roles: Roles, outputs: Outputs) -> None:
        self._region, self._roles, self._outputs = region, roles, outputs
        self._last = last_tokens(region, roles, outputs)
        self._by_column = False

    def __call__(self, fast: OptimizedModel, sessions: object, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's outputs; a generation under way is untouched."""
        return self._outputs.join(self._last_logits(fast, inputs), inputs)

    def _last_logits(self, fast: OptimizedModel, inputs: Sequence[Any]) -> Tensor:
        roles = self._roles
        mask = None if not roles.masks else inputs[roles.masks[0]]
        positions = None if roles.position_ids is None else inputs[roles.position_ids]
        logits = self._logits(fast, inputs[roles.input_ids], positions, mask)
        return logits if self._last is None else logits[:, -self._last :]

    def _logits(self, fast: OptimizedModel, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        if positions is None and self._by_column:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        logits: Tensor = fast(ids.long(), positions, mask)
        return logits

    def verify(self, fast: OptimizedModel, sessions: object, inputs: Sequence[Any]) -> None:
        """Run the graph and the optimized model on random ids of the shape of `inputs`, padded if there is a mask.

        Raises:
            UnsupportedGraphError: their logits differ, or a mask is not one of padding.
        """
        roles = self._roles
        ids = random_ids(fast, inputs[roles.input_ids])
        changed = {roles.input_ids: ids}
        real = torch.ones_like(ids, dtype=torch.bool)
        for place in roles.masks:
            if inputs[place].dim() != 2 or len(roles.masks) > 1:
                path = self._region.paths[place]
                raise UnsupportedGraphError(f"{path} {list(inputs[place].shape)} is no mask of padding", hint=HINT)
            real[0, : ids.shape[1] // 3] = False
            changed[place] = real.to(inputs[place].dtype)
        expected = self._region.logits(inputs, changed)
        given = [changed.get(place, value) for place, value in enumerate(inputs)]
        for by_column in (False, True):
            self._by_column = by_column
            try:
                expect_equal(fast, self._last_logits(fast, given), expected, real)
            except UnsupportedGraphError:
                if by_column or roles.position_ids is not None or not roles.masks:
                    raise
            else:
                return


def last_tokens(region: Region, roles: Roles, outputs: Outputs) -> int | None:
    """Of how many last tokens the graph returns logits, None for all.

    Raises:
        UnsupportedGraphError: neither all, nor a fixed number.
    """
    batch, tokens = region.example_of(roles.input_ids).shape
    rows, returned, _ = outputs.example.shape
    if same_size(rows, batch) and same_size(returned, tokens):
        return None
    if not same_size(rows, batch) or not isinstance(returned, int):
        shape = list(outputs.example.shape)
        reason = f"the compiled graph takes ids {[batch, tokens]} and returns logits {shape}, not of the last tokens"
        raise UnsupportedGraphError(reason, hint=HINT)
    return returned


def random_ids(fast: OptimizedModel, like: Tensor) -> Tensor:
    """Token ids of the shape and dtype of `like`.

    Raises:
        InputError: that is none of an optimized model's.
    """
    if like.device != fast.device:
        raise InputError(f"the token ids are on {like.device}, the model is on {fast.device}")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(fast.vocab_size, like.shape, generator=generator).to(like)


def expect_equal(fast: OptimizedModel, actual: Tensor, expected: Tensor, real: Tensor) -> None:
    """Compare logits ``[B, n, vocab]`` of the last n tokens, where they are `real` ``[B, T]``.

    Raises:
        UnsupportedGraphError: they differ by more than rounding explains.
    """
    real = real[:, -expected.shape[1] :]
    what = f"{list(real.shape)} tokens, beside the compiled graph"
    compare(actual[real], expected[real], what, HINT, rounding(fast))

"""How often a model attends, as PyTorch's dispatcher sees it run: softmaxes over tokens, and what ranks keys before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class AttentionHook(TorchDispatchMode):
    """Calls `edit(index, scores)` on the operand ``[..., tokens, tokens (+ 1)]`` of each softmax over tokens.

    And, with the index of the softmax that follows, on what ranks keys for it: the operand of a `topk` over tokens, and
    of a maximum over blocks of them, ``[..., tokens, blocks, size]``; and on an additive mask that is compared.

    Attributes:
        count: softmaxes over tokens met so far.
    """

    def __init__(self, tokens: int, edit: Callable[[int, Tensor], Tensor] = lambda index, scores: scores) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens, self.edit, self.count = tokens, edit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten._softmax.default, aten._safe_softmax.default) and self._over_tokens(args[0]):
            args = (self.edit(self.count, args[0]), *args[1:])
            self.count += 1
        elif func in (aten.logsumexp.default, aten.topk.default) and self._over_tokens(args[0]):
            args = (self.edit(self.count, args[0]), *args[1:])  # a log-sum-exp ahead of the softmax is a sink's
        elif func is aten.eq.Scalar and self._over_tokens(args[0]):  # asks a mask what it lets through
            args = (self.edit(self.count, args[0]), *args[1:])
        elif func is aten.amax.default and self._over_blocks(args[0]):
            blocks = args[0].shape[-2:]
            args = (self.edit(self.count, args[0].flatten(-2)).unflatten(-1, blocks), *args[1:])
        return func(*args, **(kwargs or {}))

    def _over_tokens(self, scores: Tensor) -> bool:
        """A column more is a sink's."""
        shape = scores.shape
        return len(shape) >= 3 and shape[-2] == self.tokens and shape[-1] in (self.tokens, self.tokens + 1)

    def _over_blocks(self, scores: Tensor) -> bool:
        """Blocks that hold the tokens, and no block too many."""
        *rest, tokens, blocks, size = (0, 0, *scores.shape)
        return len(rest) >= 3 and tokens == self.tokens and (blocks - 1) * size < tokens <= blocks * size and size > 1


@torch.no_grad()
def attentions(run: Callable[[Tensor], Any], ids: Tensor) -> int:
    """How many times the model attends in one forward over ``ids [rows, T]``; T must be no other size of the model."""
    with AttentionHook(ids.shape[1]) as hook:
        run(ids)
    count: int = hook.count
    return count

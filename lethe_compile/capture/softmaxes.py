"""How often a model attends, as PyTorch's dispatcher sees it run: softmaxes over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class AttentionHook(TorchDispatchMode):
    """Calls `edit(index, scores)` on the operand ``[..., tokens, tokens (+ 1)]`` of each softmax over tokens.

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
        elif func is aten.logsumexp.default and self._over_tokens(args[0]):  # a sink's, ahead of the softmax
            args = (self.edit(self.count, args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _over_tokens(self, scores: Tensor) -> bool:
        """A column more is a sink's."""
        shape = scores.shape
        return len(shape) >= 3 and shape[-2] == self.tokens and shape[-1] in (self.tokens, self.tokens + 1)


@torch.no_grad()
def attentions(run: Callable[[Tensor], Any], ids: Tensor) -> int:
    """How many times the model attends in one forward over ``ids [rows, T]``; T must be no other size of the model."""
    with AttentionHook(ids.shape[1]) as hook:
        run(ids)
    count: int = hook.count
    return count

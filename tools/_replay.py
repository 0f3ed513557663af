"""The eviction oracle for any model: the original runs over the whole sequence while its softmaxes hide evicted tokens.

Nothing of the compiler takes part: PyTorch's dispatcher hands over every softmax of the original, in order, and the
n-th over tokens belongs to the n-th attention of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lethe_compile.runtime import Round

aten = torch.ops.aten


class Evictions:
    """Listens to rounds: for each layer and row, by position of an evicted token, the first query that misses it."""

    def __init__(self) -> None:
        self.first: dict[tuple[int, int], dict[int, int]] = {}

    def __call__(self, event: Round) -> None:
        position, keep = event.position.cpu(), event.keep.cpu()
        for row, following in enumerate(event.next_position.tolist()):
            gone = position[row][(position[row] >= 0) & ~keep[row]].tolist()
            self.first.setdefault((event.layer, row), {}).update(dict.fromkeys(gone, following))

    def hidden(self, layer: int, row: int, tokens: int) -> Tensor:
        """[tokens, tokens] bool: keys that a query no longer sees."""
        hidden, query = torch.zeros(tokens, tokens, dtype=torch.bool), torch.arange(tokens)
        for position, following in self.first.get((layer, row), {}).items():
            hidden[:, position] = query >= following
        return hidden


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
        return func(*args, **(kwargs or {}))

    def _over_tokens(self, scores: Tensor) -> bool:
        """A column more is a sink's."""
        shape = scores.shape
        return len(shape) >= 3 and shape[-2] == self.tokens and shape[-1] in (self.tokens, self.tokens + 1)


@torch.no_grad()
def attentions(run: Callable[[Tensor], Tensor], ids: Tensor) -> int:
    """How many times the model attends in one forward over ``ids [1, T]``; T must be no other size of the model."""
    with AttentionHook(ids.shape[1]) as hook:
        run(ids)
    count: int = hook.count
    return count


@torch.no_grad()
def replay(run: Callable[[Tensor], Tensor], ids: Tensor, evictions: Evictions, row: int) -> Tensor:
    """Logits ``[T, vocab]`` of the original over one row's ``ids [1, T]``, evicted tokens hidden."""
    tokens = ids.shape[1]

    def hide(index: int, scores: Tensor) -> Tensor:
        hidden = evictions.hidden(index, row, tokens)
        padded = torch.nn.functional.pad(hidden, (0, scores.shape[-1] - tokens))
        return scores.masked_fill(padded, float("-inf"))

    with AttentionHook(tokens, hide):
        return run(ids)[0]

"""The eviction oracle for any model: the original runs over the whole sequence while its softmaxes hide evicted tokens.

Nothing of the compiler takes part: PyTorch's dispatcher hands over every softmax of the original, in order, and the
n-th over tokens belongs to the n-th attention of the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lethe_compile.capture.softmaxes import AttentionHook
from lethe_compile.runtime import Round


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


@torch.no_grad()
def replay(run: Callable[[Tensor], Tensor], ids: Tensor, evictions: Evictions, row: int) -> Tensor:
    """Logits ``[T, vocab]`` of the original over one row's ``ids [1, T]``, evicted tokens hidden."""
    tokens = ids.shape[1]

    def hide(index: int, scores: Tensor) -> Tensor:
        hidden = evictions.hidden(index, row, tokens)
        padded = torch.nn.functional.pad(hidden, (0, scores.shape[-1] - tokens))
        return scores.masked_fill(padded.to(scores.device), float("-inf"))

    with AttentionHook(tokens, hide):
        return run(ids)[0]

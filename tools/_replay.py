"""The eviction oracle for any model: the original runs over the whole sequence while its softmaxes hide evicted tokens.

Nothing of the compiler takes part: PyTorch's dispatcher hands over every softmax of the original, in order, and the
n-th over tokens belongs to the n-th attention of the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lethe_compile.capture.softmaxes import AttentionHook
from lethe_compile.listeners import Round


class Evictions:
    """Listens to rounds: what is evicted, and the first query that misses it.

    Attributes:
        first: for layer, sequence and KV head, the first query's position by that of an evicted token; head 0 stands
            for all where they keep the same tokens.
        heads: of layers whose KV heads keep tokens of their own, how many they are.
    """

    def __init__(self) -> None:
        self.first: dict[tuple[int, int, int], dict[int, int]] = {}
        self.heads: dict[int, int] = {}

    def __call__(self, event: Round) -> None:
        position, keep = event.position.cpu(), event.keep.cpu()
        self.heads[event.layer] = event.heads
        for row, following in enumerate(event.next_position.tolist()):
            gone = position[row][(position[row] >= 0) & ~keep[row]].tolist()
            at = (event.layer, row // event.heads, row % event.heads)
            self.first.setdefault(at, {}).update(dict.fromkeys(gone, following))

    def hidden(self, layer: int, row: int, tokens: int, heads: int = 1) -> Tensor:
        """[1 | heads, tokens, tokens] bool: keys that a query no longer sees.

        For each of `heads` query heads, where KV heads keep tokens of their own.
        """
        sets = self.heads.get(layer, 1)
        hidden, query = torch.zeros(sets, tokens, tokens, dtype=torch.bool), torch.arange(tokens)
        for head in range(sets):
            for position, following in self.first.get((layer, row, head), {}).items():
                hidden[head, :, position] = query >= following
        return hidden if sets == 1 else hidden.repeat_interleave(heads // sets, dim=0)


@torch.no_grad()
def replay(run: Callable[[Tensor], Tensor], ids: Tensor, evictions: Evictions, row: int) -> Tensor:
    """Logits ``[T, vocab]`` of the original over one row's ``ids [1, T]``, evicted tokens hidden."""
    tokens = ids.shape[1]

    def hide(index: int, scores: Tensor) -> Tensor:
        heads = scores.shape[:-2].numel()  # of one sequence, however they are arranged
        hidden = evictions.hidden(index, row, tokens, heads)
        padded = torch.nn.functional.pad(hidden, (0, scores.shape[-1] - tokens))
        if len(padded) > 1:
            padded = padded.view(scores.shape)
        return scores.masked_fill(padded.to(scores.device), float("-inf"))

    with AttentionHook(tokens, hide):
        return run(ids)[0]

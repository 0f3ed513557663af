"""A toy decode step with a cache of its own: how it keeps tokens, and what masks them, are a test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from tests.passes.toy import HEAD_DIM, HEADS, KV_HEADS, VOCABULARY, WIDTH

SLOTS = 64
STATIC = (1, KV_HEADS, SLOTS, HEAD_DIM)
Keep = Callable[["StepToy", str, Tensor, Any], Tensor]
"""(toy, "keys" or "values", new tokens [B, 2, T, 8], position) -> all that attention reads [B, 2, slots, 8]."""
Mask = Callable[[Tensor, int], Tensor | None]
"""(position [T], slots read) -> what each token sees of them [T, slots], None for all."""


def causal(position: Tensor, slots: int) -> Tensor:
    return torch.arange(slots) <= position[:, None]


def sliding(position: Tensor, slots: int) -> Tensor:
    index = torch.arange(slots)
    return (index <= position[:, None]) & (index > position[:, None] - 9)


class StepToy(nn.Module):
    """One attention over cached keys and values, and positions from a table of 64."""

    def __init__(self, keep: Keep, mask: Mask = causal, shape: tuple[int, ...] = STATIC) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keep, self.mask = keep, mask
        self.embedding, self.table = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(SLOTS, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
        self.eval()

    def attend(self, ids: Tensor, position: Tensor, at: Any = None) -> Tensor:
        rows, tokens = ids.shape
        x = self.embedding(ids) + self.table(position)
        heads = self.qkv(x).view(rows, tokens, -1, HEAD_DIM).transpose(1, 2)
        query, *new = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        at = position if at is None else at
        key, value = (self.keep(self, name, one, at) for name, one in zip(("keys", "values"), new, strict=True))
        mask = self.mask(position, key.shape[2])
        attended = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        logits: Tensor = self.head(x + self.out(attended.transpose(1, 2).reshape(rows, tokens, WIDTH)))
        return logits

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        return self.attend(ids, input_pos)


class Counting(StepToy):
    """The position is a counter of its own."""

    step = 1

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        position = torch.arange(ids.shape[1]) + self.seen
        logits = self.attend(ids, position)
        self.seen.add_(self.step * ids.shape[1])
        return logits


class Measured(StepToy):
    """The position is what a mask of all tokens so far is long, and slots are slices."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        total = attention_mask.shape[1]
        position = torch.arange(total - ids.shape[1], total)
        return self.attend(ids, position, total)


class Past(StepToy):
    """The cache comes in and goes out: `keep` gets it as a buffer, and leaves what goes out in `after`."""

    def forward(self, ids: Tensor, past_keys: Tensor, past_values: Tensor) -> Any:  # type: ignore[override]
        self.past = {"keys": past_keys, "values": past_values}
        self.after: dict[str, Tensor] = {}
        self.first: Any = None
        position = torch.arange(ids.shape[1]) + past_keys.shape[2]
        return self.attend(ids, position), self.after["keys"], self.after["values"]


def joined(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """past_key_values as transformers had them."""
    assert isinstance(toy, Past)
    toy.after[name] = torch.cat([toy.past[name], new], dim=-2)
    return toy.after[name]


def index_copied(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    return toy.get_buffer(name).index_copy_(2, at, new)


def exported(toy: StepToy) -> torch.export.ExportedProgram:
    """One token of one row, as little dynamic as its kind of cache allows."""
    ids = torch.ones(1, 1, dtype=torch.int64)
    if isinstance(toy, Past):
        past = torch.zeros(1, KV_HEADS, 5, HEAD_DIM)
        shapes = (None, {2: Dim.AUTO}, {2: Dim.AUTO})
        return torch.export.export(toy, (ids, past, past.clone()), dynamic_shapes=shapes, strict=False)
    if isinstance(toy, Measured):
        mask = torch.ones(1, 5, dtype=torch.int64)
        return torch.export.export(toy, (ids, mask), dynamic_shapes=(None, {1: Dim.AUTO}), strict=False)
    arguments = (ids,) if isinstance(toy, Counting) else (ids, torch.zeros(1, dtype=torch.int64))
    return torch.export.export(toy, arguments, strict=False)

"""Toy decoders whose attention and positions are a test's own, and what the tests of the passes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lethe_compile as lethe
from lethe_compile.capture import capture
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.program import Program

HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 4, 2, 8, 32, 29

Attend = Callable[["Toy", Tensor, Tensor, Tensor], Tensor]
"""query [B, 4, T, 8], key and value [B, 2, T, 8] -> [B, 4, T, 8]."""
Embed = Callable[["Toy", Tensor], Tensor]
"""Embedded tokens [B, T, 32] -> the same with positions."""


class Toy(nn.Module):
    """Token ids [B, T] -> logits [B, T, 29], through one attention for each of `attends`; `buffers` are its own."""

    def __init__(self, *attends: Attend, embed: Embed = lambda toy, x: x, **buffers: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attends, self.embed = attends, embed
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM) for _ in attends)
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in attends)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.now = SimpleNamespace()  # tokens, and what else tests keep, of the forward under way
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        self.now.tokens = tokens
        x = self.embed(self, self.embedding(tokens))
        for attend, qkv, out in zip(self.attends, self.qkv, self.out, strict=True):
            heads = qkv(x).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
            query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            x = x + out(attend(self, query, key, value).transpose(1, 2).reshape(batch, length, WIDTH))
        logits: Tensor = self.head(x)
        return logits


def causal(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def masked(mask: Callable[[Toy, int], Tensor]) -> Attend:
    """Attention under the mask that `mask` makes for T tokens."""

    def attend(toy: Toy, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask(toy, query.shape[2]), enable_gqa=True)

    return attend


def program_after(model: nn.Module, last: str) -> Program:
    """`model` captured and rewritten by every pass up to the one named `last`."""
    steps = pipeline(None)
    names = [step.name for step in steps]
    return run_pipeline(capture(model).program, steps[: names.index(last) + 1]).program


def optimized(model: nn.Module) -> lethe.OptimizedModel:
    return lethe.optimize(model, policy="full", verified=False)


@torch.no_grad()
def assert_computes_the_same(model: nn.Module, fast: lethe.OptimizedModel, lengths: Sequence[int] = (1, 5, 23)) -> None:
    """Logits of whole sequences, and of one decoded token by token in two rows of unequal progress."""
    for length in lengths:
        ids = torch.randint(VOCABULARY, (3, length))
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-5)
    ids = torch.randint(VOCABULARY, (2, max(lengths)))
    expected, prompts = model(ids), torch.tensor([1, 4])
    fast.begin(2, prompts)
    fast.prefill(ids[:, :4], prompts)
    for step in range(max(lengths) - 4):
        column = prompts + step
        logits = fast.decode(ids.gather(1, column[:, None])[:, 0], torch.ones(2, dtype=torch.bool))
        torch.testing.assert_close(logits, expected[torch.arange(2), column], rtol=1e-4, atol=1e-5)
    fast.end()

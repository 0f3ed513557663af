"""A decoder in plain PyTorch, with no transformers: it counts its own positions and repeats its own KV heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainConfig:
    """Sizes of a `PlainDecoder`; `windows` gives each layer's sliding window, None for full causal attention."""

    vocab_size: int = 97
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    windows: tuple[int | None, ...] = (None, 7, None)
    rope_theta: float = 10000.0


class PlainAttention(nn.Module):
    """Grouped-query attention over rotated queries and keys; ``[B, T, width] -> [B, T, width]``."""

    def __init__(self, config: PlainConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.window = config.heads, config.kv_heads, window
        self.head_dim = config.width // config.heads
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        group = self.heads // self.kv_heads
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        if self.window is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            index = torch.arange(tokens, device=x.device)
            age = index[:, None] - index
            attended = F.scaled_dot_product_attention(query, key, value, (age >= 0) & (age < self.window))
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: PlainConfig, window: int | None) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = PlainAttention(config, window)
        self.up, self.down = nn.Linear(config.width, 2 * config.width), nn.Linear(2 * config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))  # type: ignore[no-any-return]


class PlainDecoder(nn.Module):
    """Token ids ``[B, T]`` -> logits ``[B, T, vocab_size]``, causal, with rotary positions 0 … T-1."""

    inverse_frequencies: Tensor

    def __init__(self, config: PlainConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PlainConfig()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config, window) for window in config.windows)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        exponents = torch.arange(0, config.width // config.heads, 2) / (config.width // config.heads)
        self.register_buffer("inverse_frequencies", config.rope_theta**-exponents, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        angle = torch.outer(position.float(), self.inverse_frequencies)  # [T, head_dim / 2]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, heads, T, head_dim]``, halves paired; `cos` and `sin` are ``[T, head_dim / 2]``."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def plain(seed: int = 0) -> PlainDecoder:
    """A small random `PlainDecoder`, with weights wide enough that a wrong mask shows."""
    torch.manual_seed(seed)
    model = PlainDecoder()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.5)
    return model.eval()

"""A decoder in the idiom of gpt-fast: static caches as buffers, written in place at `input_pos`, tables for the rest.

A decode step that carries its own cache: tables of masks and of rotations are indexed by the positions given, and
attention reads the whole cache under the mask. Queries, keys and values come from one projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class StaticConfig:
    """Sizes of a `StaticDecoder`."""

    vocab_size: int = 97
    width: int = 64
    hidden: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 3
    rope_theta: float = 10000.0


class KVCache(nn.Module):
    """Keys and values ``[rows, kv_heads, slots, head_dim]`` of the tokens so far; a token's slot is its position."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, config: StaticConfig, rows: int, slots: int) -> None:
        super().__init__()
        shape = (rows, config.kv_heads, slots, config.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape), persistent=False)

    def update(self, input_pos: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache[:, :, input_pos] = key
        self.v_cache[:, :, input_pos] = value
        return self.k_cache, self.v_cache


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class StaticAttention(nn.Module):
    """Grouped-query attention over the cache; ``[rows, T, width] -> [rows, T, width]``."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        config, (rows, tokens, _) = self.config, x.shape
        sizes = [config.heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
        query, key, value = self.wqkv(x).split(sizes, dim=-1)
        query = rotate(query.view(rows, tokens, config.heads, config.head_dim), freqs).transpose(1, 2)
        key = rotate(key.view(rows, tokens, config.kv_heads, config.head_dim), freqs).transpose(1, 2)
        value = value.view(rows, tokens, config.kv_heads, config.head_dim).transpose(1, 2)
        if self.kv_cache is not None:
            key, value = self.kv_cache.update(input_pos, key, value)
        group = config.heads // config.kv_heads
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.wo(attended.transpose(1, 2).contiguous().view(rows, tokens, -1))  # type: ignore[no-any-return]


class StaticBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__()
        self.attention = StaticAttention(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.w1, self.w3 = (nn.Linear(config.width, config.hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freqs, mask, input_pos)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))  # type: ignore[no-any-return]


class StaticDecoder(nn.Module):
    """``(ids [rows, T], input_pos [T]) -> logits [rows, T, vocab_size]``; call `setup_caches` first."""

    freqs_cis: Tensor
    causal_mask: Tensor

    def __init__(self, config: StaticConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or StaticConfig()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(StaticBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)

    def setup_caches(self, rows: int, slots: int) -> None:
        """Make empty caches for `rows` sequences of up to `slots` tokens, and the tables that positions index."""
        for layer in self.layers:
            assert isinstance(layer, StaticBlock)
            layer.attention.kv_cache = KVCache(self.config, rows, slots)
        half = torch.arange(0, self.config.head_dim, 2) / self.config.head_dim
        angle = torch.outer(torch.arange(slots).float(), self.config.rope_theta**-half)
        self.register_buffer("freqs_cis", torch.stack([angle.cos(), angle.sin()], dim=-1), persistent=False)
        self.register_buffer("causal_mask", torch.ones(slots, slots, dtype=torch.bool).tril(), persistent=False)

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        mask, freqs = self.causal_mask[None, None, input_pos], self.freqs_cis[input_pos]
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, freqs, mask, input_pos)
        return self.output(self.norm(x))  # type: ignore[no-any-return]


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotary embedding of ``x [rows, T, heads, head_dim]``, neighbours paired; ``freqs [T, head_dim / 2, 2]``."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    freqs = freqs.view(1, pairs.size(1), 1, pairs.size(3), 2)
    cos, sin = freqs.unbind(-1)
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(3)


def factory(seed: int = 0, slots: int = 256) -> StaticDecoder:
    """A small random `StaticDecoder` with empty caches for one row; weights wide enough that a wrong mask shows."""
    torch.manual_seed(seed)
    model = StaticDecoder()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.5)
    model.setup_caches(1, slots)
    return model.eval()

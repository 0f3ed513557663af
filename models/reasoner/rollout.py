"""Free-running evaluation: batched greedy decoding of a Qwen3 model over a dense, preallocated cache.

Written for thousands of steps with ragged prompts: all rows advance together from position 0, a row reads its prompt
while it lasts and its own output after that, so no padding stands between them. fp32, explicit softmax; a hook may
change the attention logits, which is how cache policies are probed without touching a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .task import EOS, PAD, Problems, generate_problems, solved, token_accuracy

AttentionHook = Callable[[int, int, Tensor], Tensor]  # (layer, position, logits [n, Hkv, G, t]) -> logits


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Decoder:
    """One-token steps of a transformers `Qwen3ForCausalLM` for n rows and at most `capacity` positions."""

    def __init__(self, model: Any, n: int, capacity: int, hook: AttentionHook | None = None) -> None:
        config = model.config
        self.model, self.hook = model, hook
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        weight = model.lm_head.weight
        shape = (config.num_hidden_layers, 2, n, self.groups, capacity, self.dim)
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        positions = torch.arange(capacity, device=weight.device)[None]
        cos, sin = model.model.rotary_emb(weight, positions)
        self.cos, self.sin = cos[0], sin[0]

    def _attend(self, attention: Any, layer: int, step: int, x: Tensor) -> Tensor:
        n = x.shape[0]
        cos, sin = self.cos[step], self.sin[step]
        q = _rotate(attention.q_norm(attention.q_proj(x).view(n, self.heads, self.dim)), cos, sin)
        k = _rotate(attention.k_norm(attention.k_proj(x).view(n, self.groups, self.dim)), cos, sin)
        keys, values = self.cache[layer]
        keys[:, :, step] = k
        values[:, :, step] = attention.v_proj(x).view(n, self.groups, self.dim)
        q = q.view(n, self.groups, self.heads // self.groups, self.dim)
        logits = q @ keys[:, :, : step + 1].transpose(2, 3) * attention.scaling
        if self.hook is not None:
            logits = self.hook(layer, step, logits)
        out = logits.softmax(-1) @ values[:, :, : step + 1]
        return attention.o_proj(out.reshape(n, -1))  # type: ignore[no-any-return]

    def step(self, tokens: Tensor, step: int) -> Tensor:
        """Logits [n, vocabulary] after feeding tokens [n] at position `step`."""
        x = self.model.model.embed_tokens(tokens)
        for index, layer in enumerate(self.model.model.layers):
            x = x + self._attend(layer.self_attn, index, step, layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(self.model.model.norm(x))  # type: ignore[no-any-return]


@torch.inference_mode()
def generate(model: Any, problems: Problems, max_new_tokens: int, hook: AttentionHook | None = None) -> Tensor:
    """Greedy continuation of each prompt: new tokens [n, max_new_tokens], padded after <eos>."""
    prompt, lengths = problems.prompt_ids, problems.prompt_lengths
    n, width = prompt.shape
    steps = width + max_new_tokens
    decoder = Decoder(model, n, steps, hook)
    output = torch.full((n, steps + 1), PAD, dtype=torch.long, device=prompt.device)
    output[:, :width] = prompt
    done = torch.zeros(n, dtype=torch.bool, device=prompt.device)
    for step in range(steps):
        chosen = decoder.step(output[:, step], step).argmax(-1).masked_fill(done, PAD)
        free = step + 1 >= lengths
        output[:, step + 1] = torch.where(free, chosen, output[:, step + 1])
        done |= free & (chosen == EOS)
        if step % 64 == 0 and bool(done.all()):
            break
    place = (lengths[:, None] + torch.arange(max_new_tokens, device=prompt.device)).clamp(max=steps)
    return output.gather(1, place)


def score(
    model: Any, family: str, edges: Sequence[int], n: int, seed: int, hook: AttentionHook | None = None
) -> list[dict[str, Any]]:
    """Solves n fresh problems of a family, free-running: a row for each bucket of trace tokens between two edges."""
    device = model.lm_head.weight.device
    fresh = generate_problems(family, n, seed=seed, min_tokens=edges[0], max_tokens=edges[-1], device=device)
    output = generate(model, fresh, edges[-1] + 64, hook)
    measures = {
        "solved": solved(fresh, output),
        "terminated": (output == EOS).any(1),
        "token_accuracy": token_accuracy(fresh, output),
        "mean_prompt_tokens": fresh.prompt_lengths,
        "mean_trace_tokens": fresh.trace_lengths,
        "mean_new_tokens": (output != PAD).sum(1),
    }
    rows: list[dict[str, Any]] = []
    for low, high in pairwise(edges):
        inside = (fresh.trace_lengths >= low) & (fresh.trace_lengths < high + (high == edges[-1]))
        row = {"family": family, "min_tokens": low, "max_tokens": high, "problems": int(inside.sum())}
        rows.append(row | {name: values[inside].float().mean().item() for name, values in measures.items()})
    return rows

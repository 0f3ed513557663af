"""Parts of transformers that no export can follow, in a form that computes the same; each with the reason.

They stand in for the time of a capture. Verification compares the result with the model as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


@contextmanager
def patched() -> Iterator[None]:
    """All patches whose modules are loaded, which they are once a model of theirs exists."""
    with ExitStack() as stack:
        for module, path, replacement in _PATCHES:
            loaded: Any = sys.modules.get(module)
            owner, _, name = path.rpartition(".")
            holder = getattr(loaded, owner, None) if owner else loaded
            if holder is not None and hasattr(holder, name):
                stack.enter_context(mock.patch.object(holder, name, replacement))
        yield


@contextmanager
def forwards_replaced(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """In this context the `forward` of each module is the one given for it."""
    own = {module: vars(module).get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before


def _sorted_by_expert(hidden: Tensor, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[N * K, D]`` by expert, their order, and where each expert's end ``[experts]``.

    `hidden` is ``[N, D]``, `index` ``[N, K]``.
    """
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    ends = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0).cumsum(0)
    return hidden[order // index.shape[1]], order, ends.to(torch.int32)


def _combined(states: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Back in the order of tokens, weighted and summed over each token's experts: ``[N, D]``."""
    tokens, per_token = weights.shape
    return (states[order.argsort()].view(tokens, per_token, -1) * weights[..., None]).sum(1).to(states.dtype)


def _grouped(tokens: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``tokens[i] @ weight[expert of i]``, weight ``[experts, in, out]``."""
    from transformers.integrations.moe import _grouped_mm

    product: Tensor = _grouped_mm(tokens, weight, ends)
    return product


def _aria_gemm(token_states: Tensor, expert_weights: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """A Python loop over ``tokens_per_expert``, whose bounds are data."""
    return _grouped(token_states, expert_weights, tokens_per_expert.cumsum(0).to(torch.int32))


def _dbrx_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A Python loop over the experts that some token chose, which is data."""
    mlp, shape = self.mlp, (-1, self.ffn_hidden_size, self.hidden_size)
    flat = hidden_states.reshape(-1, self.hidden_size)
    tokens, order, ends = _sorted_by_expert(flat, top_k_index, self.num_experts)
    gate, up = (_grouped(tokens, w.view(shape).transpose(1, 2), ends) for w in (mlp.w1, mlp.v1))
    down = _grouped(mlp.activation_fn(gate) * up, mlp.w2.view(shape), ends)
    return _combined(down, order, top_k_weights).view(hidden_states.shape)


def _longcat_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same loop; experts from `num_routed_experts` on pass tokens through."""
    tokens, order, ends = _sorted_by_expert(hidden_states, top_k_index, self.total_experts)
    routed = self.num_routed_experts
    ends = ends[:routed]
    gate, up = _grouped(tokens, self.gate_up_proj[:routed].transpose(1, 2), ends).chunk(2, dim=-1)
    states = _grouped(self.act_fn(gate) * up, self.down_proj.transpose(1, 2), ends)
    passed = top_k_index.reshape(-1)[order] >= routed
    return _combined(torch.where(passed[:, None], tokens, states), order, top_k_weights)


def _doge_mask(
    self: Any,
    hidden_states: Tensor,
    dt_states: Tensor,
    keep_window_size: int = 2048,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """A branch on the number of tokens: none are dropped while there are no more than are kept, which a top k says."""
    lowest = torch.finfo(hidden_states.dtype).min
    mask = dt_states[:, :, None, :].expand(-1, -1, hidden_states.shape[1], -1)
    if attention_mask is not None:
        mask = mask.masked_fill(attention_mask != 0, lowest)
    kept = torch.sym_min(keep_window_size, mask.shape[-1])
    index = mask.topk(kept, dim=-1, sorted=False).indices
    return mask.masked_fill(torch.zeros_like(mask).scatter(-1, index, 1.0) == 0, lowest)


def _qwen4_selected(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    past_key_values: Any = None,
) -> Tensor:
    """Python loops over rows and queries. What a query sees is what the last one sees, up to itself: so the blocks into
    which visible tokens are counted are the same for every query, and those that it has whole come first."""
    from transformers.models.qwen4_exp.modeling_qwen4_exp import apply_rotary_pos_emb

    rows, tokens, _ = hidden_states.shape
    (cos, sin), width, size = position_embeddings, self.index_head_dim, self.compress_ratio
    heads = self.index_qk_proj(hidden_states).view(rows, tokens, -1, width)
    query = apply_rotary_pos_emb(self.q_layernorm(heads[:, :, :-1]), cos=cos, sin=sin, unsqueeze_dim=2)
    key = heads[:, :, -1]
    visible = (attention_mask == 0)[:, 0]  # [rows, queries, keys]
    counted = visible[:, -1]  # [rows, keys]
    rank = counted.cumsum(-1) - 1
    blocks = -(-key.shape[1] // size)
    block = rank.div(size, rounding_mode="floor").masked_fill(~counted, 0)

    def pooled(values: Tensor, of: Tensor) -> Tensor:
        """Sums over the tokens `of` each block: ``[rows, blocks, dim]``."""
        index = block[..., None].expand_as(values)
        return values.new_zeros(rows, blocks, values.shape[2]).scatter_add(1, index, values * of[..., None])

    keys = self.k_layernorm((pooled(key.float(), counted) / size).to(key.dtype))
    first = counted & (rank % size == 0)
    keys = apply_rotary_pos_emb(keys[:, None], cos=pooled(cos, first), sin=pooled(sin, first))  # [rows, 1, blocks, dim]
    scores = torch.matmul(query.float(), keys.float().transpose(-1, -2)).relu().sum(2) / width**0.5
    whole = visible.sum(-1, keepdim=True).div(size, rounding_mode="floor")  # [rows, queries, 1]
    behind = torch.arange(blocks, device=key.device) >= whole
    chosen = scores.masked_fill(behind, float("-inf")).topk(torch.sym_min(self.block_topk, blocks)).indices
    kept = behind.scatter(-1, chosen, True)  # the tokens behind the last whole block as well
    selected = kept.gather(-1, block[:, None].expand(-1, tokens, -1)) & visible
    lowest = torch.finfo(attention_mask.dtype).min
    return torch.zeros_like(attention_mask).masked_fill(~selected[:, None], lowest)


def _phimoe_rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """A choice in Python between two scales by the greatest position, which is data."""
    parameters = self.config.rope_parameters
    inverse, scale = self.rope_init_fn(self.config)
    if parameters["rope_type"] != "default":
        beyond = position_ids.max() + 1 > parameters["original_max_position_embeddings"]
        scale = torch.where(beyond, parameters["long_mscale"], parameters["short_mscale"])
    angle = position_ids[:, :, None].float() * inverse.to(x.device, torch.float32)
    angle = torch.cat([angle, angle], dim=-1)  # [B, T, head_dim]
    return (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)


_PATCHES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("transformers.models.aria.modeling_aria", "sequential_experts_gemm", _aria_gemm),
    ("transformers.models.dbrx.modeling_dbrx", "DbrxExperts.forward", _dbrx_experts),
    ("transformers.models.doge.modeling_doge", "DogeAttention.prepare_dynamic_mask", _doge_mask),
    ("transformers.models.qwen4_exp.modeling_qwen4_exp", "Qwen4ExpTextQSAIndexer.forward", _qwen4_selected),
    ("transformers.models.longcat_flash.modeling_longcat_flash", "LongcatFlashExperts.forward", _longcat_experts),
    ("transformers.models.phimoe.modeling_phimoe", "PhimoeRotaryEmbedding.forward", _phimoe_rotary),
)

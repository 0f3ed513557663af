"""Linear maps of one input, side by side, in plain PyTorch: the truth, and the fast way for many tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """``x @ w.T + b`` for each weight, concatenated along the last dimension.

    Args:
        x: ``[..., K]``.
        weights: ``[N_i, K]`` each.
        biases: ``[N_i]`` each, or an empty sequence.

    Returns:
        ``[..., sum of N_i]``, contiguous.
    """
    tokens = x.reshape(-1, x.shape[-1])
    out = x.new_empty(tokens.shape[0], sum(w.shape[0] for w in weights))
    at = 0
    for i, weight in enumerate(weights):
        part = out[:, at : at + weight.shape[0]]
        if biases:
            torch.addmm(biases[i], tokens, weight.t(), out=part)
        else:
            torch.mm(tokens, weight.t(), out=part)
        at += weight.shape[0]
    return out.view(*x.shape[:-1], out.shape[1])

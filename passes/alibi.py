"""ALiBi: a bias of scores that falls linearly with the distance of a key, one slope a head (Press et al., ICLR 2022).

A softmax does not see what is added to all scores of a query alike, so ``slope * key``, ``slope * (key - last)`` and
``-slope * (query - key)`` are one function, and slopes alone say what a bias is at stored positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lethe_compile.passes.evaluate import evaluate, sample_inputs
from lethe_compile.passes.mask_constants import NotABand
from lethe_compile.passes.program import SITE_OP, Program, ancestors, is_call

_LENGTHS = (301, 40)
_PADDING = 5
_FINITE = -1e4  # what lies below denies, and is the mask's business


def alibi_slopes(program: Program, bias: fx.Node, heads: int) -> tuple[float, ...]:
    """The slopes of the bias computed at `bias`, broadcastable to ``[rows, heads, T, T]``, proved on samples.

    Raises:
        NotABand: it is something else, with the reason.
    """
    nodes = ancestors(bias)
    if program.input_ids in nodes and any(is_call(n, torch.ops.aten.embedding, SITE_OP) for n in nodes):
        raise NotABand("its additive bias depends on the content of the sequence")
    slopes = [_measured(program, bias, heads, tokens) for tokens in _LENGTHS]
    if not torch.allclose(slopes[0], slopes[1], rtol=1e-2, atol=1e-6):
        raise NotABand("its additive bias depends on the length of the sequence")
    return tuple(slopes[1].tolist())


def _measured(program: Program, bias: fx.Node, heads: int, tokens: int) -> Tensor:
    """[heads] float32, from the last row of queries, and the whole bias must be made by them."""
    inputs = sample_inputs(tokens, padding=_PADDING, device=program.device)
    computed: Tensor = evaluate(program.module, bias, inputs)
    precision = torch.finfo(computed.dtype).eps
    value = computed.float().reshape((1,) * (4 - computed.dim()) + tuple(computed.shape))
    value = value.expand(3, heads, tokens, tokens)
    slopes: Tensor = (value[0, :, -1, -1] - value[0, :, -1, 0]) / (tokens - 1)  # per head
    real = inputs["attention_mask"].bool()
    position = (real.cumsum(1) - 1).clamp(min=0)
    age = (position[:, :, None] - position[:, None, :]).float()[:, None]  # [rows, 1, T, T]
    expected = -slopes[None, :, None, None] * age
    own = value.diagonal(dim1=2, dim2=3)[..., None]  # [rows, heads, T, 1]: constant along a query's keys
    seen = (age >= 0) & real[:, None, :, None] & real[:, None, None, :] & (value > _FINITE)
    error = ((value - own - expected) * seen).abs().amax()
    if not error <= 4 * precision * value.masked_fill(~seen, 0).abs().amax() + 1e-6:
        raise NotABand("its additive bias is not linear in the distance of a key: no ALiBi")
    return slopes

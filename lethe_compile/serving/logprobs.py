"""Log-probabilities of a chosen token and of the likeliest ones, from the device to the host."""

from __future__ import annotations

from torch import Tensor

from lethe_compile.serving.request import TokenLogprobs

Figures = tuple[Tensor, Tensor, Tensor]  # of the token, of the likeliest, and which these are


def logprobs_of(logits: Tensor, token: Tensor, count: int | None) -> Figures:
    """Of logits [V], at a `token` [] and the `count` likeliest; on their device, which is not waited for."""
    figures = logits.log_softmax(dim=-1)
    top = figures.topk(count or 0)
    return figures[token], top.values, top.indices


def figures_of(token: int, figures: Figures) -> TokenLogprobs:
    """On the host; waits for the device."""
    own, values, indices = figures
    return TokenLogprobs(token, float(own), tuple(zip(indices.tolist(), values.tolist(), strict=True)))

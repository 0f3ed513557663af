"""Teacher forcing: two decoders are fed the same tokens, one a step, and their next-token distributions compared.

The decoders are the ones that generate, with their own caches and rounds: a round comes where it would come in
generation. Logits of a step are compared and dropped, so that memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from lethe_compile.comparison.result import Forced
from lethe_compile.comparison.sides import right_padded
from lethe_compile.errors import LetheError
from lethe_compile.generation import Decoder


@torch.no_grad()
def force(
    reference: Decoder,
    candidate: Decoder,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    advance: Callable[[int], object] = lambda _: None,
) -> list[Forced]:
    """Feed each prompt and then its target, a row each, to both; `advance` hears how many tokens were compared.

    Every target has a token at least. KL is in float64, of the reference from the candidate.

    Raises:
        LetheError: one of the two computes NaN; says which, and at which row and step.
    """
    (target, counts), steps = right_padded(targets, reference.device), max(map(len, targets))
    shape = (steps, len(prompts))
    figures = torch.zeros(3, *shape, dtype=torch.float64, device=reference.device)  # KL, two negative log-likelihoods
    same = torch.zeros(shape, dtype=torch.bool, device=reference.device)
    with ExitStack() as stack:
        logits = [_begin(stack, one, prompts, steps) for one in (reference, candidate)]
        for step in range(steps):
            left, right = (one.to(reference.device) for one in logits)
            figures[:, step], same[step] = _compare(left, right, target[:, step])
            advance(int((step < counts).sum()))
            if step + 1 < steps:
                token, active = target[:, step], step + 1 < counts
                decoders = (reference, candidate)
                logits = [one.decode(token.to(one.device), active.to(one.device)) for one in decoders]
    return _results(figures.cpu().numpy(), same.cpu().numpy(), counts.tolist())


def _begin(stack: ExitStack, decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int) -> Tensor:
    ids, lengths = right_padded(prompts, decoder.device)
    decoder.begin(len(prompts), lengths, steps)
    stack.callback(decoder.end)
    return decoder.prefill(ids, lengths)


def _compare(reference: Tensor, candidate: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """[3, R] of logits [R, V]: KL and both negative log-likelihoods of `token` [R]; [R] whether the best agree."""
    p, q = (logits.double().log_softmax(-1) for logits in (reference, candidate))
    share = p.exp()
    # Where p is 0 its term is 0, also where q is 0, too; where only q is 0 the divergence is infinite.
    kl = torch.where(share > 0, share * (p - q), 0.0).sum(-1).clamp(min=0)
    taken = [-one.gather(1, token[:, None])[:, 0] for one in (p, q)]
    return torch.stack([kl, *taken]), reference.argmax(-1) == candidate.argmax(-1)


def _results(figures: np.ndarray, same: np.ndarray, counts: Sequence[int]) -> list[Forced]:
    """A result for each row, of figures [3, S, R] and agreement [S, R]."""
    results = []
    for row, steps in enumerate(counts):
        kl, unpruned, pruned = figures[:, :steps, row]
        for name, values in (("unpruned", unpruned), ("pruned", pruned), ("pruned", kl)):
            if np.isnan(values).any():
                step = int(np.isnan(values).argmax())
                raise LetheError(f"row {row}, step {step}: the {name} graph's logits are not finite")
        worst = int(kl.argmax())
        agreed = same[:steps, row]
        results.append(
            Forced(
                steps=steps,
                kl=float(kl.mean()),
                kl_max=float(kl[worst]),
                kl_max_step=worst,
                top1=float(agreed.mean()),
                nll=(float(unpruned.mean()), float(pruned.mean())),
                kl_of_step=tuple(kl.tolist()),
                top1_of_step=tuple(agreed.tolist()),
            )
        )
    return results

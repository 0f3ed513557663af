"""The policy that evicts nothing a query could still see: the baseline, and the mode for exactness."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lethe_compile.policies.base import LayerState, Policy, Selection


class FullPolicy(Policy):
    """Keep everything but the tokens that a layer's sliding window has hidden for good; lossless."""

    name = "full"

    def round(self, layers: Sequence[LayerState]) -> list[Selection | None]:
        seen = {i: state.visible() for i, state in enumerate(layers) if state.window is not None}
        if not seen:
            return [None] * len(layers)
        drops = torch.stack([(keep.sum(1) < layers[i].length).any() for i, keep in seen.items()])
        dropping = dict(zip(seen, drops.tolist(), strict=True))  # the round's one host sync
        return [Selection.of(state, seen[i]) if dropping.get(i) else None for i, state in enumerate(layers)]

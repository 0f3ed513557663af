"""StreamingLLM: attention sinks and a sliding window, whatever attention says.

Source: Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, ICLR 2024, arXiv 2309.17453.

Ours differs: kept tokens keep their positions, where the paper counts positions within the cache, which is for texts
longer than a model's context; the window slides every `prune_interval` steps; the prompt is protected where the cap has
room for it, unless `protect_prompt=False`.
"""

from __future__ import annotations

from torch import Tensor

from lethe_compile.policies.base import RoundState
from lethe_compile.policies.budgeted import RankedPolicy


class StreamingPolicy(RankedPolicy):
    """Keep the first `sink_tokens` and the newest tokens. Needs no scores, so that steps run without attention mass.

    With a protected prompt, `recent_ratio` of the cap goes to the newest before the prompt gets the rest.
    """

    name = "streaming"

    def scores(self, view: RoundState) -> Tensor:
        return view.position.float()

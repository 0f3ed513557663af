"""MorphKV: a cache of constant size, chosen by what the newest tokens attend to.

Source: Ghadia et al., *Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs*, ICML 2025,
arXiv 2503.00979: of C tokens, R are the newest; the others are those that correlate most with them, by the attention
that these R queries gave: added up ("sum fusion"), or the most of any ("max fusion").

Ours differs: the choice is made every `prune_interval` steps, of which the attention of at most that many queries is
known, so R queries of the paper are min(R, prune_interval); a layer chooses as a whole, and "max" is over heads as well
as queries; sinks and, unless `protect_prompt=False`, the prompt stay where the cap has room for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lethe_compile.policies.base import RoundState
from lethe_compile.policies.budgeted import ObservedPolicy
from lethe_compile.settings import Settings, integer, one_of, setting


@dataclass(frozen=True)
class MorphOptions(Settings):
    window: int = setting(32, integer(1))
    """R: newest tokens, which stay, as far as half the cap goes, and whose queries choose the others."""

    fusion: str = setting("sum", one_of("sum", "max"))
    """How the attention of those queries comes together."""


class MorphPolicy(ObservedPolicy):
    """Keep the newest tokens, and the distant ones that these attend to."""

    name = "morph"
    Options = MorphOptions
    options: MorphOptions

    @property
    def peak(self) -> bool:
        return self.options.fusion == "max"

    def scores(self, view: RoundState) -> Tensor:
        return view.mass

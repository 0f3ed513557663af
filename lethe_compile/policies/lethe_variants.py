"""Lethe per KV head, and Lethe with one part switched off: names for ablations, each with other `LetheOptions`.

The two parts are layerwise budgets and RASR, the decayed score. What stays in `LetheConfig` is separable
there: `decay=1` never forgets, `score="sum"` is the paper's score, `paper_literal` its batch-wide choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lethe_compile.policies.lethe import LetheOptions, LethePolicy
from lethe_compile.settings import BOOL, one_of, setting


class HeadsPolicy(LethePolicy):
    """Lethe where every KV head keeps tokens of its own: scores, breakpoints and caps are those of a head.

    A token that one head reads costs nothing in the others; in return each head has a page table and lengths.
    """

    name = "lethe-heads"
    per_head: ClassVar[bool] = True


@dataclass(frozen=True)
class BudgetsOnlyOptions(LetheOptions):
    choice: str = setting("recent", one_of("score", "recent"))


class BudgetsOnlyPolicy(LethePolicy):
    """Lethe's layer budgets without RASR: scores say how many tokens a layer keeps, and those are its newest."""

    name = "lethe-budgets"
    Options = BudgetsOnlyOptions


@dataclass(frozen=True)
class RasrOnlyOptions(LetheOptions):
    breakpoint: bool = setting(False, BOOL)
    shares: str = setting("uniform", one_of("density", "uniform"))


class RasrOnlyPolicy(LethePolicy):
    """RASR without Lethe's layer budgets: every layer keeps the same number of tokens, those of the highest scores."""

    name = "lethe-rasr"
    Options = RasrOnlyOptions


@dataclass(frozen=True)
class UniformOptions(LetheOptions):
    shares: str = setting("uniform", one_of("density", "uniform"))


class UniformPolicy(LethePolicy):
    """Lethe whose layers share a `budget` equally; each still prunes itself at its breakpoint."""

    name = "lethe-uniform"
    Options = UniformOptions

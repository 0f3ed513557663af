"""`LetheConfig`: the settings of one optimized model, checked when they are made.

Paper: Zeng et al., *Lethe: Layer- and Time-Adaptive KV Cache Pruning for Reasoning-Intensive LLM
Serving*, AAAI 2026, arXiv 2511.06029.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from lethe_compile.errors import ConfigError

MIN_RETAINED = 8
"""Tokens beside the sinks that a hard cap must always leave room for."""
_INTERVAL, _INTERVAL_APART = 32, 128  # decode steps between rounds, the latter where the host is not the device


@dataclass(frozen=True)
class LetheConfig:
    """What to keep in the KV cache, and when to decide.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another field.
    """

    policy: str = "lethe"
    """Registered name of the eviction policy: `lethe`, `full` (evicts nothing), or one of your own."""

    sparse_ratio: float = 30.0
    """τ: the highest score must exceed a score τ times for that one to be prunable. Ratio in (1, 1e30]; larger keeps
    more. Paper: 400, for sums of attention. Measured: see `score`."""

    recent_ratio: float = 0.4
    """Share of a sequence's retained tokens, counted from the newest, that a round never evicts: the grace of new
    tokens, whose scores are still small. In [0, 1]; at least one token is kept in any case. Paper: 0.3."""

    segments: int = 16
    """D: equal segments of the sorted scores between which a breakpoint is looked for. 2..1024. More segments cut
    closer to the first prunable score; fewer are safer, since the first n/D tokens always stay. Not in the paper."""

    decay: float = 0.985
    """γ: factor on every token's score at each decode step (RASR). In (0, 1]; 1 never forgets. A score halves in
    ln 2 / (1 - γ) steps, 46 at 0.985. Not in the paper."""

    score: str = "peak"
    """What a token's score gathers from a step: "peak", its largest attention probability over heads and queries, kept
    as `max(γ·s, peak)`; or "sum", the paper's RASR, the sum over heads and queries, kept as `γ·s + sum`. A sum also
    counts the little that idle heads spread over everything, which drowns what one head really reads.

    Measured on the bundled reasoner, where sums are so flat that τ = 400 finds no breakpoint: with the defaults here,
    `lethe demo --problems 96 --seed 1` solves 96 of 96 at 0.25 × the full cache's mean bytes."""

    sink_tokens: int = 4
    """Tokens at positions 0..sink_tokens-1, which a round never evicts. 0..1024. Not in the paper."""

    prune_threshold: int = 128
    """Retained tokens at which a layer is first considered for pruning; doubles whenever no breakpoint is found.
    ≥ 1. Not in the paper."""

    prune_interval: int | None = None
    """Decode steps between two rounds. ≥ 1, or None: 32 on a CPU. Elsewhere, where the device waits for the host in a
    round, an eighth of `max_tokens`, in 32..128; 128 without a cap, 32 with a `budget`. Fewer steps hold the cache
    closer to its target and cost more rounds."""

    max_tokens: int | None = None
    """Hard cap on the retained tokens of one layer and sequence during decode; None for no cap.
    ≥ prune_interval + sink_tokens + 8, since a round must make room for the tokens that come before the next."""

    budget: int | None = None
    """Hard cap on the retained tokens of one sequence, summed over all layers, during decode; None for no cap.
    ≥ layers · (prune_interval + sink_tokens + 8), checked when a generation begins. Under pressure it is shared
    among layers in proportion to their density (1 - Hoyer sparsity)."""

    paper_literal: bool = False
    """Score as the paper does: sinks compete for v[0], and scores are summed over the batch into one keep-set. By
    default every sequence has its own, since the sum hurts whichever sequence is in the minority."""

    protect_prompt: bool = True
    """Never evict prompt tokens, except where a hard cap leaves no room for them. Not in the paper."""

    page_size: int | None = None
    """Tokens per page of the KV cache. A power of two, 1..256, or None: 8 on a CPU, since pruned caches are small and a
    sequence wastes half a page in each layer; 64 elsewhere, where a kernel's block of keys is then one stretch of
    memory."""

    cache_latent: bool = True
    """Cache the latent that keys and values of multi-head latent attention (MLA: DeepSeek V2 and V3, Kimi, MiniCPM3)
    are made of, where that takes fewer bytes than they do by more than it adds to attention's arithmetic: 576 numbers a
    token and layer in DeepSeek V3 instead of 40,960. Prompts take longer: see `passes.cache_latent`."""

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if not rule.accepts(value):
                raise ConfigError(f"{name}={value!r} is not allowed: must be {rule.allowed}")
        if self.max_tokens is not None and self.max_tokens < self.cap_floor:
            raise ConfigError(
                f"max_tokens={self.max_tokens} is not allowed: must be None or an integer >= {self.cap_floor}"
                f" (prune_interval {self.interval} + sink_tokens {self.sink_tokens} + {MIN_RETAINED})"
            )

    @property
    def cap_floor(self) -> int:
        """Smallest hard cap of one layer: one interval of new tokens, the sinks, and `MIN_RETAINED` more."""
        return self.interval + self.sink_tokens + MIN_RETAINED

    @property
    def interval(self) -> int:
        """`prune_interval`, or its least default."""
        return self.prune_interval or _INTERVAL

    def interval_on(self, device_type: str) -> int:
        """`prune_interval`, or its default on a device of that type."""
        if self.prune_interval is not None or device_type == "cpu" or self.budget is not None:
            return self.interval
        return min(_INTERVAL_APART, max(_INTERVAL, (self.max_tokens or 8 * _INTERVAL_APART) // 8))

    def page_size_on(self, device_type: str) -> int:
        """`page_size`, or its default on a device of that type."""
        return self.page_size or (8 if device_type == "cpu" else 64)

    @classmethod
    def paper(cls) -> LetheConfig:
        """The published method: the paper's values, batch-summed scores, no protection of the prompt."""
        return cls(sparse_ratio=400.0, recent_ratio=0.3, score="sum", paper_literal=True, protect_prompt=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LetheConfig:
        """Build from field names and values; fields left out take their defaults.

        Raises:
            ConfigError: an unknown key, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                nearest = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"{key!r} is not a setting of LetheConfig; the nearest is {nearest!r}, of {', '.join(known)}"
                )
        return cls(**values)


@dataclass(frozen=True)
class _Rule:
    """Which values a field accepts, in code and in words."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int to Python, never to a user


def _integer(low: int, high: int | None = None) -> _Rule:
    span = f">= {low}" if high is None else f"in {low}..{high}"
    return _Rule(f"an integer {span}", lambda v: _is_int(v) and low <= v and (high is None or v <= high))


def _number(allowed: str, within: Callable[[float], bool]) -> _Rule:
    return _Rule(f"a number {allowed}", lambda v: (_is_int(v) or isinstance(v, float)) and within(v))


def _optional(rule: _Rule) -> _Rule:
    return _Rule(f"None or {rule.allowed}", lambda v: v is None or rule.accepts(v))


_BOOL = _Rule("True or False", lambda v: isinstance(v, bool))

_RULES: Mapping[str, _Rule] = {
    "policy": _Rule("the name of a registered policy", lambda v: isinstance(v, str) and v != ""),
    "sparse_ratio": _number("in (1, 1e30]", lambda v: 1 < v <= 1e30),
    "recent_ratio": _number("in [0, 1]", lambda v: 0 <= v <= 1),
    "segments": _integer(2, 1024),
    "decay": _number("in (0, 1]", lambda v: 0 < v <= 1),
    "score": _Rule("'peak' or 'sum'", lambda v: v in ("peak", "sum")),
    "sink_tokens": _integer(0, 1024),
    "prune_threshold": _integer(1),
    "prune_interval": _optional(_integer(1)),
    "max_tokens": _optional(_integer(1)),
    "budget": _optional(_integer(1)),
    "paper_literal": _BOOL,
    "protect_prompt": _BOOL,
    "cache_latent": _BOOL,
    "page_size": _optional(
        _Rule("a power of two in 1..256", lambda v: _is_int(v) and 1 <= v <= 256 and v & (v - 1) == 0)
    ),
}

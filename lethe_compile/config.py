"""`LetheConfig`: the settings of one optimized model, checked when they are made.

Paper: Zeng et al., *Lethe: Layer- and Time-Adaptive KV Cache Pruning for Reasoning-Intensive LLM
Serving*, AAAI 2026, arXiv 2511.06029.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lethe_compile.errors import ConfigError
from lethe_compile.settings import BOOL, SHARE, Rule, Settings, integer, is_integer, number, one_of, optional, setting

MIN_RETAINED = 8
"""Tokens beside the sinks that a hard cap must always leave room for."""
_SHORTEST, _INTERVAL, _INTERVAL_APART = 8, 32, 128  # decode steps between rounds, the last where host and device differ
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def parse_bytes(text: str) -> int | None:
    """Bytes of such as "64MiB" or "1.5 GB"; None where it is no such text, or less than one byte."""
    match = _BYTES.fullmatch(text)
    return int(float(match[1]) * _UNITS[match[2]]) or None if match else None


def _is_budget(value: Any) -> bool:
    if isinstance(value, str):
        return parse_bytes(value) is not None
    return (is_integer(value) and value >= 1) or (isinstance(value, float) and 0 < value <= 1)


_BUDGET = Rule(
    "an integer >= 1 of tokens, a float in (0, 1], the share of the full cache, or bytes such as '64MiB'"
    f" ({', '.join(_UNITS)})",
    _is_budget,
)
_PAGE = Rule("a power of two in 1..256", lambda v: is_integer(v) and 1 <= v <= 256 and v & (v - 1) == 0)
_NAME = Rule("the name of a registered policy", lambda v: isinstance(v, str) and v != "")
_OPTIONS = Rule(
    "a mapping of names to values", lambda v: isinstance(v, Mapping) and all(isinstance(key, str) for key in v)
)


@dataclass(frozen=True)
class LetheConfig(Settings):
    """What to keep in the KV cache, and when to decide.

    "Measured" below is on the bundled reasoner, 512 problems of 2,000 to 3,000 tokens, where the full cache solves
    99.8%; all cells are in `tools/results/reasoner-policies-2026-11-26.json`. `lethe evaluate` measures your own model.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another field.
    """

    policy: str = setting("lethe", _NAME)
    """Registered name of the eviction policy: `lethe`; `full`, which evicts nothing; a method to compare with
    (`streaming`, `h2o`, `tova`, `snapkv`, `pyramid`, `morph`, `rkv`, `random`), each of which needs `max_tokens` or
    `budget`; `lethe` with a part of it switched off (`lethe-budgets`, `lethe-rasr`, `lethe-uniform`); or your own."""

    policy_options: Mapping[str, Any] = setting(None, _OPTIONS, default_factory=dict, hash=False)
    """Settings of the policy's own, such as `{"importance": 0.1}` for `rkv`: the fields of its class's `Options`, which
    has the defaults. Checked when the policy is made."""

    sparse_ratio: float = setting(30.0, number("in (1, 1e30]", lambda v: 1 < v <= 1e30))
    """τ: the highest score must exceed a score τ times for that one to be prunable. Ratio in (1, 1e30]; larger keeps
    more. Paper: 400, for sums of attention. Measured without a cap: 10, 30, 100 solve 98.4, 99.6, 99.6% at 0.21, 0.29,
    0.50 × the full cache's mean bytes."""

    recent_ratio: float = setting(0.4, SHARE)
    """Share of a sequence's retained tokens, counted from the newest, that a round never evicts: the grace of new
    tokens, whose scores are still small. In [0, 1]; at least one token is kept in any case. Paper: 0.3.
    Measured at `max_tokens` 192: 0.1, 0.2, 0.3, 0.4, 0.5 solve 23, 46, 76, 78, 67%."""

    segments: int = setting(16, integer(2, 1024))
    """D: equal segments of the sorted scores between which a breakpoint is looked for. 2..1024. More segments cut
    closer to the first prunable score; fewer are safer, since the first n/D tokens always stay. Not in the paper.
    Measured without a cap: 4, 16, 64 solve 99.6% each, at 2.46, 2.17, 2.12 MiB."""

    decay: float = setting(0.985, number("in (0, 1]", lambda v: 0 < v <= 1))
    """γ: factor on every token's score at each decode step (RASR). In (0, 1]; 1 never forgets. A score halves in
    ln 2 / (1 - γ) steps, 46 at 0.985. Not in the paper. Measured at `max_tokens` 192: 0.95, 0.97, 0.985, 0.995, 1 solve
    73, 80, 78, 63, 46%; intervals of 0.97 and 0.985 overlap."""

    score: str = setting("peak", one_of("peak", "sum"))
    """What a token's score gathers from a step: "peak", its largest attention probability over heads and queries, kept
    as `max(γ·s, peak)`; or "sum", the paper's RASR, the sum over heads and queries, kept as `γ·s + sum`. A sum also
    counts the little that idle heads spread over everything, which drowns what one head really reads.

    Measured at `max_tokens` 256: peaks solve 93.8%, sums 87.5%, whatever τ in 100..800, for sums are so flat there that
    no breakpoint is found."""

    sink_tokens: int = setting(4, integer(0, 1024))
    """Tokens at positions 0..sink_tokens-1, which a round never evicts. 0..1024. Not in the paper."""

    prune_threshold: int = setting(128, integer(1))
    """Retained tokens at which a layer is first considered for pruning; doubles whenever no breakpoint is found.
    ≥ 1. Not in the paper. Measured without a cap: 64, 128, 256 are alike."""

    prune_interval: int | None = setting(None, optional(integer(1)))
    """Decode steps between two rounds. ≥ 1, or None: an eighth of `max_tokens`, in 8..32 on a CPU, and in 8..128
    elsewhere, where the device waits for the host in a round. Without `max_tokens`, 32 on a CPU or with a `budget`, 128
    elsewhere. Fewer steps hold the cache closer to its cap and cost more rounds. Measured at `max_tokens` 192: 8, 16,
    32, 64 solve 84, 84, 78, 43%."""

    max_tokens: int | None = setting(None, optional(integer(1)))
    """Hard cap on the retained tokens of one layer and sequence during decode; None for no cap.
    ≥ prune_interval + sink_tokens + 8, since a round must make room for the tokens that come before the next."""

    budget: int | float | str | None = setting(None, optional(_BUDGET))
    """Hard cap on what one sequence retains in all layers together, during decode; None for no cap. The policy shares
    it among layers: `lethe` in proportion to their density (1 - Hoyer sparsity), most others in equal parts. Given as

    - tokens, an integer, summed over layers: >= layers · (prune_interval + sink_tokens + 8), checked when a generation
      begins;
    - bytes of keys and values, such as "64MiB", no less than those of that many tokens. Tokens count, not pages: the
      last page of each layer is held whole;
    - a share of the full cache, a float in (0, 1]: of what `full` would hold of the tokens seen so far, growing with
      the sequence. Never less than that many tokens and the protected prompt: short sequences hold a larger share."""

    paper_literal: bool = setting(False, BOOL)
    """Score as the paper does: sinks compete for v[0], and scores are summed over the batch into one keep-set. By
    default every sequence has its own, since the sum hurts whichever sequence is in the minority."""

    protect_prompt: bool = setting(True, BOOL)
    """Never evict prompt tokens, except where a hard cap leaves no room for them. Not in the paper."""

    page_size: int | None = setting(None, optional(_PAGE))
    """Tokens per page of the KV cache. A power of two, 1..256, or None: 8 on a CPU, since pruned caches are small and a
    sequence wastes half a page in each layer; 64 elsewhere, where a kernel's block of keys is then one stretch of
    memory."""

    cache_latent: bool = setting(True, BOOL)
    """Cache the latent that keys and values of multi-head latent attention (MLA: DeepSeek V2 and V3, Kimi, MiniCPM3)
    are made of, where that takes fewer bytes than they do by more than it adds to attention's arithmetic: 576 numbers a
    token and layer in DeepSeek V3 instead of 40,960. Prompts take longer: see `passes.cache_latent`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "policy_options", dict(self.policy_options))  # the caller's own may change
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
    def capped(self) -> bool:
        """Whether there is a hard cap on what is retained."""
        return self.max_tokens is not None or self.budget is not None

    @property
    def interval(self) -> int:
        """`prune_interval`, or its least default."""
        return self.interval_on("cpu")

    def interval_on(self, device_type: str) -> int:
        """`prune_interval`, or its default on a device of that type."""
        if self.prune_interval is not None:
            return self.prune_interval
        longest = _INTERVAL if device_type == "cpu" or self.budget is not None else _INTERVAL_APART
        return longest if self.max_tokens is None else min(longest, max(_SHORTEST, self.max_tokens // 8))

    def page_size_on(self, device_type: str) -> int:
        """`page_size`, or its default on a device of that type."""
        return self.page_size or (8 if device_type == "cpu" else 64)

    @classmethod
    def paper(cls) -> LetheConfig:
        """The published method: the paper's values, batch-summed scores, no protection of the prompt."""
        return cls(sparse_ratio=400.0, recent_ratio=0.3, score="sum", paper_literal=True, protect_prompt=False)

"""The metrics of a comparison: what they are called, which way is better, how they are shown and limited."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One figure over all prompts.

    Attributes:
        unit: "nats", "share" (0.02 is 2%), "ratio", "steps".
        lower_is_better: which way it may not move.
    """

    name: str
    title: str
    unit: str
    lower_is_better: bool

    def show(self, value: float | None) -> str:
        """For a table."""
        if value is None:
            return ""
        if self.unit == "share":
            return f"{100 * value:.2f}%"
        if self.unit == "ratio":
            return f"{value:.3f} ×"
        return f"{value:,.0f}" if self.unit == "steps" else f"{value:.3g}"

    def show_limit(self, limit: float | None) -> str:
        """For a table."""
        return "" if limit is None else f"{'≤' if self.lower_is_better else '≥'} {self.show(limit)}"


_ALL = (
    Metric("kl", "KL, mean per step", "nats", True),
    Metric("kl_p99", "KL, 99th percentile", "nats", True),
    Metric("kl_max", "KL, largest", "nats", True),
    Metric("top1", "top-1 agreement", "share", False),
    Metric("ppl_increase", "perplexity increase", "share", True),
    Metric("accuracy_drop", "accuracy drop", "share", True),
    Metric("same_outputs", "outputs the same", "share", False),
    Metric("first_divergence", "first divergence, median", "steps", False),
    Metric("length_ratio", "output length", "ratio", True),
    Metric("terminated_drop", "fewer ended by themselves", "share", True),
    Metric("memory_saving", "KV memory saved, mean", "share", False),
    Metric("kv_mean_ratio", "KV bytes, mean", "ratio", True),
    Metric("kv_peak_ratio", "KV bytes, peak", "ratio", True),
    Metric("speedup", "tokens/s", "ratio", False),
)
METRICS = {metric.name: metric for metric in _ALL}
"""By name, in the order of tables."""

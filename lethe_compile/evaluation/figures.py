"""What results come to: accuracy with intervals, paired comparisons with the full cache, bytes, and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lethe_compile.evaluation.cells import FULL, Cell
from lethe_compile.evaluation.journal import Record

RESAMPLES = 5000
CONFIDENCE = 0.95
_NEAR = 0.05  # cells of equal caps differ by less in mean bytes
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CellFigures:
    """One cell. Bytes are of keys and values, a mean over problems: of their means over the generation, or their peaks.

    `versus_full` is the difference of scores on the problems that both have, `p_value` McNemar's exact test of it,
    None where scores are not only 0 and 1, or nothing is there to compare with.
    """

    id: str
    curve: str
    group: str
    policy: str
    batch: int
    budget: str
    problems: int
    score: Estimate
    versus_full: Estimate | None
    p_value: float | None
    new_tokens: float
    terminated: float
    kv_mean: float
    kv_peak: float
    kv_of_full: float | None  # kv_mean over that of the full cache on the same problems
    pool_mean: float
    pool_peak: float
    tokens_per_s: float  # of one process
    groups: dict[str, float]  # score by group of problems


@dataclass(frozen=True)
class AtEqualBytes:
    """Score of a cell less that of a curve at the cell's mean bytes, interpolated between its two neighbours there.

    `difference` is None where the curve was not measured on both sides of those bytes, nor within 5% of them.
    """

    cell: str
    curve: str
    kv_mean: float
    difference: Estimate | None


@dataclass(frozen=True)
class Figures:
    """All cells that have results, in order, and Lethe's against the other curves of its group."""

    cells: tuple[CellFigures, ...]
    equal_bytes: tuple[AtEqualBytes, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def summarize(cells: Sequence[Cell], records: Sequence[Record], *, seed: int = 0, reference: str = "lethe") -> Figures:
    """Figures of all cells with results; `reference` is the policy that the others are compared with at equal bytes."""
    by_cell: dict[str, dict[str, Record]] = {}
    for record in records:
        by_cell.setdefault(record["cell"], {})[record["problem"]] = record
    present = [cell for cell in cells if by_cell.get(cell.id)]
    whole = max((c for c in present if c.is_full), key=lambda c: len(by_cell[c.id]), default=None)
    full = by_cell[whole.id] if whole else None
    figures = tuple(_cell(cell, by_cell[cell.id], full, seed) for cell in present)
    return Figures(figures, tuple(_equal_bytes(figures, by_cell, reference, seed)))


def _cell(cell: Cell, results: dict[str, Record], full: dict[str, Record] | None, seed: int) -> CellFigures:
    rows = list(results.values())
    shared = [] if full is None or cell.is_full else [name for name in results if name in full]
    mine = _column([results[name] for name in shared], "score")
    theirs = _column([full[name] for name in shared], "score") if full else mine
    means = {
        name: float(_column(rows, name).mean())
        for name in ("new_tokens", "terminated", "kv_mean", "kv_peak", "pool_mean", "pool_peak")
    }
    groups = {group: _column([r for r in rows if r["group"] == group], "score") for group in _order(rows)}
    ratio = None
    if full is not None and (common := [name for name in results if name in full]):
        bytes_of = [_column([of[name] for name in common], "kv_mean").sum() for of in (results, full)]
        ratio = float(bytes_of[0] / bytes_of[1])
    return CellFigures(
        id=cell.id,
        curve=cell.curve,
        group=cell.group,
        policy=cell.config.policy,
        batch=cell.batch,
        budget=cell.budget,
        problems=len(rows),
        score=estimate(_column(rows, "score"), seed),
        versus_full=estimate(mine - theirs, seed, -1.0) if shared else None,
        p_value=mcnemar(mine, theirs) if shared else None,
        kv_of_full=ratio,
        tokens_per_s=float(_column(rows, "new_tokens").sum() / max(_column(rows, "seconds").sum(), 1e-9)),
        groups={group: float(scores.mean()) for group, scores in groups.items()},
        **means,
    )


def _column(rows: Sequence[Record], name: str) -> Floats:
    return np.array([row[name] for row in rows], np.float64)


def _order(rows: Sequence[Record]) -> list[str]:
    return sorted({row["group"] for row in rows})


def estimate(values: Floats, seed: int, lowest: float = 0.0) -> Estimate:
    """The mean of `values` [n] in lowest..1, and a percentile bootstrap interval (`scipy.stats.bootstrap`).

    Where all are alike the bootstrap has nothing to draw from and would claim certainty. The interval then reaches as
    far as Clopper and Pearson's for something never seen in n observations.
    """
    from scipy import stats

    mean = float(values.mean())
    if len(values) > 1 and np.ptp(values) > 0:
        drawn = stats.bootstrap(
            (values,), np.mean, n_resamples=RESAMPLES, method="percentile", confidence_level=CONFIDENCE,
            rng=np.random.default_rng(seed), batch=max(1, 2_000_000 // len(values)),
        )  # fmt: skip
        return Estimate(mean, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high))
    unseen = float(stats.binomtest(0, len(values)).proportion_ci(CONFIDENCE).high)
    return Estimate(mean, max(lowest, mean - unseen), min(1.0, mean + unseen))


def mcnemar(mine: Floats, theirs: Floats) -> float | None:
    """Two-sided exact p value that paired outcomes [n] differ by chance only; None unless all are 0 or 1."""
    if not np.isin(np.concatenate([mine, theirs]), (0.0, 1.0)).all():
        return None
    from scipy import stats

    won, lost = int((mine > theirs).sum()), int((mine < theirs).sum())
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def _equal_bytes(
    figures: Sequence[CellFigures], by_cell: dict[str, dict[str, Record]], reference: str, seed: int
) -> list[AtEqualBytes]:
    """Of the first curve of the reference, against the others of its group."""
    found: list[AtEqualBytes] = []
    first = next((figure for figure in figures if figure.policy == reference), None)
    if first is None:
        return found
    group = [figure for figure in figures if figure.group == first.group and figure.policy != FULL]
    for cell in (figure for figure in group if figure.curve == first.curve):
        rest = [figure for figure in group if figure.curve != first.curve]
        for curve in dict.fromkeys(figure.curve for figure in rest):
            points = sorted((f for f in rest if f.curve == curve), key=lambda figure: figure.kv_mean)
            difference = _interpolated(cell, points, by_cell, seed)
            found.append(AtEqualBytes(cell.id, curve, cell.kv_mean, difference))
    return found


def _interpolated(
    cell: CellFigures, points: Sequence[CellFigures], by_cell: dict[str, dict[str, Record]], seed: int
) -> Estimate | None:
    """Linear in log bytes, problem by problem, so that the bootstrap sees pairs. An end stands for what is near it."""
    near = min(points, key=lambda point: abs(np.log(point.kv_mean / cell.kv_mean)))
    below = max((p for p in points if p.kv_mean <= cell.kv_mean), key=lambda p: p.kv_mean, default=None)
    above = min((p for p in points if p.kv_mean >= cell.kv_mean), key=lambda p: p.kv_mean, default=None)
    if below is None or above is None:
        if abs(np.log(near.kv_mean / cell.kv_mean)) > np.log(1 + _NEAR):
            return None
        below = above = near
    span = np.log(above.kv_mean) - np.log(below.kv_mean)
    weight = float((np.log(cell.kv_mean) - np.log(below.kv_mean)) / span) if span else 0.0
    mine, low, high = (by_cell[one.id] for one in (cell, below, above))
    shared = [name for name in mine if name in low and name in high]
    if not shared:
        return None
    columns = [_column([results[name] for name in shared], "score") for results in (mine, low, high)]
    return estimate(columns[0] - (1 - weight) * columns[1] - weight * columns[2], seed, -1.0)

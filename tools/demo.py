"""`lethe demo`: the bundled reasoner solves fresh problems with a full and with a pruned KV cache, side by side."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lethe_compile.api import optimize
from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.models import reasoner
from lethe_compile.prompt import left_padded
from lethe_compile.report import CacheStats
from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools import _models, _policies

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 24  # characters of a bar


@dataclass(frozen=True)
class Outcome:
    """What one run over all problems came to; bytes are of keys and values, over all sequences of a batch."""

    solved: int
    new_tokens: int
    kv_bytes_mean: float
    kv_bytes_peak: int
    tokens_per_s: float
    seconds: float
    retained_per_layer: list[float]  # tokens, mean over steps and sequences


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0 whatever the accuracy."""
    options = _arguments(argv)
    console = Console()
    problems = _problems(options)
    model = _models.load_model(_models.REASONER)
    config = LetheConfig(
        policy=options.policy,
        policy_options=_policies.options_of(options.policy_option),
        **{name: value for name, value in vars(options).items() if name in _CONFIGURABLE},
    )
    label = "Lethe" if config.policy == "lethe" else config.policy
    console.print(
        f"{options.problems} fresh problems with traces of {options.shortest}–"
        f"{options.longest} tokens; compiling the reasoner …"
    )
    fast = optimize(model, config)
    with fast.unpruned():
        full, _ = _run(fast, problems, "full cache")
    pruned, stats = _run(fast, problems, label)
    console.print(_table(full, pruned, options.problems, label))
    console.print(_picture(full, pruned, stats, label))
    if options.json is not None:
        shared = {name: value for name, value in asdict(full).items() if name != "retained_per_layer"}
        result = {"problems": options.problems, "full": shared, "lethe": asdict(pruned), "config": config.to_dict()}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


_CONFIGURABLE = ("sparse_ratio", "recent_ratio", "segments", "decay", "score", "prune_interval", "max_tokens", "budget")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lethe demo", description=__doc__)
    parser.add_argument("--problems", type=int, default=16, metavar="N", help="how many, of all families (default 16)")
    parser.add_argument("--shortest", type=int, default=2000, help="tokens of the shortest reference trace (2000)")
    parser.add_argument("--longest", type=int, default=3000, help="tokens of the longest reference trace (3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    pruning = parser.add_argument_group("pruning, see LetheConfig")
    _policies.add_arguments(pruning)
    defaults = LetheConfig()
    for name in _CONFIGURABLE:
        default = getattr(defaults, name)
        kind = _policies.budget if name == "budget" else int if default is None else type(default)
        pruning.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"default {default}")
    options = parser.parse_args(argv)
    if options.problems < len(reasoner.FAMILIES):
        raise InputError(f"--problems {options.problems}: at least one of each family, {len(reasoner.FAMILIES)}")
    if not 1000 <= options.shortest < options.longest <= 4000:
        raise InputError(
            "--shortest and --longest must lie within 1000..4000, which is what the reasoner was trained for"
        )
    return options


def _problems(options: argparse.Namespace) -> list[reasoner.Problems]:
    """Fresh problems, as many of each family as can be."""
    families = reasoner.FAMILIES
    counts = [options.problems // len(families) + (i < options.problems % len(families)) for i in range(len(families))]
    lengths = {"min_tokens": options.shortest, "max_tokens": options.longest}
    return [
        reasoner.problems(count, seed=options.seed, family=family, **lengths)
        for family, count in zip(families, counts, strict=True)
    ]


def _run(fast: OptimizedModel, problems: Sequence[reasoner.Problems], label: str) -> tuple[Outcome, CacheStats]:
    """Solve all problems in one batch, greedily."""
    ids, mask = left_padded([p.prompt(row) for p in problems for row in range(len(p))])
    width = ids.shape[1]
    longest = max(int(p.trace_lengths.max()) for p in problems)
    Console(stderr=True).print(f"[dim]{label}[/dim]")
    start = time.perf_counter()
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=longest + 32, do_sample=False, progress=True)
    seconds = time.perf_counter() - start
    stats = fast.cache_stats()
    new = out[:, width:]
    solved = sum(int(reasoner.solved(p, rows).sum()) for p, rows in zip(problems, _split(new, problems), strict=True))
    tokens = int(sum(stats.seen) - mask.sum()) + len(ids)  # the last token of a sequence is written, never fed
    retained = [sum(layer) / len(layer) for layer in stats.retained_mean]
    outcome = Outcome(solved, tokens, stats.bytes_mean, stats.bytes_peak, tokens / seconds, seconds, retained)
    return outcome, stats


def _split(rows: Tensor, problems: Sequence[reasoner.Problems]) -> tuple[Tensor, ...]:
    return torch.split(rows, [len(p) for p in problems])


def _table(full: Outcome, pruned: Outcome, problems: int, label: str) -> Table:
    table = Table(title=f"{problems} problems", title_justify="left")
    for column in ("", "full cache", label, f"{label} : full"):
        table.add_column(column, justify="left" if not column else "right")
    rows: list[tuple[str, Any, Any, str]] = [
        ("solved", full.solved, pruned.solved, "d"),
        ("tokens written", full.new_tokens, pruned.new_tokens, ",d"),
        ("KV cache, mean MiB", full.kv_bytes_mean / 2**20, pruned.kv_bytes_mean / 2**20, ".2f"),
        ("KV cache, peak MiB", full.kv_bytes_peak / 2**20, pruned.kv_bytes_peak / 2**20, ".2f"),
        ("tokens/s", full.tokens_per_s, pruned.tokens_per_s, ",.0f"),
    ]
    for name, left, right, form in rows:
        ratio = f"{right / left:.2f} ×" if left else ""
        table.add_row(name, format(left, form), format(right, form), ratio)
    return table


def _picture(full: Outcome, pruned: Outcome, stats: CacheStats, label: str) -> Table:
    """Tokens retained per layer: the mean beside that of the full cache, and their course from round to round."""
    table = Table(title="tokens retained per layer, mean over sequences and steps", title_justify="left", box=None)
    for column in ("layer", "full", label, f"{label} of full", f"{label}, start to end"):
        table.add_column(column, justify="right" if column in ("layer", "full", label) else "left")
    top = max(map(max, stats.timeline))
    for layer, (before, after) in enumerate(zip(full.retained_per_layer, pruned.retained_per_layer, strict=True)):
        filled = round(_WIDTH * after / before)
        bar = f"[green]{'█' * filled}[/green][dim]{'░' * (_WIDTH - filled)}[/dim]"
        table.add_row(str(layer), f"{before:,.0f}", f"{after:,.0f}", bar, _spark(stats.timeline, layer, top))
    return table


def _spark(timeline: Sequence[Sequence[float]], layer: int, top: float) -> str:
    """One layer's course [rounds][layers] in block characters, `top` tokens at full height."""
    at = [timeline[i * len(timeline) // _WIDTH][layer] for i in range(_WIDTH)]
    return "".join(_BLOCKS[round(value / top * (len(_BLOCKS) - 1))] for value in at)


if __name__ == "__main__":
    raise SystemExit(main())

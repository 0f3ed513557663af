"""`lethe evaluate`: policies × budgets on tasks, accuracy against KV bytes; a run that was interrupted goes on."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a script its folder leads sys.path, and this file would pass for the package `evaluate`
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from lethe_compile.errors import InputError
from lethe_compile.tools import _models

INCOMPLETE = 3
"""Exit status after --time-limit: the same command goes on. 1: something failed, and is named; 2: bad arguments."""

_EPILOG = """
A policy is NAME or NAME:KEY=VALUE,... with settings of LetheConfig or of its own, and label=TEXT.
Budgets: 256 (tokens of each layer), total=1536 (of all layers), 0.125 (of the full cache), 64MiB.
Tasks: reasoner, loop, walk (min_tokens=, max_tokens=), gsm8k and math500 (file=PATH.jsonl, max_new_tokens=),
needle (kind=single|multi-key|multi-value|tracking, tokens=, needles=, hops=).
Examples:
  lethe evaluate reasoner --budget 128 --budget 256 --policy full --policy lethe --out runs/reasoner
  lethe evaluate --sweep tools/sweeps/evidence.toml --processes 8 --device cuda --out runs/evidence
Exit status: 0 complete, 1 something failed, 2 bad arguments, 3 the time limit came first (run it again to go on).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check everything, run what is missing, print and write tables and plots."""
    options = parser().parse_args(argv)
    missing = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"lethe evaluate needs {' and '.join(missing)}: pip install 'lethe-compile[evaluate]'")
    from lethe_compile.tools import _evaluate_run

    return _evaluate_run.run(options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lethe evaluate", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=_models.HELP)
    add("--sweep", type=Path, metavar="FILE", help="TOML or JSON with any of these options and more; see tools/sweeps")
    add("--task", action="append", dest="tasks", metavar="TASK", help="repeatable (default reasoner)")
    add("--policy", action="append", dest="policies", metavar="POLICY", help="repeatable (default full and lethe)")
    add("--budget", action="append", dest="budgets", metavar="BUDGET", help="repeatable; each policy gets each of them")
    add("--batch-size", action="append", type=int, dest="batches", metavar="B", help="repeatable (default 16)")
    add("--pack", type=int, metavar="N", help="run policies whose rows are independent N rows at a time, once")
    add("--problems", type=int, metavar="N", help="of each task (default 64)")
    add("--out", type=Path, required=True, metavar="DIR", help="results, summary, tables, plots; resumes what is there")
    add("--processes", type=int, metavar="N", help="workers, each with its own model (default 1)")
    add("--threads", type=int, metavar="N", help="of each worker (default: the machine's cores shared out)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default cuda where there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="(default auto: as stored)")
    add("--tokenizer", metavar="NAME", help="directory or hub id (default MODEL's)")
    add("--seed", type=int, metavar="N", help="of problems, sampling and bootstrap (default 0)")
    add("--temperature", type=float, metavar="T", help="sample at this temperature (default 0: greedy)")
    add("--top-p", type=float, metavar="P", help="sample from this share of the probability (default 1)")
    add("--time-limit", type=float, metavar="SECONDS", help="give up what has not finished by then; exit status 3")
    add("--no-plots", action="store_true", help="tables only")
    return parser


if __name__ == "__main__":
    from lethe_compile.cli import main as lethe

    raise SystemExit(lethe(["evaluate", *sys.argv[1:]]))

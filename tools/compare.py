"""`lethe compare`: does pruning change this model too much? A pruned graph or an artifact beside the unpruned graph."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a script its folder leads sys.path, where `evaluate` would pass for the package
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from lethe_compile.errors import InputError, LetheError
from lethe_compile.tools import _models, _policies

FAILED, COULD_NOT_RUN = 1, 2
_EPILOG = """
A prompts file has one JSON object a line: "prompt" (text), "messages" (a chat) or "ids"; and any of "id", "answer",
"answer_pattern" (a regular expression), "completion", "max_new_tokens", "meta". --task takes tasks of `lethe evaluate`.
Limits stand here or under [tool.lethe.compare] in ./pyproject.toml; flags come first:
  [tool.lethe.compare]
  max_kl = 0.02             # nats a step, mean          max_accuracy_drop = 0.01   # 1 point
  min_top1 = 0.98           # share of steps             min_memory_saving = 0.5    # of the mean KV bytes
  max_ppl_increase = 0.02   # 2%                         min_speedup = 1.2
  tolerance = { kl = 0.1 }  # towards --baseline: absolute for shares, else relative
Examples:
  lethe compare reasoner --problems 8 --max-accuracy-drop 0.02 --min-memory-saving 0.5
  lethe compare MODEL --prompts prompts.jsonl --baseline lethe-baseline.json --junit lethe.xml --html lethe.html
Exit status: 0 all limits hold, 1 one does not or something regressed, 2 the comparison could not be run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a comparison and print it; whatever stops it is exit status 2, never that of a limit."""
    options = parser().parse_args(argv)
    try:
        from lethe_compile.tools import _compare_run

        return _compare_run.run(options)
    except LetheError as error:
        _tell_junit(options.junit, " ".join(str(error).split()))
        raise InputError(str(error)) from error  # a missing package, too, is 2 here
    except Exception as error:
        _tell_junit(options.junit, f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return COULD_NOT_RUN


def _tell_junit(path: Path | None, message: str) -> None:
    if path is not None and path.parent.is_dir():
        from lethe_compile.comparison.junit import write_junit_error

        write_junit_error(path, message)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lethe compare", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=_models.HELP)
    add("--artifact", type=Path, metavar="DIR", help="compare what `lethe export` wrote, in place of the pruned graph")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default cuda where there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="(default auto: as stored)")
    add("--tokenizer", metavar="NAME", help="directory or hub id (default MODEL's)")
    _add_prompts(parser.add_argument_group("prompts"))
    _add_pruning(parser.add_argument_group("pruning, see LetheConfig"))
    limits = parser.add_argument_group("limits")
    for name, help in _LIMITS.items():
        limits.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=help)
    limits.add_argument("--baseline", type=Path, metavar="FILE", help="what became worse since this was recorded fails")
    limits.add_argument("--update-baseline", action="store_true", help="record this comparison in --baseline instead")
    limits.add_argument(
        "--tolerance", action="append", default=[], metavar="METRIC=X", help="towards the baseline; repeatable"
    )
    _add_outputs(parser.add_argument_group("outputs"))
    return parser


_LIMITS = {
    "max_kl": "nats, mean over teacher-forced steps",
    "min_top1": "share of teacher-forced steps with the same best token",
    "max_ppl_increase": "relative: 0.02 is 2%%",
    "max_accuracy_drop": "0.02 is 2 points",
    "min_memory_saving": "share of the mean KV bytes of a sequence",
    "min_speedup": "tokens/s over tokens/s",
}


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompts", type=Path, metavar="FILE.jsonl", help="one JSON object a line, see below")
    add("--task", action="append", dest="tasks", metavar="TASK", help="repeatable; 'reasoner' is that model's default")
    add("--problems", type=int, default=8, metavar="N", help="of each task (default 8)")
    add("--seed", type=int, default=0, metavar="N", help="of the tasks' problems")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="of prompts that do not say (default 256)")
    add("--max-prompt-tokens", type=int, metavar="N", help="refuse longer prompts (default: what the model can take)")
    add("--batch-size", type=int, default=8, metavar="B", help="prompts that run together (default 8)")
    add("--only", choices=("forced", "free"), help="teacher forcing alone, or free-running generation alone")
    add("--repeats", type=int, default=1, metavar="N", help="of generations, for the time alone; the median counts")


def _add_pruning(group: argparse._ArgumentGroup) -> None:
    _policies.add_arguments(group)
    group.add_argument("--max-tokens", type=int, metavar="N", help="hard cap of each layer")
    group.add_argument("--budget", type=_policies.budget, metavar="B", help="of all layers: tokens, a share, or 64MiB")
    group.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of LetheConfig")


def _add_outputs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--json", type=Path, metavar="FILE", help="all figures, prompt by prompt")
    add("--junit", type=Path, metavar="FILE", help="JUnit XML, a test case for each check")
    add("--html", type=Path, metavar="FILE", help="a report in one file, with the prompt that suffers most")
    add("--quiet", action="store_true", help="print the verdict alone")


if __name__ == "__main__":
    from lethe_compile.cli import main as lethe

    raise SystemExit(lethe(["compare", *sys.argv[1:]]))

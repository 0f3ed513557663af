"""The `lethe` command: finds the tool and hands it the rest of the command line.

Each command is one module of `lethe_compile.tools` with `main(argv) -> int | None`; it is imported only when it runs.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import lethe_compile
from lethe_compile.errors import LetheError, MissingPackageError

USAGE_ERROR = 2
MISSING_PACKAGE = 3
INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended


class Command(NamedTuple):
    module: str  # under lethe_compile.tools
    help: str


COMMANDS = {
    "demo": Command("demo", "watch the bundled reasoner generate with a full and with a pruned cache"),
    "inspect": Command("inspect_graph", "show what the compiler finds in a model, rewrites, and refuses"),
    "bench": Command("bench", "measure kernels, decode steps, generations and memory, side by side with others"),
    "export": Command("export", "write a model, pruning included, for ONNX Runtime, TensorRT or torch.export"),
    "run": Command("run", "execute what `lethe export` wrote"),
    "serve": Command("serve", "serve a model over HTTP as OpenAI's API: one process, ranks, or replicas on Ray"),
    "evaluate": Command("evaluate", "compare policies on tasks: accuracy against KV bytes, with intervals"),
    "compare": Command("compare", "check for CI: a pruned graph or an artifact beside the unpruned graph, with limits"),
    "report": Command("report", "write an HTML report of a generation, a sweep, a comparison and a graph"),
    "train-reasoner": Command("train_reasoner", "train the bundled reasoner from scratch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    2 for what the user can correct, 3 for a package that is not installed, 130 after Ctrl-C.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name in ("-V", "--version"):
        print(f"lethe {lethe_compile.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"lethe: error: {_unknown(name)}", file=sys.stderr)
        return USAGE_ERROR
    return _run(name, rest)


def _run(name: str, argv: Sequence[str]) -> int:
    try:
        tool = importlib.import_module(f"lethe_compile.tools.{COMMANDS[name].module}")
        status: int | None = tool.main(argv)
    except LetheError as error:
        print(f"lethe {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISSING_PACKAGE if isinstance(error, MissingPackageError) else USAGE_ERROR
    except KeyboardInterrupt:
        print(f"lethe {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status or 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: lethe COMMAND [ARGUMENTS]\n\n"
        "Compile a decoder LLM into a graph that prunes its KV cache while it generates.\n\n"
        f"commands:\n{commands}\n\n"
        "lethe COMMAND --help says what a command takes; lethe --version prints the version."
    )


def _unknown(name: str) -> str:
    if close := difflib.get_close_matches(name, COMMANDS, n=1):
        return f"no command '{name}'. Did you mean '{close[0]}'?"
    return f"no command '{name}'. Commands: {', '.join(COMMANDS)}."

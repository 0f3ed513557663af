"""`lethe bench`: bandwidths, kernels, decode steps, generations, start-up and memory, side by side with others."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from lethe_compile.distributed import init, started
from lethe_compile.errors import InputError
from lethe_compile.files import read_json
from lethe_compile.tools import (
    _bench_bar,
    _bench_compile,
    _bench_generate,
    _bench_kernels,
    _bench_memory,
    _bench_parallel,
    _bench_serving,
    _bench_steps,
    _bench_tables,
)
from lethe_compile.tools._bench_base import Bench, Options, Row, reason, release
from lethe_compile.tools._bench_sessions import LABELS
from lethe_compile.tools._bench_shapes import SHAPES

SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "kernels": _bench_kernels.run,
    "compile": _bench_compile.run,
    "steps": _bench_steps.run,
    "generate": _bench_generate.run,
    "memory": _bench_memory.run,
    "serving": _bench_serving.run,
    "cpu": _bench_steps.run_cpu,
    "tensor-parallel": _bench_parallel.run,
}
_ALONE = tuple(name for name in SECTIONS if name != "tensor-parallel")  # which needs torchrun
_ON_CPU = ("cpu", "serving", "tensor-parallel")  # the second on the bundled reasoner
FORMAT = 1  # of the JSON


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON as rows come, so that nothing measured is lost."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    namespace = _parser().parse_args(arguments)
    if namespace.compile_child is not None:
        _bench_compile.child(namespace.compile_child, namespace.layers)
        return 0
    options = _options(namespace)
    console, progress = Console(), _progress
    if "tensor-parallel" in options.only and started():
        init(timeout=_bench_parallel.TIMEOUT)  # each rank has a device of its own from here on
        if dist.get_rank() > 0:  # rank 0 tells
            console, options, progress = Console(quiet=True), replace(options, json=None), _silent
    result = _start(options, arguments)
    console.print(_headline(result["machine"]))
    deadline = float("inf") if options.time_limit is None else time.monotonic() + options.time_limit
    for name in options.only:
        device = torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")
        if device.type == "cpu" and name not in _ON_CPU:
            sections = ", ".join(_ON_CPU)
            console.print(f"{name}: needs a CUDA GPU, and torch sees none; only the sections {sections} run without")
            result["sections"].setdefault(name, {"rows": [], "error": "no CUDA GPU"})
            continue
        bench = Bench(options, device, _bandwidth(result, device, console), deadline, progress)
        before = result["sections"].get(name, {"rows": []})

        def enter(outcome: Row, name: str = name, before: Row = before) -> None:
            if name == "steps":
                _keep_other_shapes(outcome, before)
            result["sections"][name] = outcome

        def keep(rows: list[Row], enter: Callable[[Row], None] = enter) -> None:
            enter({"rows": list(rows), "error": "cut short: the run ended within this section"})
            _write(options, result)

        bench.keep = keep
        enter(_section(name, bench, result["machine"]))
        _print_section(console, name, result["sections"][name])
        _write(options, result)
    _finish(result, options, console)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


# ---------------------------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lethe bench", description=__doc__)
    add = parser.add_argument
    add(
        "--only",
        type=_names(SECTIONS),
        metavar="LIST",
        help=f"sections: {','.join(SECTIONS)} (default all but the last, which needs torchrun)",
    )
    add("--shapes", type=_names(SHAPES), metavar="LIST", help="of steps; the other sections take the first")
    add("--batches", type=_numbers, metavar="LIST", help="sequences (default 1,16); sections with one take the largest")
    add("--lengths", type=_numbers, metavar="LIST", help="tokens so far, of steps and cpu (default 1024,8192)")
    add("--contestants", type=_names(LABELS), metavar="LIST", help=f"of steps and cpu: {','.join(LABELS)} (all)")
    add("--page-sizes", type=_numbers, metavar="LIST", help="of kernels (default 64); others take the first")
    add("--max-tokens", type=_positive, default=1024, metavar="N", help="hard cap of Lethe on GPUs (default 1024)")
    add("--repeats", type=_positive, metavar="N", help="of each measurement, interleaved (default 3)")
    add("--steps", type=_positive, metavar="N", help="decode steps timed at a time, at least (default 32)")
    add("--new-tokens", type=_positive, metavar="N", help="of generate (default 24576)")
    add("--concurrency", type=_numbers, default=(), metavar="LIST", help="requests at a time, of serving")
    add("--cell-seconds", type=float, default=40.0, metavar="S", help="of each row of serving (default 40)")
    add("--measured", action="store_true", help="generate unpruned for real too, instead of adding up steps")
    add("--layers", type=_positive, metavar="N", help="override the shapes' layers: to try a command line")
    add("--quick", action="store_true", help="fewer shapes, lengths and repeats, where not given")
    add("--time-limit", type=float, metavar="SECONDS", help="what has not begun by then is listed as not run")
    add("--json", type=Path, metavar="FILE", help="write all figures, as they come")
    add("--update", action="store_true", help="keep the sections, and shapes of steps, that only FILE has")
    add("--compile-child", metavar="SHAPE", help=argparse.SUPPRESS)
    return parser


def _options(namespace: argparse.Namespace) -> Options:
    values = {name: value for name, value in vars(namespace).items() if name != "compile_child"}
    for name, (usual, quick) in _DEFAULTS.items():
        if values[name] is None:
            values[name] = quick if namespace.quick else usual
    if namespace.update and namespace.json is None:
        raise InputError("--update needs --json FILE: the file whose sections are kept")
    return Options(**values)


_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "only": (_ALONE, _ALONE),
    "shapes": (("llama-8b", "qwen2.5-7b", "qwen3-1.7b"), ("llama-8b",)),
    "batches": ((1, 16), (16,)),
    "lengths": ((1024, 8192), (8192,)),
    "contestants": (tuple(LABELS), tuple(LABELS)),
    "page_sizes": ((64,), (64,)),
    "repeats": (3, 1),
    "steps": (32, 16),
    "new_tokens": (24576, 4096),
}


def _names(known: Any) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(",") if part.strip())
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        if not names:
            raise argparse.ArgumentTypeError(f"name at least one of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _positive(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


# ------------------------------------------------------------------------------------------------------------- a run


def _start(options: Options, arguments: Sequence[str]) -> Row:
    result: Row = {
        "format": FORMAT,
        "machine": machine(),
        "command": " ".join(["lethe bench", *arguments]),
        "date": _now(),
        "bandwidth": {},
        "sections": {},
        "bar": [],
    }
    if options.update and options.json is not None and options.json.exists():
        before = read_json(options.json, "a run of lethe bench")
        if before.get("format") != FORMAT:
            raise InputError(f"{options.json} is of another format; write to a new file")
        result["sections"] = before["sections"]
    return result


def _section(name: str, bench: Bench, facts: Row) -> Row:
    start = time.perf_counter()
    try:
        outcome: Row = {"rows": SECTIONS[name](bench)}
    except Exception as error:  # the next section may still work; this one says why it has no rows
        outcome = {"rows": [], "error": reason(error)}
    release()
    shared = {"date": _now(), "gpu": facts["gpu"], "bandwidth": bench.bandwidth}
    return {**outcome, **shared, "seconds": time.perf_counter() - start}


def _keep_other_shapes(outcome: Row, before: Row) -> None:
    """Rows of an earlier run, kept by --update, whose shapes this one did not measure, go first."""
    measured = {row["shape"] for row in outcome["rows"]}
    outcome["rows"] = [row for row in before["rows"] if row["shape"] not in measured] + outcome["rows"]


def _print_section(console: Console, name: str, outcome: Row) -> None:
    if outcome["rows"]:
        console.print(_bench_tables.section(name, outcome["rows"]))
    if "error" in outcome:
        console.print(f"{name}: {outcome['error']}", markup=False)


def _bandwidth(result: Row, device: torch.device, console: Console) -> Row:
    """Measured once a run and device; every roofline and share refers to it."""
    known: Row = result["bandwidth"]
    if device.type not in known:
        known[device.type] = _bench_kernels.bandwidth(device)
        console.print(f"{device.type} {_bench_tables.bandwidths(known[device.type])}")
    measured: Row = known[device.type]
    return measured


def _finish(result: Row, options: Options, console: Console) -> None:
    sections = {name: outcome["rows"] for name, outcome in result["sections"].items()}
    if any(rows for name, rows in sections.items() if name not in _ON_CPU):
        result["bar"] = _bench_bar.bar(sections, options.page_sizes[0])
        console.print(_bench_tables.bar(result["bar"]))
    _write(options, result)


def _write(options: Options, result: Row) -> None:
    if options.json is None:
        return
    part = options.json.with_name(options.json.name + ".part")  # a run that is cut short leaves the last whole file
    part.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    part.replace(options.json)


def machine() -> Row:
    """What the figures depend on: hardware, driver, versions."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "gpu": None if gpu is None else gpu.name,
        "gpu_bytes": None if gpu is None else gpu.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "flashinfer-python", "lethe-compile")},
    }


def _driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0].strip() if file.exists() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _headline(facts: Row) -> str:
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "transformers") if facts[name])
    return f"{where}; {versions}; {_now()}"


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _silent(text: str) -> None:
    """Progress of a rank other than the first."""


def _progress(text: str) -> None:
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())

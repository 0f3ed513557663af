"""Seconds of `optimize` and the first tokens in a fresh process: compiler caches empty, then filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from lethe_compile.errors import InputError
from lethe_compile.tools._bench_base import Bench, Row

_TIMEOUT = 600.0  # seconds of one process
_PROMPT = 16  # tokens


def run(bench: Bench) -> list[Row]:
    """A row each for a cold and a warm start of the first shape."""
    name = bench.options.shapes[0]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lethe-bench-") as caches:
        for start in ("cold", "warm"):
            bench.say(f"compile: {name}, {start}")
            rows.append(bench.row({"shape": name, "start": start}, partial(_child, bench, name, Path(caches))))
    return rows


def _child(bench: Bench, name: str, caches: Path) -> Row:
    """What a process of its own measures, its compilers' caches below `caches`."""
    command = [sys.executable, "-m", "lethe_compile.tools.bench", "--compile-child", name]
    if bench.options.layers is not None:
        command += ["--layers", str(bench.options.layers)]
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    ran = subprocess.run(
        command,
        env={**os.environ, **folders},
        capture_output=True,
        text=True,
        check=False,
        timeout=min(_TIMEOUT, bench.seconds_left),
    )
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"the process exited with status {ran.returncode}: {last}")
    row: Row = json.loads(ran.stdout.strip().splitlines()[-1])
    return row


def child(name: str, layers: int | None) -> None:
    """Print, as JSON, the seconds of each part of a start: the model is there, `optimize`, one token, one step more."""
    from lethe_compile.api import optimize
    from lethe_compile.tools._bench_shapes import load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = load(name, device, layers)
    ids = torch.arange(1, _PROMPT + 1, device=device)[None]
    _wait(device)
    marks = [time.perf_counter()]
    fast = optimize(subject.model)
    _wait(device)
    marks.append(time.perf_counter())
    for new_tokens in (1, 2):  # the first token comes from the prompt, the second from a decode step
        fast.generate(ids, max_new_tokens=new_tokens, do_sample=False)
        _wait(device)
        marks.append(time.perf_counter())
    optimized, first, second = (end - start for start, end in pairwise(marks))
    row = {
        "layers": subject.layers,
        "optimize_s": optimized,
        "first_token_s": first,
        "second_token_s": second,
        "ready_s": optimized + first,
        "all_compiled_s": optimized + first + second,
    }
    print(json.dumps(row))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

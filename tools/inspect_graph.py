"""`lethe inspect`: what the compiler finds in a model, rewrites, and refuses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lethe_compile.capture import capture
from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.executor import choose_backend, waits_for_host
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import run_pipeline
from lethe_compile.passes.program import Program
from lethe_compile.report import Report
from lethe_compile.tools import _models


def main(argv: Sequence[str] | None = None) -> int:
    """Capture a model, run the passes, print the report; or check architectures."""
    options = _arguments(argv)
    if options.matrix:
        from lethe_compile.tools import _matrix

        return _matrix.run(options.model, options.json, options.markdown, options.device)
    if len(options.model) != 1:
        raise InputError(f"name one model, not {len(options.model)}, or all architectures with --matrix")
    config = LetheConfig()
    rule = (config.decay, config.score == "peak")
    names = [step.name for step in pipeline(*rule, fuse=True, own_cache=True)]
    if options.print_after is not None and options.print_after not in names:
        raise InputError(f"no pass is called {options.print_after!r}; there are {', '.join(names)}")

    def observe(name: str, program: Program) -> None:
        if name == options.print_after:
            print(program.graph)

    captured = capture(_models.load_model(options.model[0]))
    own_cache = captured.program.step is not None
    passes = pipeline(*rule, fuse=captured.program.device.type == "cuda", own_cache=own_cache)
    if options.print_after is not None and options.print_after not in [step.name for step in passes]:
        raise InputError(
            f"{options.print_after!r} does not run on this model: locate-cache is for steps that carry a cache,"
            " fuse-projections for models on a GPU"
        )
    result = run_pipeline(captured.program, passes, observe)
    site = result.program.sites[0]
    device = result.program.input_ids.meta["val"].device
    stateful = result.program.stateful
    waits = waits_for_host(result.program.graph)
    backend = choose_backend("auto", device, stateful=bool(stateful), content=result.program.content, waits=waits)
    where = (site.node.meta["val"].dtype, device, backend, config.page_size_on(device.type))
    report = Report.of(result.records, result.program.sites, stateful, config, *where)
    Console().print(report)
    if options.json is not None:
        options.json.write_text(report.to_json() + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lethe inspect", description=__doc__)
    parser.add_argument("model", nargs="*", metavar="MODEL", help=_models.HELP)
    parser.add_argument(
        "--matrix", action="store_true", help="check tiny models of the architectures named, or of all, in transformers"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the matrix runs (default cpu)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the matrix as Markdown")
    parser.add_argument("--print-after", metavar="PASS", help="print the graph as it is after this pass")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

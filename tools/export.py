"""`lethe export`: a model, pruning included, as a directory that runs where Python or PyTorch are not."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lethe_compile.api import optimize
from lethe_compile.artifact.manifest import Manifest, total_bytes
from lethe_compile.artifact.tokens import TOKENIZER
from lethe_compile.config import LetheConfig, parse_bytes
from lethe_compile.exporters import FORMATS, export
from lethe_compile.exporters.tensorrt_build import EngineOptions
from lethe_compile.tools import _models, _policies

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> int:
    """Optimize a model and export it; the exit status is 3 where a package that the format needs is not installed."""
    options = _arguments(argv)
    config = _config(options)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {text}", file=sys.stderr)

    say(f"loading {options.model}")
    model = _models.load_model(options.model)
    if options.dtype is not None:
        model = model.to(_DTYPES[options.dtype])
    if options.device is not None:
        model = model.to(options.device)
    say("optimizing")
    fast = optimize(model, config)
    tokenizer = options.tokenizer or _tokenizer_of(options.model)
    manifest = export(
        fast,
        options.out,
        options.format,
        tokenizer=tokenizer,
        overwrite=options.overwrite,
        progress=say,
        engine=_engine(options),
        max_batch=options.max_batch,
    )
    _tell(manifest, options.out, time.perf_counter() - start, options.json)
    return 0


def _tell(manifest: Manifest, out: Path, seconds: float, file: Path | None) -> None:
    for name, facts in sorted(manifest.files.items()):
        print(f"{facts['bytes']:>15,}  {out / name}")
    print(f"{total_bytes(manifest):>15,}  bytes in {seconds:.1f} s; run it with: lethe run {out} --ids 1,2,3")
    if file is not None:
        result = {"directory": str(out), "seconds": seconds, "manifest": json.loads(manifest.to_json())}
        file.write_text(json.dumps(result, indent=2) + "\n")


def _tokenizer_of(name: str) -> Any:
    """The files of the tokenizer that belongs to MODEL, where it is a directory or bundled; else None."""
    if name == _models.REASONER:
        from lethe_compile.models import reasoner

        return reasoner.path()
    if Path(name).is_dir():
        return Path(name) if (Path(name) / TOKENIZER).is_file() else None
    if ":" in name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        print(f"no tokenizer joins the artifact: {first}; name one with --tokenizer", file=sys.stderr)
        return None


def _engine(options: argparse.Namespace) -> EngineOptions | None:
    """What was said of TensorRT's engines; None if nothing was."""
    given = {name: getattr(options, name) for name in ("rows", "tokens", "capacity", "timing_cache", "workspace")}
    given = {name: value for name, value in given.items() if value is not None}
    return EngineOptions(**given) if given else None


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _memory(text: str) -> int:
    size = parse_bytes(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 2GiB")
    return size


def _config(options: argparse.Namespace) -> LetheConfig:
    given = _policies.options_of(options.set, "--set")
    return LetheConfig.from_dict({**_policies.read_config(options.config), **given})


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lethe export", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=_models.HELP)
    parser.add_argument("--format", required=True, choices=FORMATS, help="what runs it")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the artifact that is there")
    parser.add_argument("--dtype", choices=_DTYPES, help="convert the model first")
    parser.add_argument("--device", help="move the model there first: pt2 and aoti run where they were made")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=f"holds {TOKENIZER}; default: the model's own")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings of LetheConfig as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting of LetheConfig")
    parser.add_argument("--max-batch", type=int, metavar="N", help="most sequences at once, of aoti on a GPU (64)")
    engine = parser.add_argument_group("TensorRT's engines: smallest, best and largest sizes")
    engine.add_argument("--rows", type=_sizes, metavar="1,8,16", help="sequences")
    engine.add_argument("--tokens", type=_sizes, metavar="1,256,1024", help="of a part of a prompt")
    engine.add_argument("--capacity", type=_sizes, metavar="32,1024,8192", help="tokens that a cache holds")
    engine.add_argument("--timing-cache", type=Path, metavar="FILE", help="makes the next build take less time")
    engine.add_argument("--workspace", type=_memory, metavar="SIZE", help="memory that a layer may take, such as 2GiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the manifest and the time it took as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""`lethe run`: execute an artifact that `lethe export` wrote; for ONNX, ONNX Runtime and NumPy are all it takes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lethe_compile.artifact import Generation, generate, load_manifest, open_artifact
from lethe_compile.artifact.sampling import Sampler
from lethe_compile.artifact.tokens import TOKENIZER, Tokenizer
from lethe_compile.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Load an artifact, continue the prompts, print them."""
    options = _arguments(argv)
    sampler = Sampler(options.temperature, options.top_k, options.top_p, options.seed)
    manifest = load_manifest(options.directory, verify=False)
    tokenizer = Tokenizer(manifest) if options.prompt or TOKENIZER in manifest.tokenizer else None
    prompts = [_ids(text) for text in options.ids]
    prompts += [tokenizer.encode(text) for text in options.prompt] if tokenizer is not None else []
    if not prompts:
        raise InputError("there is nothing to continue: give --prompt TEXT or --ids 1,2,3")
    start = time.perf_counter()
    runner = open_artifact(options.directory)
    loaded = time.perf_counter()
    result = generate(runner, prompts, max_new_tokens=options.max_new_tokens, sampler=sampler)
    done = time.perf_counter()
    for row in result.ids:
        print(tokenizer.decode(row) if tokenizer is not None else ",".join(map(str, row)))
    _tell(result, loaded - start, done - loaded)
    if options.json is not None:
        options.json.write_text(json.dumps(_json(result, loaded - start, done - loaded)) + "\n")
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--ids {text!r} is not a list of token ids such as 1,2,3") from error


def _tell(result: Generation, loading: float, seconds: float) -> None:
    count = sum(map(len, result.new_ids))
    retained = ", ".join(f"{tokens:.0f}" for tokens in result.retained_per_layer)
    print(
        f"{count} tokens in {seconds:.2f} s ({count / seconds:.0f} tokens/s), loaded in {loading:.2f} s;"
        f" {result.rounds} rounds, tokens retained per layer: {retained}",
        file=sys.stderr,
    )


def _json(result: Generation, loading: float, seconds: float) -> dict[str, object]:
    return {
        "ids": result.ids,
        "new_ids": result.new_ids,
        "retained_per_layer": result.retained_per_layer,
        "retained": result.retained,
        "rounds": result.rounds,
        "seconds": {"load": loading, "generate": seconds},
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lethe run", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="what `lethe export` wrote")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument("--ids", action="append", default=[], metavar="1,2,3", help="token ids to continue; repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="of each prompt (default 20)")
    sampling = parser.add_argument_group("sampling; greedy unless one of these is given")
    sampling.add_argument("--temperature", type=float, help="divides the logits")
    sampling.add_argument("--top-k", type=int, help="draw from the k most probable tokens")
    sampling.add_argument("--top-p", type=float, help="draw from the fewest tokens of at least this probability")
    sampling.add_argument("--seed", type=int, help="equal seeds draw equal tokens")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write ids (prompt and new), and tokens retained per layer, as JSON"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

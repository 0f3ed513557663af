"""`lethe report`: an HTML file that shows what pruning did, from recordings, sweeps, comparisons, or a model itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.files import read_json
from lethe_compile.tools import _models, _policies

_REASONER_TOKENS = (2000, 2600)  # of the reference trace of the problem that the reasoner gets


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, after generating with a model if one is named."""
    options = _arguments(argv)
    parts: dict[str, Any] = {
        "comparison": _json(options.comparison, "a comparison of lethe compare --json", ("metrics", "prompts")),
        "graph": _json(options.graph, "an inspection of lethe inspect --json", ("passes", "captured")),
        "recording": options.recording,
        "sweep": options.sweep,
    }
    if options.model is not None:
        recording, graph = _generate(options)
        parts |= {"recording": recording, "graph": graph}
    from lethe_compile.viewer import write_report

    path = write_report(options.out, **parts)
    Console().print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lethe report", description=__doc__)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=f"generate with it, and show that and its graph; {_models.HELP}")
    add("--out", type=Path, metavar="FILE", default=Path("report.html"), help="default report.html")
    files = parser.add_argument_group("what others wrote")
    files.add_argument("--recording", type=Path, metavar="FILE", help="a recording, see --save-recording")
    files.add_argument("--sweep", type=Path, metavar="FILE", help="summary.json of lethe evaluate")
    files.add_argument("--comparison", type=Path, metavar="FILE", help="JSON of lethe compare")
    files.add_argument("--graph", type=Path, metavar="FILE", help="JSON of lethe inspect")
    made = parser.add_argument_group("with MODEL")
    made.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="may be given several times; without one, the reasoner gets a fresh problem of each family",
    )  # fmt: skip
    made.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default 2,048; 2,700 for the reasoner's problems"
    )
    made.add_argument("--seed", type=int, default=0, help="of the reasoner's problems")
    made.add_argument("--device", default="cpu", help="where to generate (default cpu)")
    made.add_argument("--max-tokens", type=int, metavar="N", help="cap of each layer")
    made.add_argument("--budget", type=_policies.budget, metavar="B", help="tokens, a share, or bytes, of a sequence")
    made.add_argument("--save-recording", type=Path, metavar="FILE", help="also write the recording as JSON")
    _policies.add_arguments(made)
    options = parser.parse_args(argv)
    given = [name for name in ("recording", "sweep", "comparison", "graph") if getattr(options, name) is not None]
    if options.model is None and not given:
        raise InputError("nothing to report: name a MODEL, or give --recording, --sweep, --comparison or --graph")
    if options.model is not None and (both := {"recording", "graph"} & {*given}):
        raise InputError(f"MODEL makes its own: leave out --{', --'.join(sorted(both))}, or MODEL")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens}: at least 1")
    return options


def _json(path: Path | None, what: str, keys: Sequence[str]) -> Any:
    """The JSON object in a file.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    if path is None:
        return None
    read = read_json(path, what)
    if not isinstance(read, dict) or (missing := [key for key in keys if key not in read]):
        lacks = f"it lacks {', '.join(missing)}" if isinstance(read, dict) else f"it is a {type(read).__name__}"
        raise InputError(f"{path} is not {what}: {lacks}")
    return read


def _generate(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recording, and the inspection of the model that made it."""
    from lethe_compile.api import optimize
    from lethe_compile.prompt import left_padded
    from lethe_compile.recording import cut, make_recording, words_of, write_recording

    config = LetheConfig(
        policy=options.policy, policy_options=_policies.options_of(options.policy_option),
        max_tokens=options.max_tokens, budget=options.budget,
    )  # fmt: skip
    tokenizer = _models.load_tokenizer(options.model)
    prompts, most, ends = _prompts(options, tokenizer)
    model = _models.load_model(options.model).to(options.device)
    fast = optimize(model, config)
    ids, mask = left_padded(prompts)
    with fast.recorded(tokens=True) as recorder:
        out = fast.generate(
            ids.to(fast.device),
            attention_mask=mask.to(fast.device),
            max_new_tokens=most,
            do_sample=False,
            progress=True,
        )
    written = cut(out[:, ids.shape[1] :].cpu(), ends)
    recording = make_recording(fast, recorder, prompts, written, words_of(tokenizer), model=options.model)
    if options.save_recording is not None:
        write_recording(recording, options.save_recording)
    return recording, fast.inspection(options.model).to_dict()


def _prompts(options: argparse.Namespace, tokenizer: Any) -> tuple[list[list[int]], int, list[int]]:
    """Token ids of each prompt, the most new tokens, and the ids that end a text."""
    if options.prompt is None and options.model == _models.REASONER:
        from lethe_compile.models import reasoner

        shortest, longest = _REASONER_TOKENS
        lengths = {"seed": options.seed, "min_tokens": shortest, "max_tokens": longest}
        found = [reasoner.problems(1, family=family, **lengths).prompt(0) for family in reasoner.FAMILIES]
        return found, options.max_new_tokens or longest + 100, [tokenizer.eos_token_id]
    if options.prompt is None:
        raise InputError(f"{options.model} needs a --prompt")
    if tokenizer is None:
        raise InputError(f"{options.model} has no tokenizer to read --prompt with: name a directory or a hub id")
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = [list(tokenizer(text).input_ids) if text.strip() else [] for text in options.prompt]
    if empty := [str(index) for index, prompt in enumerate(prompts) if not prompt]:
        raise InputError(f"prompt {', '.join(empty)} has no tokens")
    return prompts, options.max_new_tokens or 2048, ends


if __name__ == "__main__":
    raise SystemExit(main())

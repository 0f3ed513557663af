"""A recording: one generation as plain data, for the HTML report and for others to read.

A `Recorder` listens; `make_recording` joins what it heard with the text. In JSON, N sequences of H heads each (rows
``sequence * H + head``; H is 1 unless KV heads keep tokens of their own), L layers with a cache, and S rounds::

    format        "lethe-recording/1"
    model         its name
    config        `LetheConfig.to_dict()`
    layers        [L] {layer, name, token_bytes, heads}: bytes of a token in all of its 1 .. H heads
    heads         H
    sequences     [N] {prompt, tokens}: tokens of the prompt, and the text of each token
    rounds        [S] {step, active [N], seen [N], before, after, sparsity, threshold: [L][N * H], null where unknown}
    segments      [1 or more] {step, evicted [L][N * H][tokens]}: from this step on, the decode steps before the round
                  that dropped the token, -1 for one that stayed. Only a cache filled anew begins another segment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lethe_compile.errors import InputError
from lethe_compile.files import read_json
from lethe_compile.policies.base import NEVER
from lethe_compile.recorder import Recorder, Sample

if TYPE_CHECKING:
    from lethe_compile.runtime import OptimizedModel

FORMAT = "lethe-recording/1"
_KEYS = ("config", "layers", "heads", "sequences", "rounds", "segments")
_PARTS = {
    "layers": ("layer", "name", "token_bytes", "heads"),
    "sequences": ("prompt", "tokens"),
    "rounds": ("step", "active", "seen", "before", "after", "sparsity", "threshold"),
    "segments": ("step", "evicted"),
}


def make_recording(
    fast: OptimizedModel,
    recorder: Recorder,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    words: Callable[[Sequence[int]], Sequence[str]],
    *,
    model: str = "",
) -> dict[str, Any]:
    """What `recorder` heard of the latest generation of `fast`; it must have been told to keep `tokens`.

    Args:
        prompts, generated: token ids of each sequence, without padding; those generated, up to and with the last.
        words: the text of each of a list of token ids.
        model: a name to show.

    Raises:
        InputError: nothing was recorded, tokens were not, or there are more sequences than the generation had.
    """
    if not recorder.tokens or not recorder.samples:
        raise InputError("there is nothing to show: generate inside `with fast.recorded(tokens=True) as recorder:`")
    rows = len(prompts) * recorder.sets.heads
    if rows > len(recorder.samples[0].active) or len(generated) != len(prompts):
        raise InputError(f"{len(prompts)} prompts and {len(generated)} texts, of a generation of other sequences")
    texts = [[*prompt, *new] for prompt, new in zip(prompts, generated, strict=True)]
    token_bytes = recorder.token_bytes[:, 0] * recorder.sets.of_layer
    return {
        "format": FORMAT,
        "model": model,
        "config": fast.config.to_dict(),
        "layers": [
            {"layer": site.layer, "name": site.name, "token_bytes": int(size), "heads": int(heads)}
            for site, size, heads in zip(fast.caches, token_bytes, recorder.sets.of_layer, strict=True)
        ],
        "heads": recorder.sets.heads,
        "sequences": [
            {"prompt": len(prompt), "tokens": list(words(text))} for prompt, text in zip(prompts, texts, strict=True)
        ],
        "rounds": [_round(sample, rows, recorder.sets.heads) for sample in recorder.samples],
        "segments": _segments(recorder, texts, len(fast.caches)),
    }


def _round(sample: Sample, rows: int, heads: int) -> dict[str, Any]:
    known = None if sample.threshold is None else np.where(sample.threshold < NEVER, sample.threshold, -1)[:, :rows]
    sparsity = None if sample.sparsity is None else np.round(sample.sparsity[:, :rows], 4)
    return {
        "step": sample.step,
        "active": sample.active[:rows:heads].tolist(),
        "seen": None if sample.seen is None else sample.seen[:rows:heads].tolist(),
        "before": sample.before[:, :rows].tolist(),
        "after": sample.after[:, :rows].tolist(),
        "sparsity": _nulls(sparsity, np.isnan),
        "threshold": _nulls(known, lambda values: values < 0),
    }


def _nulls(values: NDArray[Any] | None, unknown: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> Any:
    """[L][rows] of values, null where `unknown`."""
    if values is None:
        return None
    shown = values.astype(object)
    shown[unknown(values)] = None
    return shown.tolist()


def _segments(recorder: Recorder, texts: Sequence[Sequence[int]], layers: int) -> list[dict[str, Any]]:
    heads, longest = recorder.sets.heads, max(map(len, texts))
    starts, rows = [0, *recorder.refills], len(texts) * heads
    segments = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        evicted = np.full((layers, rows, longest), -1, np.int64)
        for one in recorder.evictions:
            # A round at the very step of a refill comes after it.
            if one.step >= start and (end is None or one.step < end):
                mine = (one.row < rows) & (one.position < longest)
                evicted[one.layer[mine], one.row[mine], one.position[mine]] = one.step
        shown = [[of[row, : len(texts[row // heads])].tolist() for row in range(rows)] for of in evicted]
        segments.append({"step": start, "evicted": shown})
    return segments


def words_of(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """The `words` of a transformers tokenizer; bare ids where there is none.

    A token's text is what it adds behind the token before it: by itself, some tokenizers drop the space in front.
    """
    if tokenizer is None:
        return lambda ids: [f"{i} " for i in ids]

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def words(ids: Sequence[int]) -> list[str]:
        alone = [decode([i]) for i in ids]
        pairs = [decode(ids[i - 1 : i + 1]) for i in range(1, len(ids))]
        added = [
            pair.removeprefix(before) if pair.startswith(before) else own
            for before, pair, own in zip(alone, pairs, alone[1:], strict=False)
        ]
        return alone[:1] + added

    return words


def cut(rows: torch.Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Generated ids ``[R, T]`` up to and with each row's first token of `ends`."""
    written = []
    for row in rows.tolist():
        last = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        written.append(row[: last + 1])
    return written


def write_recording(recording: Mapping[str, Any], path: Path) -> None:
    """Write a recording as JSON."""
    path.write_text(json.dumps(recording, separators=(",", ":"), allow_nan=False) + "\n")


def read_recording(path: Path) -> dict[str, Any]:
    """Read what `write_recording` wrote.

    Raises:
        InputError: the file cannot be read, or is no recording; says what is wrong.
    """
    recording = read_json(path, "a recording")
    check_recording(recording, str(path))
    return dict(recording)


def check_recording(recording: Any, name: str = "recording") -> None:
    """Refuse what is no recording of this format.

    Raises:
        InputError: `name` and what is wrong with it.
    """
    if not isinstance(recording, dict) or recording.get("format") != FORMAT:
        found = recording.get("format") if isinstance(recording, dict) else type(recording).__name__
        raise InputError(f"{name} is no recording: its format is {found!r}, not {FORMAT!r}")
    if missing := [key for key in _KEYS if key not in recording]:
        raise InputError(f"{name} is incomplete: it lacks {', '.join(missing)}")
    lacking = {
        f"{key}[{index}].{part}"
        for key, names in _PARTS.items()
        for index, one in enumerate(recording[key])
        for part in names
        if part not in one
    }
    if lacking:
        raise InputError(f"{name} is incomplete: it lacks {', '.join(sorted(lacking)[:5])}")
    layers, rows = len(recording["layers"]), len(recording["sequences"]) * recording["heads"]
    for index, one in enumerate(recording["rounds"]):
        if len(one["after"]) != layers or any(len(of) != rows for of in one["after"]):
            raise InputError(f"{name}: round {index} is not of {layers} layers and {rows} rows")

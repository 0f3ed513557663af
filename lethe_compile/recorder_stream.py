"""A recorder that writes rounds to a file as they come, and holds none: memory stays the same however long a run is.

A file of JSON lines. The first says what the rest is about, and each generation begins with its prompts::

    {"format": "lethe-stream/1", "token_bytes": [L], "page_size", "sets": [L], "sparsity", "tokens"}
    {"begin": [R]}                                         prompt tokens of each row
    {"round": {step, active [R], seen [R], before, after, sparsity, threshold: [L][R], null where unknown}}
    {"evicted": {step, layer [E], row [E], position [E]}}  with `tokens`
    {"refill": step}                                       the cache was filled anew, with all tokens

`load_recorder` reads the last generation back, also of a file that a kill cut short.
"""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from lethe_compile.errors import InputError
from lethe_compile.files import read_text
from lethe_compile.keep_sets import KeepSets
from lethe_compile.ledger import Counts
from lethe_compile.recorder import Eviction, Floats, Recorder, Sample

FORMAT = "lethe-stream/1"


class StreamRecorder(Recorder):
    """Writes what a `Recorder` keeps to `path`, and flushes after every round; `usage` is as there.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(
        self, path: Path, token_bytes: Counts, page_size: int, sets: KeepSets, sparsity: bool, tokens: bool
    ) -> None:
        super().__init__(token_bytes, page_size, sets, sparsity, tokens)
        self.path = path
        try:
            self._file: TextIO = path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"the recording {path} cannot be written: {error.strerror}") from error
        self._put(
            {
                "format": FORMAT,
                "token_bytes": token_bytes[:, 0].tolist(),
                "page_size": page_size,
                "sets": sets.of_layer.tolist(),
                "sparsity": sparsity,
                "tokens": tokens,
            }
        )

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()

    def _put(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def _forget(self, prompts: Counts) -> None:
        self._put({"begin": prompts.tolist()})

    def round(self, sample: Sample) -> None:
        values = {name: getattr(sample, name) for name in ("active", "seen", "before", "after", "threshold")}
        plain = {name: None if value is None else value.tolist() for name, value in values.items()}
        self._put({"round": {"step": sample.step, **plain, "sparsity": _nulls(sample.sparsity)}})
        self._file.flush()

    def dropped(self, eviction: Eviction) -> None:
        names = ("layer", "row", "position")
        self._put({"evicted": {"step": eviction.step, **{n: getattr(eviction, n).tolist() for n in names}}})

    def refilled(self, step: int) -> None:
        self._put({"refill": step})

    def by_layer(self) -> tuple[list[int], Floats, Floats]:
        self._file.flush()
        return load_recorder(self.path).by_layer()


def _nulls(values: NDArray[Any] | None) -> Any:
    """[L][R], null for what was not measured: JSON has no NaN."""
    if values is None:
        return None
    return [[None if isnan(value) else round(value, 6) for value in row] for row in values.tolist()]


def load_recorder(path: str | Path) -> Recorder:
    """The rounds of the last generation in a file, as a `Recorder` would have kept them; `usage` is not known.

    Raises:
        InputError: the file cannot be read, is no recording, or a line is broken: names it. A last line that was cut
            short is left out.
    """
    text = read_text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    recorder = None
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            recorder = _header(values) if recorder is None else recorder
            _take(recorder, values)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a recording of format {FORMAT!r} ({error})") from error
    if recorder is None:
        raise InputError(f"{path} is empty: no recording of format {FORMAT!r}")
    return recorder


def _header(values: dict[str, Any]) -> Recorder:
    if values["format"] != FORMAT:
        raise ValueError(f"its format is {values['format']!r}")
    token_bytes = np.array(values["token_bytes"], np.int64)[:, None]
    sets = KeepSets(values["sets"])
    return Recorder(token_bytes, values["page_size"], sets, values["sparsity"], values["tokens"])


def _take(recorder: Recorder, line: dict[str, Any]) -> None:
    if "begin" in line:
        recorder.samples, recorder.evictions, recorder.refills = [], [], []
    elif "round" in line:
        recorder.round(_sample(line["round"]))
    elif "evicted" in line:
        one = line["evicted"]
        arrays = (np.array(one[name], np.int32) for name in ("layer", "row", "position"))
        recorder.dropped(Eviction(one["step"], *arrays))
    elif "refill" in line:
        recorder.refilled(line["refill"])
    elif "format" not in line:
        raise ValueError(f"unknown line {next(iter(line), '')!r}")


def _sample(one: dict[str, Any]) -> Sample:
    before, after = (np.array(one[name], np.int64) for name in ("before", "after"))
    seen, threshold = (None if one[name] is None else np.array(one[name], np.int64) for name in ("seen", "threshold"))
    sparsity = None if one["sparsity"] is None else np.array(one["sparsity"], np.float64)
    return Sample(one["step"], np.array(one["active"], np.bool_), before, after, sparsity, seen, threshold)

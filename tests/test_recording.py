"""A recording says which tokens each layer kept after each round, as the cache itself has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lethe_compile as lethe
from lethe_compile.errors import InputError
from lethe_compile.models.tiny import tiny
from lethe_compile.recording import cut, make_recording, read_recording, words_of, write_recording
from lethe_compile.rounds import Rounds
from lethe_compile.runtime import OptimizedModel

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6]]
CONFIG = lethe.LetheConfig(max_tokens=20, prune_interval=5, page_size=4, protect_prompt=False, decay=0.9)


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return lethe.optimize(tiny("llama"), CONFIG, verified=False)


class Spy:
    """Reads the positions that the cache holds, after every round."""

    def __init__(self) -> None:
        self.held = list[np.ndarray]()

    def __enter__(self) -> Spy:
        self._run = run = Rounds.run

        def spied(rounds: Rounds, active: torch.Tensor) -> None:
            run(rounds, active)
            self.held.append(rounds._cache.scores()[1].numpy().copy())  # [L, R, N]

        Rounds.run = spied  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Rounds.run = self._run  # type: ignore[method-assign]


def record(fast: OptimizedModel, new: int = 40) -> tuple[dict[str, Any], list[np.ndarray]]:
    ids = torch.tensor([PROMPTS[0], [0, 0, 0, *PROMPTS[1]]])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with fast.recorded(tokens=True) as recorder, Spy() as spy:
        out = fast.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    generated = out[:, ids.shape[1] :].tolist()
    return make_recording(fast, recorder, PROMPTS, generated, words_of(None), model="tiny"), spy.held


@pytest.mark.parametrize("policy", ["lethe", "h2o"])
def test_kept_tokens_are_those_of_the_cache(policy: str, fast: OptimizedModel) -> None:
    if policy != "lethe":  # which keeps other tokens for each KV head
        fast = lethe.optimize(tiny("llama"), replace(CONFIG, policy=policy), verified=False)
    recording, held = record(fast)
    (segment,) = recording["segments"]
    heads = recording["heads"]
    assert heads == (2 if policy == "h2o" else 1) and len(recording["rounds"]) == len(held)
    assert any(max(map(max, of)) >= 0 for of in segment["evicted"]), "something was evicted"
    for one, positions in zip(recording["rounds"], held, strict=True):
        for layer, of in enumerate(segment["evicted"]):
            for row, evicted in enumerate(of):
                seen = one["seen"][row // heads]
                kept = [p for p in range(seen) if evicted[p] == -1 or evicted[p] > one["step"]]
                assert kept == [p for p in positions[layer, row].tolist() if p >= 0]
                assert one["after"][layer][row] == len(kept)


def test_a_file_holds_all_of_it(fast: OptimizedModel, tmp_path: Path) -> None:
    recording, _ = record(fast)
    write_recording(recording, tmp_path / "one.json")
    assert read_recording(tmp_path / "one.json") == recording
    assert [len(one["tokens"]) for one in recording["sequences"]] == [47, 44]
    assert recording["sequences"][0]["tokens"][:2] == ["5 ", "6 "] and recording["sequences"][1]["prompt"] == 4


def test_a_cache_filled_anew_begins_a_segment(fast: OptimizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "restart_at", 30)
    recording, held = record(fast)
    assert [segment["step"] for segment in recording["segments"]] == [0, 24], "of 7 tokens and 24 steps"
    (index,) = [i for i, one in enumerate(recording["rounds"]) if one["step"] == 24]
    segment = recording["segments"][1]["evicted"][0][0]
    seen = recording["rounds"][index]["seen"][0]
    kept = [p for p in range(seen) if segment[p] == -1 or segment[p] > 24]
    assert kept == [p for p in held[index][0, 0].tolist() if p >= 0]


def test_nothing_recorded_is_refused(fast: OptimizedModel) -> None:
    with fast.recorded() as recorder:
        out = fast.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=8)
    with pytest.raises(InputError, match="tokens=True"):
        make_recording(fast, recorder, PROMPTS[:1], out[:, 7:].tolist(), words_of(None))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "its format is 'list'"),
        (json.dumps({"format": "lethe-recording/9"}), "its format is 'lethe-recording/9'"),
        (json.dumps({"format": "lethe-recording/1", "layers": []}), "lacks config, heads"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        read_recording(path)
    assert str(path) in str(refused.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_recording(tmp_path / "none.json")


def test_words_are_what_a_token_adds() -> None:
    class Words:
        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(["zero", "one", "two"][i] for i in ids)

    assert words_of(Words())([2, 0, 1]) == ["two", " zero", " one"]
    assert cut(torch.tensor([[4, 2, 9], [4, 4, 4]]), [2]) == [[4, 2], [4, 4, 4]]

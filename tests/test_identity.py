"""With pruning off, the optimized model is the model: tokens of `generate` exactly, logits to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.models.plain_decoder import PlainDecoder, plain
from lethe_compile.models.tiny import CONFIGS, tiny

LENGTHS = (1, 2, 6, 7, 8, 15, 40)  # the sliding windows are 7 tokens long


class Pair:
    """A model and what `optimize` made of it."""

    def __init__(self, name: str) -> None:
        self.model: Any = plain() if name == "plain" else tiny(name)
        self.fast = lethe.optimize(self.model, lethe.LetheConfig(policy="full", page_size=4))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        out = self.model(ids)
        logits: Tensor = out if isinstance(self.model, PlainDecoder) else out.logits
        return logits

    def generate(self, ids: Tensor, mask: Tensor, new: int, eos: int | None) -> Tensor:
        """The tokens that the original generates greedily."""
        if not isinstance(self.model, PlainDecoder):
            options = {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": eos, "pad_token_id": 0}
            out: Tensor = self.model.generate(ids, do_sample=False, **options)
            return out
        rows = [self._greedy(row[real.bool()], new, eos) for row, real in zip(ids, mask, strict=True)]
        longest = max(map(len, rows))
        return torch.cat([ids, torch.tensor([row + [0] * (longest - len(row)) for row in rows])], dim=1)

    def _greedy(self, prompt: Tensor, new: int, eos: int | None) -> list[int]:
        tokens = prompt.tolist()
        while len(tokens) < len(prompt) + new and (len(tokens) == len(prompt) or tokens[-1] != eos):
            tokens.append(int(self.logits(torch.tensor([tokens]))[0, -1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=[*CONFIGS, "plain"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def ragged(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Prompts of unequal length, padded on the left."""
    ids, mask = torch.randint(3, 97, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : row * tokens // rows] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("rows", [1, 3])
def test_generated_tokens_are_the_same(pair: Pair, rows: int) -> None:
    ids, mask = ragged(rows, 14)
    out = pair.fast.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert out.tolist() == pair.generate(ids, mask, 20, None).tolist()


def test_generation_stops_at_the_same_tokens(pair: Pair) -> None:
    ids, mask = ragged(3, 11)
    free = pair.generate(ids, mask, 12, None)[:, 11:]
    eos = int(free[1, 3])  # one row ends at its fourth token at the latest, the others where they happen to
    expected = pair.generate(ids, mask, 12, eos)
    out = pair.fast.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    assert out.tolist() == expected.tolist()
    assert (expected[1, 11:] == eos).any()


def test_logits_of_whole_sequences_are_the_same(pair: Pair) -> None:
    for length in LENGTHS:
        ids = torch.randint(97, (2, length))
        torch.testing.assert_close(pair.fast(ids), pair.logits(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(pair: Pair, side: str) -> None:
    for length in LENGTHS[1:]:
        ids, mask = ragged(3, length)
        ids = torch.randint(97, ids.shape)  # padding may be any token
        mask = mask if side == "left" else mask.flip(1)
        logits = pair.fast(ids, attention_mask=mask)
        for row, real in enumerate(mask.bool()):
            alone = pair.logits(ids[row, real][None])[0]
            torch.testing.assert_close(logits[row, real], alone, rtol=1e-4, atol=1e-4)


def test_given_positions_are_used(pair: Pair) -> None:
    ids = torch.randint(97, (2, 9))
    counted = torch.arange(9).expand(2, 9)
    torch.testing.assert_close(pair.fast(ids, position_ids=counted), pair.fast(ids), rtol=0, atol=0)
    if not isinstance(pair.model, PlainDecoder):
        shifted = counted + torch.tensor([[5], [11]])
        with torch.no_grad():
            expected = pair.model(ids, position_ids=shifted, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(pair.fast(ids, position_ids=shifted), expected, rtol=1e-4, atol=1e-4)


def test_decoding_step_by_step_is_the_whole_sequence(pair: Pair) -> None:
    ids = torch.randint(97, (3, 40))
    expected, prompts = pair.logits(ids), torch.tensor([1, 6, 8])  # before, at and after the end of the window
    pair.fast.begin(3, prompts)
    try:
        logits = pair.fast.prefill(ids[:, :8], prompts)
        for column in range(32):
            last = prompts + column
            torch.testing.assert_close(logits, expected[torch.arange(3), last - 1], rtol=1e-4, atol=1e-4)
            logits = pair.fast.decode(ids.gather(1, last[:, None])[:, 0], torch.ones(3, dtype=torch.bool))
    finally:
        pair.fast.end()


def test_half_precision_stays_close() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    fast = lethe.optimize(model, policy="full")
    ids = torch.randint(97, (2, 21))
    with torch.no_grad():
        expected = model(ids).logits
    assert fast(ids).dtype == torch.bfloat16
    torch.testing.assert_close(fast(ids), expected, rtol=6e-2, atol=6e-2 * float(expected.abs().max()))

"""Sampling in NumPy, against transformers' warpers and by its own frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from lethe_compile.artifact.sampling import Sampler
from lethe_compile.errors import InputError


def logits(rows: int, vocab: int = 50) -> Any:
    return np.random.default_rng(0).normal(size=(rows, vocab), scale=3).astype(np.float32)


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler().choose(np.array([[0, 2, 2], [3, 1, 0]], np.float32)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_k": 500}, [hf.TopKLogitsWarper(500)]),
        ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
        (
            {"temperature": 1.5, "top_k": 20, "top_p": 0.5},
            [hf.TemperatureLogitsWarper(1.5), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.5)],
        ),
    ],
)
def test_what_may_be_drawn_is_what_transformers_leaves(options: dict[str, Any], warpers: list[Any]) -> None:
    given = logits(8)
    expected = torch.from_numpy(given.copy())
    for warper in warpers:
        expected = warper(None, expected)
    ours = Sampler(**options)._warped(given.astype(np.float64))
    assert (np.isfinite(ours) == np.isfinite(expected.numpy())).all()
    np.testing.assert_allclose(ours[np.isfinite(ours)], expected.numpy()[np.isfinite(ours)], rtol=1e-5)


def test_tokens_come_as_often_as_they_are_probable() -> None:
    probability = np.array([0.5, 0.3, 0.2])
    rows = np.tile(np.log(probability).astype(np.float32), (20000, 1))
    counts = np.bincount(Sampler(seed=3).choose(rows), minlength=3)
    np.testing.assert_allclose(counts / 20000, probability, atol=0.02)


def test_equal_seeds_draw_equal_tokens() -> None:
    given = logits(64)
    first, second, other = (Sampler(seed=seed).choose(given).tolist() for seed in (7, 7, 8))
    assert first == second != other


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}="):
        Sampler(**options)

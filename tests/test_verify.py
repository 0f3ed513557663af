"""A rewritten graph that computes something else than the model is never handed out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lethe_compile as lethe
from lethe_compile.errors import LetheError, UnsupportedGraphError
from lethe_compile.kernels.attention import cpu, reference
from lethe_compile.models.plain_decoder import PlainDecoder, plain


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.attention

    def wrong(*operands: Any, **options: Any) -> Tensor:
        window = options["window"]
        return right(*operands, **{**options, "window": None if window is None else window + 1})

    monkeypatch.setattr(cpu, "attention", wrong)
    monkeypatch.setattr(reference, "attention", wrong)
    with pytest.raises(UnsupportedGraphError, match=r"computes something else on 7 tokens|on 19 tokens") as found:
        lethe.optimize(plain())
    assert "off by" in str(found.value)


def test_a_scale_by_length_is_found() -> None:
    """torch.export takes T ** -0.5 for a constant, that of its example."""

    class ByLength(PlainDecoder):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * float(tokens.shape[1] ** -0.5)

    with pytest.raises(UnsupportedGraphError, match=r"computes something else|depends on the number of tokens"):
        lethe.optimize(ByLength().eval())


class Convolved(PlainDecoder):
    """Another mixer of tokens beside attention: each token is joined by the one before."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits + nn.functional.pad(logits[:, :-1], (0, 0, 1, 0))


def test_another_mixer_of_tokens_is_found_by_decoding() -> None:
    with pytest.raises(UnsupportedGraphError, match="3 of them step by step") as found:
        lethe.optimize(Convolved().eval())
    assert found.value.hint is not None and "a convolution" in found.value.hint


def test_positions_left_as_they_were_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe_compile.passes.rewrite_positions.counts_tokens", lambda *options: False)
    for module in ("rewrite_positions", "insert_attention"):
        monkeypatch.setattr(f"lethe_compile.passes.{module}.refuse_other_counts", lambda program: None)
    with pytest.raises(UnsupportedGraphError, match="3 of them step by step"):
        lethe.optimize(plain())


def test_a_model_of_no_finite_logits_is_named_as_the_culprit() -> None:
    class Overflowing(PlainDecoder):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * 1e30 * 1e30

    with pytest.raises(LetheError, match="the model's own logits are not finite"):
        lethe.optimize(Overflowing().eval())


def test_verification_can_be_left_out() -> None:
    fast = lethe.optimize(Convolved().eval(), verified=False)
    assert fast(torch.ones(1, 3, dtype=torch.int64)).shape == (1, 3, 97)

"""Linear maps side by side: the reference against torch's, and the GPU's kernel against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lethe_compile.kernels import ops  # noqa: F401  (registers the op)
from lethe_compile.kernels.linear import reference
from tests.kernels.interpret import run_interpreted


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (0,)])
def test_reference(shape: tuple[int, ...], biased: bool) -> None:
    x = torch.randn(*shape, 16)
    weights = [torch.randn(n, 16) for n in (4, 1, 9)]
    biases = [torch.randn(len(w)) for w in weights] if biased else []
    expected = torch.cat([F.linear(x, w, biases[i] if biased else None) for i, w in enumerate(weights)], -1)
    out = torch.ops.lethe.linears(x, weights, biases)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(reference.linears(x, weights, biases), expected)


def check(x: Tensor, sizes: tuple[int, ...], most_tokens: int | None) -> None:
    """With and without biases; `most_tokens` as a program that is exported tells it."""
    from lethe_compile.kernels.linear import triton

    width, options = x.shape[1], {"dtype": x.dtype, "device": x.device}
    weights = [torch.randn(n, width).to(**options) / width**0.5 for n in sizes]
    for biases in ([], [torch.randn(n).to(**options) for n in sizes]):
        assert triton.serves(x, weights)
        out = triton.linears(x, weights, biases, most_tokens).double()
        exact = reference.linears(x.double(), [w.double() for w in weights], [b.double() for b in biases])
        assert float((out - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.interpreted
@pytest.mark.parametrize("most_tokens", [None, 64])
@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_kernel(tokens: int, most_tokens: int | None) -> None:
    for sizes in ((64,), (40, 33, 32, 1)):
        check(torch.randn(tokens, 264).half(), sizes, most_tokens)


def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("most_tokens", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 64])
@pytest.mark.parametrize("width", [256, 264, 4096])
def test_gpu(width: int, tokens: int, dtype: torch.dtype, most_tokens: int | None) -> None:
    for sizes in ((64,), (96, 32, 7), (40, 33, 32, 1), (4100,), (4000, 130, 70, 64)):  # few programs, and many
        check(torch.randn(tokens, width, device="cuda").to(dtype), sizes, most_tokens)

"""Linear maps side by side: the reference against torch's, and the GPU's kernel against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lethe_compile.kernels.linear import reference


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 64])
@pytest.mark.parametrize("width", [256, 264, 4096])
def test_gpu(width: int, tokens: int, dtype: torch.dtype) -> None:
    from lethe_compile.kernels.linear import triton

    for sizes in ((64,), (96, 32, 7), (40, 33, 32, 1), (4100,), (4000, 130, 70, 64)):  # few programs, and many
        x = torch.randn(tokens, width, device="cuda").to(dtype)
        weights = [(torch.randn(n, width, device="cuda") / width**0.5).to(dtype) for n in sizes]
        for biases in ([], [torch.randn(n, device="cuda").to(dtype) for n in sizes]):
            assert triton.serves(x, weights)
            out = triton.linears(x, weights, biases).double()
            exact = reference.linears(x.double(), [w.double() for w in weights], [b.double() for b in biases])
            assert float((out - exact).norm() / exact.norm()) < 1e-2

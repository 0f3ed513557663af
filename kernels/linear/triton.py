"""Linear maps of a few tokens, in Triton: the weights of several maps of one input stream by in one launch.

While decoding, a projection reads its whole weight for a handful of tokens: memory bandwidth is all that counts. A
library's matrix product leaves multiprocessors idle where a weight has few rows (keys and values of a grouped-query
model); side by side with others it does not. The truth is `linear.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lethe_compile.kernels.launch import launch

MOST_TOKENS = 64
MOST_WEIGHTS = 4


@triton.jit(do_not_specialize=["tokens"])
def _linears(
    x,  # [tokens, K]
    w0,  # [N0, K]
    w1,
    w2,
    w3,
    b0,  # [N0]
    b1,
    b2,
    b3,
    out,  # [tokens, N0 + N1 + N2 + N3]
    tokens,
    K: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    T0: tl.constexpr = (N0 + N - 1) // N
    T1: tl.constexpr = T0 + (N1 + N - 1) // N
    T2: tl.constexpr = T1 + (N2 + N - 1) // N
    weight, bias, first, size, column = w0, b0, tile * N, N0, 0
    if tile >= T0:
        weight, bias, first, size, column = w1, b1, (tile - T0) * N, N1, N0
    if tile >= T1:
        weight, bias, first, size, column = w2, b2, (tile - T1) * N, N2, N0 + N1
    if tile >= T2:
        weight, bias, first, size, column = w3, b3, (tile - T2) * N, N3, N0 + N1 + N2
    weight = tl.multiple_of(weight, 16)
    m, n, k = tl.arange(0, M), first + tl.arange(0, N), tl.arange(0, BLOCK)
    real, inside = m < tokens, n < size
    x_at = x + m[:, None] * K + k[None, :]
    w_at = weight + tl.where(inside, n, 0)[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros([M, N], tl.float32)
    for at in tl.range(0, K, BLOCK, num_stages=STAGES):
        if K % BLOCK == 0:
            a = tl.load(x_at + at, mask=real[:, None], other=0.0)
            b = tl.load(w_at + at, eviction_policy="evict_first")
        else:
            a = tl.load(x_at + at, mask=real[:, None] & (at + k < K)[None, :], other=0.0)
            b = tl.load(w_at + at, mask=(at + k < K)[:, None], other=0.0, eviction_policy="evict_first")
        acc = tl.dot(a, b, acc)
    if BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_at = out + m[:, None] * (N0 + N1 + N2 + N3) + (column + n)[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


def serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether there are few enough tokens, in half precision, and rows whose loads are 16 bytes wide."""
    few = 0 < x.numel() // x.shape[-1] <= MOST_TOKENS and len(weights) <= MOST_WEIGHTS
    dense = all(w.is_contiguous() and w.data_ptr() % 16 == 0 for w in weights)
    return few and dense and x.dtype in (torch.float16, torch.bfloat16) and x.shape[-1] % 8 == 0


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`reference.linears`; requires `serves`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, width = rows.shape
    sizes = [w.shape[0] for w in weights] + [0] * (MOST_WEIGHTS - len(weights))
    m, n = max(16, triton.next_power_of_2(tokens)), 32
    out = torch.empty(tokens, sum(sizes), dtype=x.dtype, device=x.device)
    spare_w, spare_b = [weights[0]] * sizes.count(0), [rows] * MOST_WEIGHTS
    launch(
        _linears,
        (sum(triton.cdiv(size, n) for size in sizes),),
        rows,
        *weights,
        *spare_w,
        *(list(biases) + spare_b)[:MOST_WEIGHTS],
        out,
        tokens,
        K=width,
        N0=sizes[0],
        N1=sizes[1],
        N2=sizes[2],
        N3=sizes[3],
        BIAS=bool(biases),
        M=m,
        N=n,
        BLOCK=256 if m == 16 else 128,
        STAGES=4,
        num_warps=4,
        num_stages=4,
    )
    return out.view(*x.shape[:-1], out.shape[1])

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
from triton.tools.tensor_descriptor import TensorDescriptor

from lethe_compile.kernels.launch import launch

MOST_TOKENS = 64
MOST_WEIGHTS = 4
_ENOUGH = 64  # programs, for weights to come first; with fewer, more of half the size stream faster
_ONE_EACH = 132  # multiprocessors of a Hopper GPU: with more programs, two must fit into the memory of one


@triton.jit
def _tile(
    x_tiles,
    w_tiles,
    bias,
    out,
    first,
    column,
    tokens,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    BULK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows `first` to `first + N` of one weight, for all tokens, at most M.

    Without descriptors, whose tiles are of one size, the product is as narrow as the tokens allow: one kernel serves
    few rows as fast as one that was compiled for no more.
    """
    if BULK or M == 16:
        _product(
            x_tiles, w_tiles, bias, out, first, column, tokens,
            K, SIZE, WIDTH, BIAS, M, N, BLOCK, WEIGHTS_FIRST, BULK, STAGES,
        )  # fmt: skip
    else:
        # Conditions on constants stay apart from others: what they rule out is left out while compiling.
        for i in tl.static_range(3):
            if 16 << i <= M:  # noqa: SIM102
                if (tokens <= 16 << i) & ((tokens > 8 << i) | (i == 0)):
                    _product(
                        x_tiles, w_tiles, bias, out, first, column, tokens,
                        K, SIZE, WIDTH, BIAS, 16 << i, N, BLOCK, WEIGHTS_FIRST, BULK, STAGES,
                    )  # fmt: skip


@triton.jit
def _product(
    x_tiles,
    w_tiles,
    bias,
    out,
    first,
    column,
    tokens,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    BULK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_tile`, for exactly M tokens; what lies outside of a tensor is loaded as zeros."""
    m, n = tl.arange(0, M), first + tl.arange(0, N)
    acc = tl.zeros([N, M], tl.float32) if WEIGHTS_FIRST else tl.zeros([M, N], tl.float32)
    for at in tl.range(0, K, BLOCK, num_stages=STAGES):
        if BULK:
            w, x = w_tiles.load([first, at]), x_tiles.load([0, at])
        else:
            k = at + tl.arange(0, BLOCK)
            w_at, x_at = w_tiles + n.to(tl.int64)[:, None] * K + k[None, :], x_tiles + m[:, None] * K + k[None, :]
            w = tl.load(w_at, mask=(n < SIZE)[:, None] & (k < K)[None, :], other=0.0)
            x = tl.load(x_at, mask=(m < tokens)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(w, x.T, acc) if WEIGHTS_FIRST else tl.dot(x, w.T, acc)
    if WEIGHTS_FIRST:
        acc = acc.T
    if BIAS:
        acc += tl.load(bias + n, mask=n < SIZE, other=0.0).to(tl.float32)[None, :]
    out_at = out + m[:, None] * WIDTH + (column + n)[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=(m < tokens)[:, None] & (n < SIZE)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _linears(
    x,  # descriptor of [tokens, K], tiles of [M, BLOCK]
    w0,  # descriptor of [N0, K], tiles of [N, BLOCK]
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
    WEIGHTS_FIRST: tl.constexpr,  # as the left operand, which Hopper's tensor cores read in rows of 64
    BULK: tl.constexpr,  # load tiles by descriptors; else x and weights are pointers
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    WIDTH: tl.constexpr = N0 + N1 + N2 + N3
    T0: tl.constexpr = (N0 + N - 1) // N
    T1: tl.constexpr = T0 + (N1 + N - 1) // N
    T2: tl.constexpr = T1 + (N2 + N - 1) // N
    T3: tl.constexpr = T2 + (N3 + N - 1) // N
    if tile < T0:
        at = tile * N
        _tile(x, w0, b0, out, at, 0, tokens, K, N0, WIDTH, BIAS, M, N, BLOCK, WEIGHTS_FIRST, BULK, STAGES)
    # What has no rows is left out while compiling, so the conditions stay apart.
    if T0 < T1:  # noqa: SIM102
        if (tile >= T0) & (tile < T1):
            at = (tile - T0) * N
            _tile(x, w1, b1, out, at, N0, tokens, K, N1, WIDTH, BIAS, M, N, BLOCK, WEIGHTS_FIRST, BULK, STAGES)
    if T1 < T2:  # noqa: SIM102
        if (tile >= T1) & (tile < T2):
            at = (tile - T1) * N
            _tile(x, w2, b2, out, at, N0 + N1, tokens, K, N2, WIDTH, BIAS, M, N, BLOCK, WEIGHTS_FIRST, BULK, STAGES)
    if T2 < T3:  # noqa: SIM102
        if tile >= T2:
            at = (tile - T2) * N
            _tile(
                x, w3, b3, out, at, N0 + N1 + N2, tokens, K, N3, WIDTH, BIAS, M, N, BLOCK, WEIGHTS_FIRST, BULK, STAGES
            )


def serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether there are few enough tokens, in half precision, and rows whose loads are 16 bytes wide."""
    few = 0 < x.numel() // x.shape[-1] <= MOST_TOKENS and len(weights) <= MOST_WEIGHTS
    dense = all(w.is_contiguous() for w in weights) and all(t.data_ptr() % 16 == 0 for t in (x, *weights))
    return few and dense and x.dtype in (torch.float16, torch.bfloat16) and x.shape[-1] % 8 == 0


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], most_tokens: int | None = None) -> Tensor:
    """`reference.linears`; requires `serves`.

    With `most_tokens`, nothing that is compiled depends on the number of tokens, and descriptors are done without, so
    that it can be traced.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, width = rows.shape
    sizes = [w.shape[0] for w in weights] + [0] * (MOST_WEIGHTS - len(weights))
    m = max(16, triton.next_power_of_2(tokens if most_tokens is None else most_tokens))
    n, block, stages = _tiling(m, sizes)
    bulk = most_tokens is None
    out = torch.empty(tokens, sum(sizes), dtype=x.dtype, device=x.device)
    tiles = [TensorDescriptor.from_tensor(weight, [n, block]) if bulk else weight for weight in weights]
    launch(
        _linears,
        (_programs(sizes, n),),
        TensorDescriptor.from_tensor(rows, [m, block]) if bulk else rows,
        *tiles,
        *tiles[:1] * sizes.count(0),
        *(list(biases) + [rows] * MOST_WEIGHTS)[:MOST_WEIGHTS],
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
        BLOCK=block,
        WEIGHTS_FIRST=n == 64,
        BULK=bulk,
        STAGES=stages,
        num_warps=4,
        num_stages=stages,
    )
    return out.view(*x.shape[:-1], out.shape[1])


def _tiling(m: int, sizes: Sequence[int]) -> tuple[int, int, int]:
    """Rows and channels of a weight's tile, and how many are under way, for m tokens.

    The fastest on an H200 for weights of 4,096 to 32,000 rows with 4,096 and 14,336 channels in bfloat16.
    """
    weights_first = _programs(sizes, 64) >= (_ENOUGH if m <= 32 else _ENOUGH + 1)
    n = 64 if weights_first else 32
    if m <= 32:
        return n, 256, 4
    if not weights_first:
        return n, 128, 6
    return n, 128, 3 if _programs(sizes, n) > _ONE_EACH else 4


def _programs(sizes: Sequence[int], n: int) -> int:
    """How many there are of n rows of a weight each."""
    return sum(triton.cdiv(size, n) for size in sizes)

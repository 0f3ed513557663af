"""What the Triton attention kernels share: products, scores and the online softmax of one block of slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1.0e30)  # a running maximum before anything was seen: finite, so that differences are no NaN


def sets_of(sinks: Tensor | None, slopes: Tensor | None, heads: int) -> int:
    """How many sets of sinks and slopes rows take turns in, see `attention.reference`; both have as many."""
    given = [len(learned) // heads for learned in (sinks, slopes) if learned is not None]
    return given[0] if given else 1


@triton.jit
def tanh(x):
    """tanh in float32; `tl` has none, and libdevice's does not run in the interpreter."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies bfloat16 wrong; float32 tensors must not be rounded to TF32
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def page_ids(table, block, length, n, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Pages of a block's slots: one where a page holds whole blocks, else [BLOCK]; 0, which exists, beyond `length`."""
    slot = block * BLOCK
    if PAGE % BLOCK != 0:
        slot += n
    return tl.load(table + slot // PAGE, mask=slot < length, other=0)


@triton.jit
def scores(
    s,
    position,
    now,
    slope,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """Scores [M, BLOCK] in base 2 of products [M, BLOCK] with cached keys; `position` points to their positions."""
    s = s * SCALE
    if SOFTCAP is not None:
        s = tanh(s / SOFTCAP) * (SOFTCAP * LOG2E)
    if SLOPES or WINDOW is not None:
        age = now - tl.load(position)
        if SLOPES:
            s -= slope[:, None] * age.to(tl.float32)[None, :]
        if WINDOW is not None:
            seen = (age <= now % WINDOW) if CHUNKED else (age < WINDOW)
            s = tl.where(seen[None, :], s, float("-inf"))
    return s


@triton.jit
def fold(top, mass, acc, s, v, UPCAST: tl.constexpr):
    """The running maximum, sum and output after scores s [M, BLOCK] of values v [BLOCK, V], and exp2(s - maximum)."""
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    fade = tl.exp2(top - higher)
    return higher, mass * fade + tl.sum(p, 1), acc * fade[:, None] + dot(p.to(v.dtype), v, UPCAST), p

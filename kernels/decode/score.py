"""The mass of cached slots, from the probabilities that decode attention left behind, in Triton.

`keep` writes them, relative to running maxima, while attention streams; `add_mass` makes them exact, now that every
row's log-sum-exp is known.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_kept(pointers, halves, mask):
    """Store 16-bit values that L2 keeps rather than what streams through it: they are read back soon, by `add_mass`."""
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred wanted;
        .reg .b64 policy;
        setp.ne.b32 wanted, $3, 0;
        createpolicy.fractional.L2::evict_last.b64 policy, 1.0;
        @wanted st.global.L2::cache_hint.b16 [$1], $2, policy;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,h,r",
        [pointers.to(tl.int64), halves.to(tl.int16, bitcast=True), mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def keep(weight_at, max_at, block, slot, m, p, top, old, GROUP: tl.constexpr, KEEP: tl.constexpr):
    """Leave a block's probabilities, and the maximum that they are relative to, for `add_mass`."""
    valid = (m < GROUP)[:, None] & (slot < old)[None, :]
    at = weight_at + (slot[None, :] * GROUP + m[:, None])
    kept = p.to(weight_at.dtype.element_ty)
    if KEEP:
        _store_kept(at, kept, valid)
    else:
        tl.store(at, kept, mask=valid)
    tl.store(max_at + block * GROUP + m, top, mask=m < GROUP)


@triton.jit(do_not_specialize=["rows", "table_stride"])
def add_mass(
    weight,
    block_max,
    lse,
    slot_mass,
    page_table,
    length,  # already advanced
    new_lengths,
    rows,
    capacity,
    table_stride,
    DECAY: tl.constexpr,
    PEAK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # of `_attend`
    SLOTS: tl.constexpr,  # of this kernel
    G: tl.constexpr,  # a power of two >= GROUP
):
    row, start = tl.program_id(1), tl.program_id(0) * SLOTS
    added = tl.load(new_lengths + row)
    old = tl.load(length + row) - added
    if (added > 0) & (start <= old):
        slot, g = start + tl.arange(0, SLOTS), tl.arange(0, G)
        in_group = g < GROUP
        page = tl.load(page_table + row.to(tl.int64) * table_stride + slot // PAGE, mask=slot <= old, other=0)
        mass_at = slot_mass + page.to(tl.int64) * PAGE + slot % PAGE
        before = tl.load(mass_at, mask=slot < old, other=0.0)
        seen = tl.zeros([SLOTS], tl.float32)
        for head in tl.static_range(KV_HEADS):
            item = (row * KV_HEADS + head).to(tl.int64)
            total = tl.load(lse + item * GROUP + g, mask=in_group, other=0.0)
            new = tl.load(lse + (rows * KV_HEADS + item) * GROUP + g, mask=in_group, other=float("-inf"))
            valid = (slot < old)[:, None] & in_group[None, :]
            w_at = weight + item * capacity * GROUP + (slot[:, None] * GROUP + g[None, :])
            w = tl.load(w_at, mask=valid, other=0.0).to(tl.float32)
            m_at = block_max + (item * (capacity // BLOCK) + slot // BLOCK)[:, None] * GROUP + g[None, :]
            top = tl.load(m_at, mask=valid, other=float("-inf"))
            p = tl.where((slot == old)[:, None], tl.exp2(new - total)[None, :], w * tl.exp2(top - total[None, :]))
            p = tl.where(in_group[None, :], p, 0.0)
            seen = tl.maximum(seen, tl.max(p, 1)) if PEAK else seen + tl.sum(p, 1)
        faded = before * DECAY
        tl.store(mass_at, tl.maximum(faded, seen) if PEAK else faded + seen, mask=slot <= old)

"""The kernels of a step as `torch.library.triton_op`, which AOTInductor sees into, and compiles into its packages.

`lethe::attention` and `lethe::linears` choose a kernel when they run, and stay opaque. An exported program has chosen:
one for a single token a row, another for many. Each op takes the state of its own cache, so that every input of a
program is written by the kernels of one layer alone, in place. `None` as `decay` means that nothing is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.library import triton_op

from lethe_compile.kernels.decode import triton as decode
from lethe_compile.kernels.launch import traceable
from lethe_compile.kernels.linear import triton as linear
from lethe_compile.kernels.ops import attend_shared
from lethe_compile.kernels.prefill import triton as prefill

_STATE = ("k_pages", "v_pages", "slot_position", "slot_mass", "length")


@triton_op("lethe::decode_attention", mutates_args=(*_STATE, "counter"))
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slot_position: Tensor,
    slot_mass: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    counter: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int | None,
    chunked: bool,
    softcap: float | None,
    decay: float | None,
    peak: bool,
    shares: bool,
    most_rows: int,
) -> Tensor:
    """`decode.triton.attention` of at most `most_rows` rows; page_table ``[rows, n]``, length ``[rows]``."""
    kernel = partial(decode.attention, fixed=decode.Fixed(most_rows, counter))
    state = (k_pages, v_pages, slot_position, slot_mass, page_table, length)
    rule = {"scale": scale, "window": window, "chunked": chunked, "softcap": softcap, "sinks": sinks, "slopes": slopes}
    with traceable():
        return attend_shared(
            kernel,
            _dense(query, key, value),
            state,
            positions,
            new_lengths,
            decay,
            peak=peak,
            shares=shares,
            **rule,
        )


@triton_op("lethe::prefill_attention", mutates_args=_STATE)
def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slot_position: Tensor,
    slot_mass: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int | None,
    chunked: bool,
    softcap: float | None,
    decay: float | None,
    peak: bool,
    shares: bool,
) -> Tensor:
    """`prefill.triton.attention` of any number of tokens; page_table ``[rows, n]``, length ``[rows]``."""
    state = (k_pages, v_pages, slot_position, slot_mass, page_table, length)
    rule = {"scale": scale, "window": window, "chunked": chunked, "softcap": softcap, "sinks": sinks, "slopes": slopes}
    with traceable():
        return attend_shared(
            prefill.attention,
            _dense(query, key, value),
            state,
            positions,
            new_lengths,
            decay,
            peak=peak,
            shares=shares,
            **rule,
        )


@triton_op("lethe::few_linears", mutates_args=())
def few_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], most_tokens: int) -> Tensor:
    """`linear.triton.linears` of at most `most_tokens` tokens in half precision."""
    with traceable():
        return linear.linears(x, weights, biases, most_tokens)


def _dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Strides are traced as numbers: those of a slice of something else might not be what a compiler leaves of it."""
    return query.contiguous(), key.contiguous(), value.contiguous()


def linears_serve(x: Tensor, weights: Sequence[Tensor], most_tokens: int) -> bool:
    """Whether `few_linears` takes these: half precision, rows whose loads are 16 bytes wide, few weights."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[-1] % 8 == 0
        and len(weights) <= linear.MOST_WEIGHTS
        and most_tokens <= linear.MOST_TOKENS
    )

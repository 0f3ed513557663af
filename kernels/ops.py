"""The one place that registers the `lethe::` operators. Importing this module makes them exist.

`lethe::attention_site` marks, in a captured graph, a call of a model's own attention; a pass replaces every one.
`lethe::attention` is the canonical op: it appends, attends over the retained slots, and scores them by what they got.
`lethe::recurrent_site` and `lethe::recurrent` are the same pair for a module that keeps state of another kind.
`lethe::columns_site`, `lethe::visible_site` and `lethe::columns`, `lethe::visible` are the same pairs for what a mask
that depends on the content needs of earlier tokens.
`lethe::linears` are linear maps of one input, side by side.
`select`, `hoyer_sparsity` and `compact` run between steps, outside every graph: plain functions that pick a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lethe_compile.kernels.attention import cpu, reference
from lethe_compile.kernels.by_position import reference as by_position
from lethe_compile.kernels.compact import reference as compact_reference
from lethe_compile.kernels.linear import reference as linear_reference
from lethe_compile.kernels.recurrent import reference as recurrent_reference
from lethe_compile.kernels.recurrent.call import registered
from lethe_compile.kernels.select import bisection
from lethe_compile.kernels.select import reference as select_reference


@torch.library.custom_op("lethe::attention_site", mutates_args=())
def attention_site(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    layer: int,
) -> Tensor:
    """Uncached attention as transformers' eager function computes it, one node in the graph.

    query ``[B, H, T, Dk]``, key ``[B, Hkv, S, Dk]``, value ``[B, Hkv, S, Dv]``; mask, additive or boolean, and bias,
    added to the scores, broadcastable to ``[B, H, T, S]``; returns ``[B, H, T, Dv]``. `window` is what the model says
    of the layer: the mask is what counts.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    probability = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]]
    return torch.matmul(probability.to(query.dtype), value)


def _attention(
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
    layer: int,
    decay: float | None,
    peak: bool = False,
    shares: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Cached attention of one layer; `page_table` and `length` hold all caches: ``[caches, rows, …]``, `layer` is its.

    Other shapes and the effects on the state are those of `kernels.attention.reference.attention`. A layer that
    `shares` the cache comes after the one that has appended the new tokens: it writes the same to the same slots again,
    `length` stays, and what it attends to adds to the slots' mass of this step.
    """
    table, retained = page_table[layer], length[layer]
    kernel: Callable[..., Tensor] = reference.attention
    if query.is_cpu and cpu.serves(query, k_pages, v_pages, table, retained if shares else retained + new_lengths):
        kernel = cpu.attention
    elif _use_triton(query) and query.dtype != torch.float64 and bias is None:  # the Triton kernels take no bias
        from lethe_compile.kernels.decode import triton as decode
        from lethe_compile.kernels.prefill import triton as prefill

        kernel = decode.attention if query.shape[2] == 1 else prefill.attention
    rule: dict[str, Any] = {"scale": scale, "window": window, "chunked": chunked, "softcap": softcap}
    rule |= {"sinks": sinks, "slopes": slopes, **({} if bias is None else {"bias": bias})}
    state = (k_pages, v_pages, slot_position, slot_mass, table, retained)
    new = (query, key, value)
    return attend_shared(kernel, new, state, positions, new_lengths, decay, peak=peak, shares=shares, **rule)


def attend_shared(
    kernel: Callable[..., Tensor],
    new: tuple[Tensor, Tensor, Tensor],
    state: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor],
    positions: Tensor,
    new_lengths: Tensor,
    decay: float | None,
    *,
    peak: bool,
    shares: bool,
    **rule: Any,
) -> Tensor:
    """A kernel's attention over a cache that an earlier layer of this step may have appended to, as `_attention` says.

    `new` are query, key and value; `state` the pools, the table and length of this cache.
    """
    *pools, table, length = state
    slot_mass, steps, first = state[3], new[0].shape[2], None
    if shares:
        length = length - new_lengths
        if decay is not None:
            first, decay = _mass_of_new(slot_mass, table, length, new_lengths, steps, peak), 1.0
    out = kernel(*new, *pools, table, length, positions, new_lengths, decay=decay, peak=peak, **rule)
    if first is not None:
        slots, mass = first
        slot_mass.view(-1).scatter_reduce_(0, slots, mass, "amax" if peak else "sum")
    return out


def _mass_of_new(
    slot_mass: Tensor, table: Tensor, retained: Tensor, new_lengths: Tensor, steps: int, peak: bool
) -> tuple[Tensor, Tensor]:
    """Where the new tokens of all rows lie among all slots, and their mass, both ``[rows * steps]``.

    To append them again clears it. Padding lies anywhere, with a mass that changes none.
    """
    pages, page = slot_mass.shape
    step = torch.arange(steps, device=table.device)
    slot = retained[:, None] + step  # [rows, steps]
    at = table.gather(1, (slot // page).clamp(max=table.shape[1] - 1).long()).clamp(0, pages - 1)
    slots = (at * page + slot % page).long().flatten()
    padding = (step >= new_lengths[:, None]).flatten()
    return slots, slot_mass.view(-1)[slots].masked_fill(padding, float("-inf") if peak else 0.0)


def _output(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """What both return, as far as shapes, strides and dtypes go."""
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])


attention_site.register_fake(_output)

# Not a `custom_op`, whose autograd and version-counter wrappers, in Python, take 90 µs a call: this takes 8.
torch.library.define(
    "lethe::attention",
    torch.library.infer_schema(_attention, mutates_args=("k_pages", "v_pages", "slot_position", "slot_mass", "length")),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("lethe::attention", "CompositeExplicitAutograd", torch.no_grad()(_attention))
torch.library.register_fake("lethe::attention", _output)


@torch.library.custom_op("lethe::linears", mutates_args=())
def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`kernels.linear.reference.linears`, by the fastest kernel for the device and the number of tokens."""
    if _use_triton(x):
        from lethe_compile.kernels.linear import triton as fast

        if fast.serves(x, weights):
            return fast.linears(x, weights, biases)
    return linear_reference.linears(x, weights, biases)


@linears.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights))


@torch.library.custom_op("lethe::recurrent_site", mutates_args=())
def recurrent_site(operands: Sequence[Tensor], padding: Sequence[Tensor], call: int) -> Tensor:
    """A stateful module over whole sequences without padding, one node in the graph; `call` is its registered number.

    Returns its outputs side by side, ``[rows, tokens, width]``. `padding` are the masks that the model hands it only
    where rows are padded: they are there to be looked at by passes.
    """
    return registered(call).prefill(operands)[0].clone()


@recurrent_site.register_fake
def _(operands: Sequence[Tensor], padding: Sequence[Tensor], call: int) -> Tensor:
    return _packed(operands, call)


def _recurrent(
    operands: Sequence[Tensor], states: Sequence[Tensor], has_previous_state: Tensor, new_lengths: Tensor, call: int
) -> Tensor:
    """`kernels.recurrent.reference.recurrent`; `call` is a registered number."""
    return recurrent_reference.recurrent(operands, states, has_previous_state, new_lengths, registered(call))


def _packed(operands: Sequence[Tensor], call: int) -> Tensor:
    """What both return, as far as shapes and dtypes go."""
    module = registered(call)
    return operands[0].new_empty(*module.sizes(operands), module.width, dtype=module.dtype)


torch.library.define(
    "lethe::recurrent",
    torch.library.infer_schema(_recurrent, mutates_args=("states",)),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("lethe::recurrent", "CompositeExplicitAutograd", torch.no_grad()(_recurrent))
torch.library.register_fake("lethe::recurrent", lambda operands, states, previous, new, call: _packed(operands, call))


@torch.library.custom_op("lethe::columns_site", mutates_args=())
def columns_site(new: Tensor, seen: Tensor, layer: int, offset: int) -> Tensor:
    """Values of every token of a whole sequence, as a mask over keys reads them: ``[rows, T, width]`` is all there is.

    A pass has it cached beside the keys of `layer`. Returns ``[rows, P, width]`` for seen ``[P]``, P = T.
    """
    return torch.nn.functional.pad(new, (0, 0, 0, len(seen) - new.shape[1]))


@torch.library.custom_op("lethe::visible_site", mutates_args=())
def visible_site(ids: Tensor, seen: Tensor, window: int | None, chunked: bool, layer: int) -> Tensor:
    """What each token of a whole sequence ids ``[rows, T]`` sees in `layer`: bool ``[rows, T, P]`` for seen ``[P]``."""
    steps = torch.arange(ids.shape[1], device=ids.device)
    age = steps[:, None] - seen
    allowed = age >= 0
    if window is not None:
        allowed &= age <= steps[:, None] % window if chunked else age < window
    return allowed.repeat(len(ids), 1, 1)


def _columns(
    new: Tensor,
    k_pages: Tensor,
    slot_position: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    seen: Tensor,
    k_dim: int,
    offset: int,
    layer: int,
) -> Tensor:
    """`kernels.by_position.reference.columns`; `page_table` and `length` hold all layers."""
    state = (k_pages, slot_position, page_table[layer], length[layer])
    return by_position.columns(new, *state, positions, new_lengths, seen, k_dim=k_dim, offset=offset)


def _visible(
    slot_position: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    seen: Tensor,
    window: int | None,
    chunked: bool,
    layer: int,
) -> Tensor:
    """`kernels.by_position.reference.visible`; `page_table` and `length` hold all layers."""
    state = (slot_position, page_table[layer], length[layer])
    return by_position.visible(*state, positions, new_lengths, seen, window=window, chunked=chunked)


def _columns_of(new: Tensor, seen: Tensor) -> Tensor:
    return new.new_empty(new.shape[0], seen.shape[0], new.shape[2])


def _visible_of(tokens: Tensor, seen: Tensor) -> Tensor:
    return tokens.new_empty(*tokens.shape, seen.shape[0], dtype=torch.bool)


columns_site.register_fake(lambda new, seen, layer, offset: _columns_of(new, seen))
visible_site.register_fake(lambda ids, seen, window, chunked, layer: _visible_of(ids, seen))
for _name, _function in (("columns", _columns), ("visible", _visible)):
    torch.library.define(
        f"lethe::{_name}", torch.library.infer_schema(_function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag
    )
    torch.library.impl(f"lethe::{_name}", "CompositeExplicitAutograd", torch.no_grad()(_function))
torch.library.register_fake("lethe::columns", lambda *args: _columns_of(args[0], args[7]))
torch.library.register_fake("lethe::visible", lambda *args: _visible_of(args[3], args[5]))


def select(mass: Tensor, position: Tensor, length: Tensor, **rule: Any) -> tuple[Tensor, Tensor]:
    """`kernels.select.reference.select`, by the fastest kernel for the tensors' device; the same bits from each.

    While `torch.export` traces, it is one that every runtime can take.
    """
    if torch.compiler.is_exporting():
        return bisection.select(mass, position, length, **rule)
    if _use_triton(mass):
        from lethe_compile.kernels.select.triton import select as fast

        return fast(mass, position, length, **rule)
    return select_reference.select(mass, position, length, **rule)


def select_shared(mass: Tensor, position: Tensor, length: Tensor, active: Tensor, **rule: Any) -> tuple[Tensor, Tensor]:
    """`kernels.select.reference.select_shared`; traced by `torch.export`, as `select`."""
    choice = bisection.choose if torch.compiler.is_exporting() else select_reference.choose
    return select_reference.select_shared(mass, position, length, active, choice=choice, **rule)


def top(score: Tensor, position: Tensor, length: Tensor, **rule: Any) -> Tensor:
    """`kernels.select.reference.top`, which is PyTorch on every device: no round has been seen to wait for its sort."""
    return select_reference.top(score, position, length, **rule)


def hoyer_sparsity(mass: Tensor, length: Tensor) -> Tensor:
    """`kernels.select.reference.hoyer_sparsity`, by the fastest kernel; traced, it is PyTorch."""
    if _use_triton(mass) and not torch.compiler.is_exporting():
        from lethe_compile.kernels.select.triton import hoyer_sparsity as fast

        return fast(mass, length)
    return select_reference.hoyer_sparsity(mass, length)


def compact(
    k_pages: Tensor,
    v_pages: Tensor | None,
    slot_position: Tensor,
    slot_mass: Tensor,
    page_table: Tensor,
    length: Tensor,
    keep: Tensor,
) -> Tensor:
    """`kernels.compact.reference.compact`, by the fastest kernel for the tensors' device; the same bits from each."""
    if _use_triton(keep):
        from lethe_compile.kernels.compact.triton import compact as fast

        return fast(k_pages, v_pages, slot_position, slot_mass, page_table, length, keep)
    return compact_reference.compact(k_pages, v_pages, slot_position, slot_mass, page_table, length, keep)


def _use_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

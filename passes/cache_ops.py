"""How a decode step keeps its cache, proved by running it on labels: where a new token goes, what attention reads back.

The elements of a cache are set to their own coordinates, those of the new keys or values to theirs. What joins the two
moves elements and computes nothing, so the result tells of each element where it came from, whatever the operators.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lethe_compile.passes.program import Program, State
from lethe_compile.passes.step import Steps, moved, needed, past_dim, refusal, tokenwise

_BASE = 128  # labels are written in digits that bfloat16 too holds exactly
_MANY = 1 << 20  # tokens: more than any window
_NEW = -1  # the slot of what comes with the new token


@dataclass(frozen=True)
class Cache:
    """A cache of the step, and where it keeps its tokens.

    ``append``: token p in slot p of a fixed number. ``grow``: at the end of a tensor that gets longer and may drop its
    oldest. ``shift``: in the last slot, the others moving down by one.
    """

    state: State
    new: fx.Node  # the token's keys or values: the cache's dimensions in their order, without that of slots
    slots: int  # the dimension of the cache that counts tokens
    kind: str  # "append" | "grow" | "shift"
    shape: tuple[int, ...]  # with some number of slots where it grows

    @property
    def room(self) -> int | None:
        """Tokens that fit, None where the cache grows or the oldest go."""
        return self.shape[self.slots] if self.kind == "append" else None

    def joined(self, steps: Steps, past: int) -> list[int]:
        """Of each slot, once the new token is there, the slot that it was in before; `_NEW` for the new token."""
        if self.kind == "grow":
            return [*range(steps.held(self.state, past)), _NEW]
        slots = range(self.shape[self.slots])
        return [*slots[1:], _NEW] if self.kind == "shift" else [s if s != past else _NEW for s in slots]


@dataclass(frozen=True)
class Read:
    """What attention reads of a cache: `node` [B, H, S, D] or [B·H, S, D], the last two swapped if `keys_last`.

    Of a cache that shifts it may be, with `oldest`, one more than there are slots: also the token that goes.
    """

    cache: Cache
    node: fx.Node
    keys_last: bool
    heads: tuple[int, ...]  # of each head that is read, the cache's
    heads_dim: int  # the dimension of the cache that counts heads
    oldest: bool = False

    def positions(self, steps: Steps, past: int, count: int) -> Tensor:
        """The position of the token in each of the first `count` slots [count], -1 where there is none."""
        index = torch.arange(count, device=steps.device)
        if self.cache.kind == "append":
            return index.masked_fill(index > past, -1)
        return (index + past - self.before(steps, past)).clamp(min=-1)

    def before(self, steps: Steps, past: int) -> int:
        """Slots before that of the new token, in a cache that grows or shifts."""
        if self.cache.kind == "grow":
            return steps.held(self.cache.state, past)
        return self.cache.shape[self.cache.slots] - (0 if self.oldest else 1)


def find_cache(program: Program, steps: Steps, state: State) -> Cache:
    """Prove how `state` goes on from step to step.

    Raises:
        UnsupportedGraphError: a step does anything else than add its token's keys or values.
    """
    copies = moved(state.node)
    if state.after not in copies:
        raise refusal(state.after, f"what becomes of the cache '{state.name}' is not what it was and a new token")
    path = [node for node in needed([state.after]) if node in copies]
    outside = dict.fromkeys(n for node in path for n in node.all_input_nodes if n not in copies)
    tokens = tokenwise(program)
    added = [node for node in outside if node in tokens]
    if len(added) != 1:
        names = ", ".join(f"'{node.name}'" for node in added) or "nothing of the token"
        raise refusal(state.after, f"the cache '{state.name}' must take one tensor of the token, and takes {names}")
    grows = past_dim(state.node)
    return _fixed(steps, state, added[0]) if grows is None else _growing(steps, state, added[0], grows)


# ------------------------------------------------------------------------------------------------------------- updates


def _growing(steps: Steps, state: State, new: fx.Node, dim: int) -> Cache:
    cache, size = Cache(state, new, dim, "grow", steps.shape(state, 3)), steps.size(new)
    with FakeTensorMode(allow_non_fake_inputs=True):  # so many tokens take no memory
        shape = (*cache.shape[:dim], _MANY, *cache.shape[dim + 1 :])
        old = torch.empty(shape, dtype=state.node.meta["val"].dtype, device=steps.device)
        bound = {state.node: old, new: torch.empty(size, dtype=old.dtype, device=steps.device)}
        after = _run(steps, cache, state.after, 1, bound).shape[dim]
    if after <= _MANY:
        steps.limits[state] = int(after)  # the oldest go
    for past in (1, 2, 5):
        expected = cache.joined(steps, past)[-steps.held(state, past + 1) :]
        _expect_update(steps, cache, past, expected, everything=past == 2)
    return cache


def _fixed(steps: Steps, state: State, new: fx.Node) -> Cache:
    shape, dtype = steps.shape(state, 0), state.node.meta["val"].dtype
    cache = Cache(state, new, 0, "append", shape)
    bound = {
        state.node: torch.zeros(shape, dtype=dtype, device=steps.device),
        new: torch.ones(steps.size(new), dtype=new.meta["val"].dtype, device=steps.device),
    }
    after = _run(steps, cache, state.after, 1, bound)
    touched = after.ne(0).nonzero()
    dims = [dim for dim in range(1, len(shape)) if shape[dim] > 1 and touched[:, dim].unique().numel() == 1]
    if after.shape != shape or len(dims) != 1:
        raise refusal(state.after, f"a step does not write one slot of the cache '{state.name}'")
    cache = replace(cache, slots=dims[0])
    shifting = replace(cache, kind="shift")
    if _update(steps, cache, 0, {cache.slots}) == shifting.joined(steps, 0):
        cache = shifting
    size = shape[cache.slots]
    for past in sorted({0, 1, size // 2, size - 1}):
        _expect_update(steps, cache, past, cache.joined(steps, past), everything=past == 1)
    return cache


def _expect_update(steps: Steps, cache: Cache, past: int, expected: list[int], everything: bool) -> None:
    found = _update(steps, cache, past, set(range(4)) if everything else {cache.slots})
    if found == expected:
        return
    name = cache.state.name
    reason = f"with {past} tokens before it, a new token does not simply join the cache '{name}'"
    if found is not None and found.count(_NEW) == 1 and len(found) == len(expected):
        wrong, right = found.index(_NEW), expected.index(_NEW)
        reason = f"with {past} tokens before it, a new token goes to slot {wrong}, not {right}, of the cache '{name}'"
    raise refusal(cache.state.after, reason)


def _update(steps: Steps, cache: Cache, past: int, dims: Collection[int]) -> list[int] | None:
    """Of each slot after a step, the slot before it; None where a step changes more, as far as `dims` tell."""
    origins, _ = _origins(steps, cache, cache.state.after, past, dims)
    for dim, origin in origins.items():
        if origin.axis not in (dim, None) or (dim != cache.slots and origin.values != [*range(cache.shape[dim])]):
            return None
    return origins[cache.slots].values


# --------------------------------------------------------------------------------------------------------------- reads


def find_read(steps: Steps, cache: Cache, node: fx.Node, keys_last: bool) -> Read:
    """Prove what `node`, moved out of the cache and its new token, holds.

    Raises:
        UnsupportedGraphError: it is not the keys, or values, of every token.
    """
    if steps.reads(node, "input_ids", given={cache.state.node, cache.new}):
        raise refusal(node, f"'{node.name}' joins the cache '{cache.state.name}' with more than the token it keeps")
    reads = {_read(steps, cache, node, keys_last, past) for past in (2, 3)}
    if len(reads) != 1:
        raise refusal(node, f"'{node.name}' reads the cache '{cache.state.name}' differently as it fills")
    return reads.pop()


def _read(steps: Steps, cache: Cache, node: fx.Node, keys_last: bool, past: int) -> Read:
    name = cache.state.name
    origins, shape = _origins(steps, cache, node, past, range(4))
    rank = len(shape)
    keys, size = (rank - 1, rank - 2) if keys_last else (rank - 2, rank - 1)
    slots = origins[cache.slots]
    if rank not in (3, 4) or slots.axis != keys:
        raise refusal(node, f"'{node.name}' {list(shape)} is not [batch, heads, tokens, size] of the cache '{name}'")
    oldest = cache.kind == "shift" and slots.values == [*range(cache.shape[cache.slots]), _NEW]
    expected = slots.values if oldest else cache.joined(steps, past)[: len(slots.values)]
    if slots.values != expected or _NEW not in slots.values:
        raise refusal(node, f"'{node.name}' is not the cache '{name}' with the new token in its place")
    for dim in (d for d in range(1, 4) if d != cache.slots):
        (other,) = (d for d in range(1, 4) if d not in (dim, cache.slots))
        if origins[dim] == _Origin(size, [*range(cache.shape[dim])]) and origins[other].axis in (rank - 3, None):
            count = shape[1] if rank == 4 else shape[0] // steps.rows
            return Read(cache, node, keys_last, tuple((origins[other].values * count)[:count]), other, oldest)
    raise refusal(node, f"'{node.name}' is not every number of each head of the cache '{name}'")


# -------------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class _Origin:
    """Coordinates along one dimension of a cache, and the axis of the tensor along which they vary, if any."""

    axis: int | None
    values: list[int]


def _origins(
    steps: Steps, cache: Cache, node: fx.Node, past: int, dims: Collection[int]
) -> tuple[dict[int, _Origin], tuple[int, ...]]:
    """Where the elements of `node` come from, by dimension of the cache; and the shape of `node`."""
    shape = steps.shape(cache.state, past)
    small = [size for dim, size in enumerate(shape) if dim != cache.slots]
    found: dict[int, _Origin] = {}
    result: tuple[int, ...] = ()
    for dim in dims:
        index = torch.arange(shape[dim], device=steps.device).view([-1 if d == dim else 1 for d in range(4)])
        if dim == cache.slots:
            new = torch.full(small, _NEW, device=steps.device)
        else:
            new = index.squeeze(cache.slots).expand(small)
        labels = _carried(steps, cache, node, past, (index.expand(shape), new), shape[dim])
        result = tuple(labels.shape)
        found[dim] = _along(labels, cache, node)
    return found, result


def _carried(
    steps: Steps, cache: Cache, node: fx.Node, past: int, labels: tuple[Tensor, Tensor], largest: int
) -> Tensor:
    """Labels, from -1 to `largest`, of the cache and of the new token, as they arrive at `node`: int64."""
    result = torch.tensor(-1, device=steps.device)
    factor, shape = 1, steps.size(cache.new)
    while factor <= largest + 1:
        old, new = (((label + 1) // factor % _BASE) for label in labels)
        bound = {
            cache.state.node: old.to(cache.state.node.meta["val"].dtype),
            cache.new: new.to(cache.new.meta["val"].dtype).reshape(shape),
        }
        result = result + _run(steps, cache, node, past, bound).long() * factor
        factor *= _BASE
    return result


def _along(labels: Tensor, cache: Cache, node: fx.Node) -> _Origin:
    axes = [axis for axis in range(labels.dim()) if bool((labels != labels.narrow(axis, 0, 1)).any())]
    if len(axes) > 1:
        raise refusal(node, f"'{node.name}' rearranges the cache '{cache.state.name}'")
    index = [slice(None) if axis in axes else 0 for axis in range(labels.dim())]
    return _Origin(axes[0] if axes else None, labels[tuple(index)].reshape(-1).tolist())


def _run(steps: Steps, cache: Cache, node: fx.Node, past: int, bound: dict[fx.Node, Tensor]) -> Tensor:
    try:
        (value,) = steps.values([node], past, bound=bound)
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        what = f"the cache '{cache.state.name}' cannot take a token after {past} others: {reason}"
        raise refusal(node, what) from error
    result: Tensor = value
    return result

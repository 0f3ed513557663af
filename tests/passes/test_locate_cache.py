"""Caches of every spelling go, with equal numbers; what is no cache, or not proved to be one, is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import lethe_compile as lethe
from lethe_compile.capture import capture
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.locate_cache import LocateCache
from lethe_compile.passes.program import Mask
from tests.passes.step_toy import (
    SLOTS,
    Counting,
    Keep,
    Measured,
    Past,
    StepToy,
    causal,
    exported,
    index_copied,
    joined,
    sliding,
)
from tests.passes.toy import HEAD_DIM, KV_HEADS, VOCABULARY, WIDTH

IDS = torch.randint(VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(23).expand(2, -1)


# --------------------------------------------------------------------------------------------------- kinds of caches


def index_put(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    cache = toy.get_buffer(name)
    cache[:, :, at] = new
    return cache


def tokens_first(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """[rows, slots, heads, size]."""
    cache = toy.get_buffer(name)
    cache[:, at] = new.transpose(1, 2)
    return cache.transpose(1, 2)


def chosen(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """No index: a slot is where its number is the token's."""
    cache = toy.get_buffer(name)
    here = (torch.arange(SLOTS) == at)[:, None]
    cache.copy_(torch.where(here, new, cache))
    return cache


def functional(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    cache = toy.get_buffer(name)
    full = torch.index_copy(cache, 2, at, new)
    cache.copy_(full)
    return full


def half(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """Kept in bfloat16."""
    cache = toy.get_buffer(name)
    cache.index_copy_(2, at, new.to(torch.bfloat16))
    return cache.to(torch.float32)


def sliced(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    cache = toy.get_buffer(name)
    cache[:, :, at - 1 : at] = new
    return cache


def scattered(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """Read up to the tokens there are."""
    cache = toy.get_buffer(name)
    cache.copy_(torch.slice_scatter(cache, new, 2, at - 1, at))
    return cache[:, :, :at]


def rolled(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    cache = toy.get_buffer(name)
    moved = cache.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = new
    cache.copy_(moved)
    return cache


def pushed(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """The oldest token goes once attention has read it."""
    cache = toy.get_buffer(name)
    full = torch.cat([cache, new], dim=-2)
    cache.copy_(full[:, :, 1:])
    return full


def filled(position: Tensor, slots: int) -> Tensor:
    """Of a rolling cache: the last so many slots as there are tokens."""
    return torch.arange(slots) >= slots - 1 - position[:, None]


def trimmed(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """Only the last eight tokens are kept."""
    assert isinstance(toy, Past)
    full = torch.cat([toy.past[name], new], dim=-2)
    toy.after[name] = full[:, :, -8:]
    return full


class Trimmed(Past):
    """A past that drops the oldest does not tell the position."""

    def forward(self, ids: Tensor, past_keys: Tensor, past_values: Tensor, input_pos: Tensor) -> Any:  # type: ignore[override]
        self.past, self.after = {"keys": past_keys, "values": past_values}, {}
        return self.attend(ids, input_pos), self.after["keys"], self.after["values"]


def everything(position: Tensor, slots: int) -> None:
    return None


def exported_trimmed() -> torch.export.ExportedProgram:
    ids, past = torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, KV_HEADS, 5, HEAD_DIM)
    shapes = (None, {2: Dim.AUTO}, {2: Dim.AUTO}, None)
    arguments = (ids, past, past.clone(), torch.tensor([5]))
    return torch.export.export(Trimmed(trimmed, everything), arguments, dynamic_shapes=shapes, strict=False)


def exported_half() -> torch.export.ExportedProgram:
    toy = StepToy(half)
    for name in ("keys", "values"):
        setattr(toy, name, toy.get_buffer(name).to(torch.bfloat16))
    return exported(toy)


def exported_returned() -> torch.export.ExportedProgram:
    """A cache of fixed size that comes in and goes out."""

    class Returned(Past):
        def forward(self, ids: Tensor, past_keys: Tensor, past_values: Tensor, input_pos: Tensor) -> Any:  # type: ignore[override]
            self.past, self.after = {"keys": past_keys, "values": past_values}, {}
            return self.attend(ids, input_pos), self.after["keys"], self.after["values"]

    def keep(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
        assert isinstance(toy, Past)
        toy.after[name] = toy.past[name].index_copy(2, at, new)
        return toy.after[name]

    ids, cache = torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, KV_HEADS, SLOTS, HEAD_DIM)
    return torch.export.export(Returned(keep), (ids, cache, cache.clone(), torch.tensor([5])), strict=False)


def exported_any_number() -> torch.export.ExportedProgram:
    """Any number of tokens, of any number of rows."""
    ids, past = torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, KV_HEADS, 5, HEAD_DIM)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO})
    return torch.export.export(Past(joined), (ids, past, past.clone()), dynamic_shapes=shapes, strict=False)


def exported_four_rows() -> torch.export.ExportedProgram:
    toy = StepToy(index_copied, shape=(4, KV_HEADS, SLOTS, HEAD_DIM))
    ids = torch.ones(4, 1, dtype=torch.int64)
    return torch.export.export(toy, (ids, torch.zeros(1, dtype=torch.int64)), strict=False)


class Waving(StepToy):
    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        return self.attend(ids, input_pos) * torch.cos(2 * input_pos.float() ** 2 + input_pos * input_pos)


TOKENS_FIRST = (1, SLOTS, KV_HEADS, HEAD_DIM)
SPELLINGS: dict[str, tuple[Callable[[], torch.export.ExportedProgram], str, Mask]] = {
    "index_copy_": (lambda: exported(StepToy(index_copied)), "append", Mask()),
    "index_put_": (lambda: exported(StepToy(index_put)), "append", Mask()),
    "tokens first": (lambda: exported(StepToy(tokens_first, shape=TOKENS_FIRST)), "append", Mask()),
    "where": (lambda: exported(StepToy(chosen)), "append", Mask()),
    "functional": (lambda: exported(StepToy(functional)), "append", Mask()),
    "sliding": (lambda: exported(StepToy(index_copied, sliding)), "append", Mask(9)),
    "bfloat16": (exported_half, "append", Mask()),
    "counter": (lambda: exported(Counting(index_copied)), "append", Mask()),
    "slice": (lambda: exported(Measured(sliced)), "append", Mask()),
    "slice_scatter": (lambda: exported(Measured(scattered)), "append", Mask()),
    "in and out, fixed": (exported_returned, "append", Mask()),
    "four rows": (exported_four_rows, "append", Mask()),
    "positions in a formula": (lambda: exported(Waving(index_copied)), "append", Mask()),
    "roll": (lambda: exported(StepToy(rolled, filled, (1, KV_HEADS, 9, HEAD_DIM))), "shift", Mask(9)),
    "cat, fixed": (lambda: exported(StepToy(pushed, filled, (1, KV_HEADS, 8, HEAD_DIM))), "shift", Mask(9)),
    "cat": (lambda: exported(Past(joined)), "grow", Mask()),
    "cat, sliding": (lambda: exported(Past(joined, sliding)), "grow", Mask(9)),
    "cat, no mask": (lambda: exported(Past(joined, everything)), "grow", Mask()),
    "cat, any number": (exported_any_number, "grow", Mask()),
    "cat, trimmed": (exported_trimmed, "grow", Mask(9)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_cache_goes_and_the_numbers_stay(spelling: str) -> None:
    make, kind, mask = SPELLINGS[spelling]
    captured = capture(make())
    result = LocateCache().run(captured.program)
    (note,) = result.matches
    window = "causal" if mask.window is None else f"sliding, window {mask.window}"
    assert f"gone ({kind}" in note.text
    assert f"the step's mask: {window}, evaluated with " in note.text
    inputs = [str(n.target) for n in result.program.placeholders()]
    assert inputs == ["input_ids", "position_ids"]
    with torch.no_grad():
        logits = result.program.module(IDS, POSITIONS)
    expected = captured.original({"input_ids": IDS})
    tolerance = 1e-2 if spelling == "bfloat16" else 1e-5
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert result.program.longest == (SLOTS if kind == "append" else None)


def test_positions_that_stop_are_no_positions() -> None:
    """Beyond the 50th, a table's last row for every token: told by the constant, not by a few samples."""

    class Clamped(StepToy):
        def attend(self, ids: Tensor, position: Tensor, at: Any = None) -> Tensor:
            return super().attend(ids, position) + self.head(self.table(position.clamp(max=50)))

    captured, ids = capture(exported(Clamped(index_copied))), torch.randint(VOCABULARY, (2, 60))
    with torch.no_grad():
        logits = LocateCache().run(captured.program).program.module(ids, torch.arange(60).expand(2, -1))
    torch.testing.assert_close(logits, captured.original({"input_ids": ids}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", ["index_put_", "roll", "cat", "cat, trimmed", "four rows"])
def test_the_rest_of_the_pipeline_works_on_it(spelling: str) -> None:
    """`optimize` verifies against the step with its own cache; a table of positions limits it further."""
    fast = lethe.optimize(SPELLINGS[spelling][0](), policy="full")
    assert fast.sites[0].mask is not None and fast.sites[0].mask.window == SPELLINGS[spelling][2].window
    assert fast.max_positions == SLOTS
    first, *_ = fast.report().passes
    assert first.name == "locate-cache" and "gone" in first.matches[0].text


def test_attention_written_out() -> None:
    """Products and a softmax, the mask added, keys and values repeated over the query group."""

    class WrittenOut(StepToy):
        def attend(self, ids: Tensor, position: Tensor, at: Any = None) -> Tensor:
            x = self.embedding(ids) + self.table(position)
            heads = self.qkv(x).view(*ids.shape, -1, HEAD_DIM).transpose(1, 2)
            query, *new = heads.split([4, KV_HEADS, KV_HEADS], dim=1)
            key, value = (self.keep(self, n, one, position) for n, one in zip(("keys", "values"), new, strict=True))
            key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
            mask = torch.zeros(SLOTS).masked_fill(torch.arange(SLOTS) > position[:, None], -torch.inf)
            attended = (query @ key.mT * HEAD_DIM**-0.5 + mask).softmax(-1) @ value
            logits: Tensor = self.head(x + self.out(attended.transpose(1, 2).reshape(*ids.shape, WIDTH)))
            return logits

    fast = lethe.optimize(exported(WrittenOut(index_copied)), policy="full")
    assert fast.sites[0].kv_heads == KV_HEADS and fast.sites[0].scale == pytest.approx(HEAD_DIM**-0.5)


def test_heads_that_are_tiled_keep_their_order() -> None:
    class Tiled(StepToy):
        def attend(self, ids: Tensor, position: Tensor, at: Any = None) -> Tensor:
            x = self.embedding(ids) + self.table(position)
            heads = self.qkv(x).view(*ids.shape, -1, HEAD_DIM).transpose(1, 2)
            query, *new = heads.split([4, KV_HEADS, KV_HEADS], dim=1)
            pair = (self.keep(self, n, one, position) for n, one in zip(("keys", "values"), new, strict=True))
            key, value = (one.repeat(1, 2, 1, 1) for one in pair)
            attended = F.scaled_dot_product_attention(query, key, value, self.mask(position, SLOTS))
            logits: Tensor = self.head(x + self.out(attended.transpose(1, 2).reshape(*ids.shape, WIDTH)))
            return logits

    assert lethe.optimize(exported(Tiled(index_copied)), policy="full").sites[0].kv_heads == 4


def test_a_position_may_be_an_integer_and_index_rows_of_a_table() -> None:
    class Llama(StepToy):
        """The idiom of Meta's own Llama."""

        def forward(self, ids: Tensor, start_pos: int) -> Tensor:  # type: ignore[override]
            x = self.embedding(ids) + self.table.weight[start_pos : start_pos + 1]
            heads = self.qkv(x).view(*ids.shape, -1, HEAD_DIM).transpose(1, 2)
            query, *new = heads.split([4, KV_HEADS, KV_HEADS], dim=1)
            key, value = (
                self.keep(self, n, one, start_pos + 1) for n, one in zip(("keys", "values"), new, strict=True)
            )
            attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            logits: Tensor = self.head(x + self.out(attended.transpose(1, 2).reshape(*ids.shape, WIDTH)))
            return logits

    step = torch.export.export(
        Llama(scattered), (torch.ones(1, 1, dtype=torch.int64), 5), dynamic_shapes=(None, Dim.DYNAMIC), strict=False
    )
    for model, example in ((step, None), (Llama(scattered), (torch.ones(1, 1, dtype=torch.int64), 5))):
        assert lethe.optimize(model, policy="full", example_inputs=example).max_positions == SLOTS


# ------------------------------------------------------------------------------------------------------ near misses


def in_front(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    assert isinstance(toy, Past)
    toy.after[name] = torch.cat([new, toy.past[name]], dim=-2)
    return toy.after[name]


def beside(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """A slot too far."""
    return toy.get_buffer(name).index_copy_(2, at + 1, new)


def read_before(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """Attention does not see the newest token."""
    before = toy.get_buffer(name).clone()
    toy.get_buffer(name).index_copy_(2, at, new)
    return before


def twice(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """The past goes out with its own token, and values are read with the keys of that token."""
    assert isinstance(toy, Past)
    toy.after[name] = torch.cat([toy.past[name], new], dim=-2)
    toy.first = new if name == "keys" else toy.first
    return torch.cat([toy.past[name], toy.first], dim=-2)


def turned(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """The token is read with its heads in another order than the past's."""
    assert isinstance(toy, Past)
    toy.after[name] = torch.cat([toy.past[name], new], dim=-2)
    return torch.cat([toy.past[name], new.roll(1, dims=1)], dim=-2)


def fading(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    cache = toy.get_buffer(name)
    cache.copy_((cache * 0.9).index_copy(2, at, new))
    return cache


def overwriting(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """Rotates every token that was there."""
    cache = toy.get_buffer(name)
    cache.copy_(cache.roll(1, dims=1).index_copy(2, at, new))
    return cache


def lost(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    """What goes out is not what was joined."""
    assert isinstance(toy, Past)
    toy.after[name] = new
    return torch.cat([toy.past[name], new], dim=-2)


def keys_only(toy: StepToy, name: str, new: Tensor, at: Any) -> Tensor:
    return index_copied(toy, name, new, at) if name == "keys" else rolled(toy, name, new, at)


def too_far(position: Tensor, slots: int) -> Tensor:
    return torch.arange(slots) <= position[:, None] + 1


def strided(position: Tensor, slots: int) -> Tensor:
    index = torch.arange(slots)
    return (index <= position[:, None]) & ((index % 2 == 0) | (index == position[:, None]))


def biased(position: Tensor, slots: int) -> Tensor:
    return torch.where(torch.arange(slots) <= position[:, None], -0.1 * torch.arange(slots), -torch.inf)


class ReadElsewhere(StepToy):
    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        logits = super().forward(ids, input_pos)
        return logits + self.get_buffer("keys").mean()


class BySizeOfPast(Past):
    def forward(self, ids: Tensor, past_keys: Tensor, past_values: Tensor) -> Any:  # type: ignore[override]
        logits, *after = super().forward(ids, past_keys, past_values)
        return logits * past_keys.shape[2], *after


class Summed(StepToy):
    """Embeds a position by the sum of all rows up to it."""

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        rows = (torch.arange(SLOTS) <= input_pos)[:, None]
        return self.attend(ids, input_pos) + self.head((self.table.weight * rows).sum(0))


class ByTwos(Counting):
    step = 2


class Unknown(StepToy):
    def forward(self, ids: Tensor, temperature: Tensor) -> Tensor:  # type: ignore[override]
        return self.attend(ids, torch.zeros(1, dtype=torch.int64)) / temperature


class IsCausal(StepToy):
    def attend(self, ids: Tensor, position: Tensor, at: Any = None) -> Tensor:
        x = self.embedding(ids)
        query, *new = self.qkv(x).view(1, 1, -1, HEAD_DIM).transpose(1, 2).split([4, 2, 2], dim=1)
        key, value = (self.keep(self, n, one, position) for n, one in zip(("keys", "values"), new, strict=True))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.head(attended.transpose(1, 2).reshape(1, 1, WIDTH))  # type: ignore[no-any-return]


class OtherState(StepToy):
    def __init__(self, keep: Keep) -> None:
        super().__init__(keep)
        self.register_buffer("last", torch.zeros(1, WIDTH), persistent=False)

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embedding(ids)[:, -1]
        logits = self.attend(ids, input_pos) + self.head(self.get_buffer("last"))
        self.get_buffer("last").copy_(x)
        return logits


def with_temperature() -> torch.export.ExportedProgram:
    arguments = (torch.ones(1, 1, dtype=torch.int64), torch.ones(1))
    return torch.export.export(Unknown(index_copied), arguments, strict=False)


def of_three() -> torch.export.ExportedProgram:
    return torch.export.export(
        StepToy(index_copied), (torch.ones(1, 3, dtype=torch.int64), torch.arange(3)), strict=False
    )


def of_a_fixed_past() -> torch.export.ExportedProgram:
    past = torch.zeros(1, KV_HEADS, 5, HEAD_DIM)
    return torch.export.export(Past(joined), (torch.ones(1, 1, dtype=torch.int64), past, past.clone()), strict=False)


NEAR_MISSES: dict[str, tuple[Callable[[], torch.export.ExportedProgram], str]] = {
    "cat in front": (lambda: exported(Past(in_front)), "goes to slot 0, not 1, of the cache 'past_keys'"),
    "a slot too far": (lambda: exported(StepToy(beside)), "goes to slot 1, not 0, of the cache 'keys'"),
    "the newest unseen": (lambda: exported(StepToy(read_before)), "is not the cache 'keys' with the new token"),
    "past used twice": (lambda: exported(Past(twice)), "joins the cache 'past_values' with more than the token"),
    "turned": (lambda: exported(Past(turned)), "rearranges the cache 'past_keys'"),
    "fading": (lambda: exported(StepToy(fading)), "what becomes of the cache 'keys' is not what it was"),
    "overwriting": (lambda: exported(StepToy(overwriting)), "rearranges the cache 'keys'"),
    "not returned": (lambda: exported(Past(lost)), "'past_keys' looks like a cache, and none of its outputs is that"),
    "kept differently": (lambda: exported(StepToy(keys_only)), "keys and values are kept differently"),
    "read elsewhere": (lambda: exported(ReadElsewhere(index_copied)), "'keys' is read by 'mean'.*no attention"),
    "scaled by the past": (lambda: exported(BySizeOfPast(joined)), "'past_keys' is used for more than a cache"),
    "positions summed": (lambda: exported(Summed(index_copied)), "works for one token alone|treat each row by itself"),
    "counted by twos": (lambda: exported(ByTwos(index_copied)), "the counter 'seen' becomes 2 in the step after 0"),
    "slots without a token": (lambda: exported(StepToy(index_copied, everything)), "sees slot 1 of 'keys', which"),
    "sees too far": (lambda: exported(StepToy(index_copied, too_far)), "a token sees slot 1 of 'keys'"),
    "strided": (lambda: exported(StepToy(index_copied, strided)), "does not see that at position 1"),
    "biased": (lambda: exported(StepToy(index_copied, biased)), "an additive bias"),
    "is_causal": (lambda: exported(IsCausal(index_copied)), "shows a new token the oldest key alone"),
    "other state": (lambda: exported(OtherState(index_copied)), "writes 'last' .*which is no cache"),
    "unknown input": (with_temperature, "the input 'temperature' .* has no known role in a decode step"),
    "three tokens": (of_three, "takes 3 tokens at a time"),
    "fixed past": (of_a_fixed_past, "is a past of .* that cannot grow"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_refused_with_its_reason(name: str) -> None:
    make, reason = NEAR_MISSES[name]
    step = make()
    with pytest.raises(UnsupportedGraphError, match=reason) as refused:
        LocateCache().run(capture(step).program)
    assert refused.value.node is not None


def test_the_original_keeps_its_state() -> None:
    toy = StepToy(index_copied)
    nn.init.normal_(toy.get_buffer("keys"))
    before = toy.get_buffer("keys").clone()
    captured = capture(toy)
    captured.original({"input_ids": IDS})
    assert torch.equal(toy.get_buffer("keys"), before)


def test_a_graph_without_a_cache_stays_as_it_is() -> None:
    from lethe_compile.models.plain_decoder import plain

    program = capture(plain()).program
    result = LocateCache().run(program)
    assert result.program is program and result.matches == ()


def test_masks_of_padding_hide_it() -> None:
    """A mask of all tokens so far, left-padded, shows the band and hides the padding; else it is refused."""

    class Padded(Measured):
        right = True

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            total = attention_mask.shape[1]
            real = attention_mask.bool()[0]
            position = torch.arange(total - ids.shape[1], total)
            self.mask = lambda at, slots: causal(at, slots) & (real if self.right else real.flip(0))
            return self.attend(ids, position, total)

    step = capture(exported(Padded(scattered)))
    assert len(LocateCache().run(step.program).matches) == 1
    Padded.right = False
    with pytest.raises(UnsupportedGraphError, match="its mask is not"):
        LocateCache().run(capture(exported(Padded(scattered))).program)

"""Ordered compaction against a plain loop over rows and slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lethe_compile.kernels.compact import reference


def random_state(
    seed: int, lengths: list[int], page: int, heads: int, k_dim: int, v_dim: int, *, head_major: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A pool whose rows hold `lengths` tokens on scattered pages; every slot that holds none is NaN or garbage."""
    generator = torch.Generator().manual_seed(seed)
    held = [-(-n // page) for n in lengths]
    pages, width = sum(held) + 3, max([1, *held]) + 1
    ids = torch.randperm(pages, generator=generator)
    table = torch.zeros(len(lengths), width, dtype=torch.int32)
    k_shape, v_shape = (
        (heads, pages, page, dim) if head_major else (pages, heads, page, dim) for dim in (k_dim, v_dim)
    )
    k_pages, v_pages = torch.full(k_shape, torch.nan), torch.full(v_shape, torch.nan)
    if head_major:
        k_pages, v_pages = k_pages.transpose(0, 1), v_pages.transpose(0, 1)
    position = torch.full((pages, page), -7, dtype=torch.int32)
    mass = torch.full((pages, page), torch.nan)
    for row, n in enumerate(lengths):
        table[row, : held[row]] = ids[sum(held[:row]) : sum(held[: row + 1])].int()
        for slot in range(n):
            at, offset = int(table[row, slot // page]), slot % page
            k_pages[at, :, offset] = torch.randn(heads, k_dim, generator=generator)
            v_pages[at, :, offset] = torch.randn(heads, v_dim, generator=generator)
            position[at, offset], mass[at, offset] = 3 * slot, torch.rand((), generator=generator)
    return k_pages, v_pages, position, mass, table, torch.tensor(lengths, dtype=torch.int32)


def naive(k: Tensor, v: Tensor, position: Tensor, mass: Tensor, table: Tensor, length: Tensor, keep: Tensor) -> Tensor:
    """One slot after the other, in order."""
    page, kept = position.shape[1], []
    for row in range(len(table)):
        to = 0
        for slot in range(int(length[row])):
            if keep[row, slot]:
                source, target = (int(table[row, slot // page]), slot % page), (int(table[row, to // page]), to % page)
                for pages in (k, v):
                    pages[target[0], :, target[1]] = pages[source[0], :, source[1]].clone()
                position[target], mass[target] = position[source].clone(), mass[source].clone()
                to += 1
        kept.append(to)
    return torch.tensor(kept, dtype=torch.int32)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    page=st.sampled_from([1, 2, 4, 8]),
    density=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    spare=st.integers(0, 5),
    head_major=st.booleans(),
    chunk_bytes=st.sampled_from([1, 100, 1 << 24]),
)
@settings(max_examples=120, deadline=None)
def test_matches_a_loop_over_slots(
    seed: int, lengths: list[int], page: int, density: float, spare: int, head_major: bool, chunk_bytes: int
) -> None:
    state = random_state(seed, lengths, page, heads=2, k_dim=3, v_dim=5, head_major=head_major)
    width = max(lengths) + spare
    keep = torch.rand(len(lengths), width, generator=torch.Generator().manual_seed(seed)) < density  # beyond length too
    expected = tuple(tensor.clone() for tensor in state)
    expected_length = naive(*expected, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_CHUNK_BYTES", chunk_bytes)
        length = reference.compact(*state, keep)
    assert length.dtype == torch.int32
    assert_same((*state, length), (*expected, expected_length))


def test_rows_that_keep_everything_are_not_written() -> None:
    state = random_state(0, [9, 0, 16], 4, heads=2, k_dim=4, v_dim=4, head_major=False)
    before, versions = tuple(tensor.clone() for tensor in state), [tensor._version for tensor in state[:2]]
    keep = torch.arange(16) < state[5][:, None]
    assert reference.compact(*state, keep).tolist() == [9, 0, 16]
    assert_same(state, before)
    assert [tensor._version for tensor in state[:2]] == versions


def test_works_in_bfloat16_with_a_long_row() -> None:
    k, v, position, mass, table, length = random_state(1, [700, 3], 16, heads=1, k_dim=2, v_dim=2, head_major=True)
    keep = torch.zeros(2, 700, dtype=torch.bool)
    keep[0, 1::2] = True
    new = reference.compact(k.bfloat16(), v.bfloat16(), position, mass, table, length, keep)
    assert new.tolist() == [350, 0]
    slots = torch.arange(350)
    assert position[table[0, slots // 16].long(), slots % 16].tolist() == list(range(3, 2100, 6))


def test_keys_that_hold_the_values_move_alone() -> None:
    state = random_state(0, [20, 7], 4, 1, 6, 4, head_major=True)
    keep = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = [tensor.clone() for tensor in state]
    lengths = reference.compact(*expected, keep)
    actual = [tensor.clone() for tensor in state]
    assert reference.compact(actual[0], None, *actual[2:], keep).tolist() == lengths.tolist()
    assert_same((actual[0], *actual[2:]), (expected[0], *expected[2:]))

"""The GPU's compaction against the reference, bit for bit: through the interpreter, on a GPU, and its resources."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lethe_compile.kernels.compact import reference
from tests.kernels.interpret import run_interpreted

triton = pytest.importorskip("lethe_compile.kernels.compact.triton", reason="Triton is for Linux only")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pool(
    seed: int, lengths: list[int], page: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random bits in every slot, NaN among them, on pages scattered over a pool with a few more."""
    generator = torch.Generator(device).manual_seed(seed)
    held = torch.tensor([-(-n // page) for n in lengths], device=device)
    pages, width = int(held.sum()) + 3, max(1, int(held.max())) + 1
    wide = {"device": device, "generator": generator}
    k_pages = torch.randn(pages, heads, page, dims[0], **wide).to(dtype)
    v_pages = torch.randn(heads, pages, page, dims[1], **wide).to(dtype).transpose(0, 1)
    k_pages[torch.rand(k_pages.shape, **wide) < 0.05] = torch.nan
    position = torch.randint(0, 10**6, (pages, page), **wide).int()
    mass = torch.rand(pages, page, **wide).masked_fill(torch.rand(pages, page, **wide) < 0.05, torch.nan)
    table = torch.zeros(len(lengths), width, dtype=torch.int32, device=device)
    owned = torch.arange(width, device=device) < held[:, None]
    table[owned] = torch.randperm(pages, **wide)[: int(held.sum())].int()
    return k_pages, v_pages, position, mass, table, torch.tensor(lengths, dtype=torch.int32, device=device)


def assert_same(state: tuple[Tensor | None, ...], keep: Tensor) -> None:
    """The same lengths, and the same bits in every slot, those behind the kept ones included."""
    expected = tuple(None if tensor is None else tensor.clone() for tensor in state)
    lengths = reference.compact(*expected, keep)
    actual = triton.compact(*state, keep)
    assert actual.dtype == torch.int32 and actual.tolist() == lengths.tolist()
    for got, want in zip(state, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def chosen(state: tuple[Tensor, ...], density: float, head: float, width: int, seed: int) -> Tensor:
    """keep [rows, width]: the first `head` of each row, and the rest with probability `density`; more beyond it."""
    generator = torch.Generator(state[0].device).manual_seed(seed)
    length = state[5][:, None]
    keep = torch.rand(len(length), width, generator=generator, device=length.device) < density
    return keep | (torch.arange(width, device=length.device) < length * head)


@pytest.mark.interpreted
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    page=st.sampled_from([1, 4, 8, 32]),
    heads=st.integers(1, 2),
    dims=st.sampled_from([(4, 4), (3, 5), (24, 16)]),
    dtype=st.sampled_from(sorted(DTYPES)),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    head=st.sampled_from([0.0, 0.5]),
    spare=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_reference(
    seed: int,
    lengths: list[int],
    page: int,
    heads: int,
    dims: tuple[int, int],
    dtype: str,
    density: float,
    head: float,
    spare: int,
) -> None:
    """Small tiles make these rows several blocks long."""
    state = pool(seed, lengths, page, heads, dims, DTYPES[dtype])
    keep = chosen(state, density, head, max(1, *lengths) + spare, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_TILE", 64)
        patch.setattr(triton, "_SCAN", 16)
        assert_same(state, keep)


@pytest.mark.interpreted
def test_keys_that_hold_the_values_move_alone() -> None:
    state = pool(0, [20, 7], 4, 2, (6, 4), torch.float32)
    keep = chosen(state, 0.5, 0.2, 20, 1)
    assert_same((state[0], None, *state[2:]), keep)


def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(
    ("rows", "longest", "page", "heads", "dims"),
    [
        (512, 1500, 8, 2, (128, 128)),
        (64, 20_000, 16, 1, (64, 64)),
        (40, 900, 256, 3, (80, 72)),
        (8, 700, 1, 1, (576, 512)),
    ],
)
def test_equals_the_reference_on_a_gpu(
    rows: int, longest: int, page: int, heads: int, dims: tuple[int, int], dtype: str
) -> None:
    lengths = torch.randint(0, longest + 1, (rows,), generator=torch.Generator().manual_seed(7)).tolist()
    for density, head in ((0.3, 0.0), (0.95, 0.5), (0.0, 0.0), (1.0, 0.0)):
        state = pool(3, lengths, page, heads, dims, DTYPES[dtype], "cuda")
        again = tuple(tensor.clone() for tensor in state)
        keep = chosen(state, density, head, longest, seed=1)
        assert_same(state, keep)
        triton.compact(*again, keep)
        for first, second in zip(state, again, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    page, dim = 256, 128
    pages = (1 << 31) // (page * dim) + 8  # elements beyond 2**31
    k_pages = torch.zeros(pages, 1, page, dim, dtype=torch.bfloat16, device="cuda")
    v_pages = k_pages.clone()
    position = torch.arange(pages * page, device="cuda", dtype=torch.int32).view(pages, page)
    mass = position.float()
    k_pages[-1, 0, 1], v_pages[-1, 0, 1] = 5.0, 7.0
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device="cuda")
    keep = torch.arange(page, device="cuda")[None] == 1
    length = triton.compact(k_pages, v_pages, position, mass, table, torch.tensor([page], device="cuda"), keep)
    assert length.tolist() == [1]
    assert k_pages[-1, 0, 0].eq(5).all() and v_pages[-1, 0, 0].eq(7).all()
    assert position[-1, 0] == (pages - 1) * page + 1


@pytest.mark.parametrize(
    ("dtype", "page", "k_dim", "v_dim"),
    [("bf16", 8, 128, 128), ("fp16", 16, 80, 72), ("fp32", 1, 64, 64), ("bf16", 8, 256, 256), ("fp32", 64, 576, 512)],
)
def test_compiles_for_hopper_without_spilling(dtype: str, page: int, k_dim: int, v_dim: int, tmp_path: Path) -> None:
    from triton import next_power_of_2

    from tests.kernels.resources import resources

    wide = next_power_of_2(k_dim), next_power_of_2(v_dim)
    arguments = {
        **dict.fromkeys(("k_pages", "v_pages"), f"*{dtype}"),
        **dict.fromkeys(("position", "table", "lengths", "kept_lengths"), "*i32"),
        **dict.fromkeys(("width", "n", "k_page", "k_head", "k_slot", "v_page", "v_head", "v_slot"), "i32"),
        **{"mass": "*fp32", "keep": "*i8", "HEADS": 8, "PAGE": page, "K_DIM": k_dim, "V_DIM": v_dim},
        **{"K_WIDE": wide[0], "V_WIDE": wide[1], "K_BLOCK": triton._block(wide[0]), "V_BLOCK": triton._block(wide[1])},
        "SCAN": triton._SCAN,
    }
    used = resources(triton._compact, arguments, tmp_path)
    print(used)
    assert used.spilled == 0
    assert used.registers <= 128, "four blocks of 4 warps must fit on a multiprocessor"

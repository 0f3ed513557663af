"""The GPU's selection against the reference, bit for bit: through the interpreter, on a GPU, and its resources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lethe_compile.kernels.select import reference
from tests.kernels.interpret import run_interpreted

triton = pytest.importorskip("lethe_compile.kernels.select.triton", reason="Triton is for Linux only")

RULES = st.fixed_dictionaries(
    {
        "sparse_ratio": st.sampled_from([1.5, 10.0, 30.0, 400.0, 1e30]),
        "segments": st.sampled_from([2, 3, 16, 100]),
        "sink_tokens": st.sampled_from([0, 1, 4]),
        "recent_ratio": st.sampled_from([0.0, 0.1, 0.3, 0.4, 1.0]),  # products with counts need fp64
        "include_sinks": st.booleans(),
    }
)


def batch(
    seed: int, rows: int, width: int, *, power: float, ties: bool, caps: bool, device: str = "cpu"
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor | None]]:
    """Ragged rows with holes; what lies beyond a row's length, and in holes, is NaN. Then protected_length and cap."""
    generator = torch.Generator(device).manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    mass = torch.rand(rows, width, generator=generator, device=device) ** power * 100
    if ties:
        mass = mass.round()
    length = integers(0, width + 1, rows)
    length[integers(0, rows, 1)] = width
    position = integers(1, 3, rows, width).cumsum(1).int() - integers(1, 3, rows, 1).int()
    hole = integers(0, 8, rows, width) < integers(0, 3, rows, 1) - 1  # in some rows
    beyond = torch.arange(width, device=device) >= length[:, None]
    position = position.masked_fill(hole | beyond, -1)
    mass = mass.masked_fill(position < 0, torch.nan)
    cap = integers(1, width + 5, rows) if caps else None
    return (mass, position, length), {"protected_length": integers(0, width + 1, rows), "cap": cap}


def assert_same(arguments: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
    mass, position, length = arguments
    clean = mass.nan_to_num(0.0), position, length  # the reference sorts what is no token along
    keep, broke = reference.select(*clean, **options)
    actual, actual_broke = triton.select(*arguments, **options)
    assert actual.dtype == actual_broke.dtype == torch.bool
    assert torch.equal(actual_broke, broke)
    assert torch.equal(actual, keep)
    measured, expected = triton.hoyer_sparsity(clean[0], length), reference.hoyer_sparsity(clean[0], length)
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.interpreted
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    width=st.integers(1, 70),
    power=st.sampled_from([0.0, 1.0, 8.0]),
    ties=st.booleans(),
    caps=st.booleans(),
    rule=RULES,
    block=st.sampled_from([16, 128]),
)
@settings(max_examples=120, deadline=None)
def test_equals_the_reference(
    seed: int, rows: int, width: int, power: float, ties: bool, caps: bool, rule: dict[str, Any], block: int
) -> None:
    """A block of 16 makes these rows several blocks long."""
    arguments, options = batch(seed, rows, width, power=power, ties=ties, caps=caps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_SHORT", block)
        patch.setattr(triton, "_LONG", block)
        patch.setattr(triton, "_WARPS", {block: 1})
        assert_same(arguments, {**options, **rule})


@pytest.mark.interpreted
def test_scores_of_any_size_and_sign_of_zero() -> None:
    mass = torch.tensor([[0.0, -0.0, 1e-45, 1e-38, 3e38, 0.0, 1e-45, -0.0]])
    position, length = torch.arange(8, dtype=torch.int32)[None], torch.tensor([8])
    options: dict[str, Any] = {"sink_tokens": 0, "recent_ratio": 0.0, "protected_length": torch.tensor([0])}
    for segments in range(2, 9):
        for cap in (None, 1, 3, 6):
            caps = None if cap is None else torch.tensor([cap])
            rule = {**options, "sparse_ratio": 2.0, "segments": segments, "cap": caps}
            assert_same((mass, position, length), rule)


@pytest.mark.interpreted
def test_nothing_to_select_from() -> None:
    options: dict[str, Any] = {"sparse_ratio": 2.0, "segments": 4, "sink_tokens": 1, "recent_ratio": 0.3}
    for rows, width in ((0, 5), (2, 0)):
        mass, position = torch.zeros(rows, width), torch.zeros(rows, width, dtype=torch.int32)
        none = torch.zeros(rows, dtype=torch.int64)
        keep, broke = triton.select(mass, position, none, protected_length=none, **options)
        assert keep.shape == (rows, width) and broke.shape == (rows,) and not broke.any()


@pytest.mark.slow
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("caps", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(512, 300), (512, 2049), (512, 20_000), (3, 131_072)])
def test_equals_the_reference_on_a_gpu(rows: int, width: int, caps: bool) -> None:
    """Long rows, ties, NaN beyond the lengths; and twice the same bits."""
    for power, ties, ratio in ((8.0, False, 400.0), (3.0, True, 10.0), (0.0, True, 2.0)):
        arguments, options = batch(1, rows, width, power=power, ties=ties, caps=caps, device="cuda")
        rule = {"sparse_ratio": ratio, "segments": 16, "sink_tokens": 4, "recent_ratio": 0.3}
        assert_same(arguments, {**options, **rule})
        first, second = (triton.select(*arguments, **options, **rule)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("block", [triton._SHORT, triton._LONG])
def test_compiles_for_hopper_without_spilling(block: int, capped: bool, tmp_path: Path) -> None:
    from tests.kernels.resources import resources

    arguments = {
        **dict.fromkeys(("mass",), "*fp32"),
        **dict.fromkeys(("position", "keys"), "*i32"),
        **dict.fromkeys(("lengths", "protected_lengths", "caps"), "*i64"),
        **dict.fromkeys(("keep", "broken"), "*i8"),
        **dict.fromkeys(("n", "segments", "sinks"), "i32"),
        **{"ratios": "*fp64", "CAPPED": capped, "INCLUDE_SINKS": False, "BLOCK": block},
    }
    used = resources(triton._select, arguments, tmp_path, num_warps=triton._WARPS[block])
    print(used)
    assert used.spilled == 0
    assert used.registers <= 128, "two blocks of 8 warps must fit on a multiprocessor"


def test_the_measure_compiles_for_hopper(tmp_path: Path) -> None:
    from tests.kernels.resources import resources

    arguments = {"mass": "*fp32", "lengths": "*i64", "sparsity": "*fp32", "n": "i32", "BLOCK": triton._LONG}
    used = resources(triton._hoyer, arguments, tmp_path, num_warps=triton._WARPS[triton._LONG])
    print(used)
    assert used.spilled == 0

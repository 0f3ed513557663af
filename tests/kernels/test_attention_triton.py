"""The GPU's attention kernels against the reference in float64: through the interpreter, on a GPU, and their resources.

Every slot that holds no token is NaN, in all four tensors, and so is what the allocator hands out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lethe_compile.kernels.attention import reference
from tests.kernels.interpret import run_interpreted

decode = pytest.importorskip("lethe_compile.kernels.decode.triton", reason="Triton is for Linux only")
prefill = pytest.importorskip("lethe_compile.kernels.prefill.triton", reason="Triton is for Linux only")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MASS = 3  # its place among the state's tensors
OPTIONS: dict[str, dict[str, Any]] = {
    "bare": {},
    "sum": {"decay": 0.9},
    "peak": {"decay": 0.9, "peak": True},
    "windowed": {"decay": 0.9, "peak": True, "window": 9, "softcap": 3.0, "sinks": True},
    "chunked": {"decay": 0.9, "window": 16, "chunked": True},
    "alibi": {"decay": 0.9, "slopes": True},
    "sloped": {"decay": 0.9, "peak": True, "slopes": True, "window": 9},
    "capped": {"decay": 0.9, "window": 40, "softcap": 2.0, "sinks": True},
}


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    k_dim: int
    v_dim: int
    in_keys: bool = False  # a value is the first v_dim channels of its key, and not stored again


@dataclass
class Case:
    """Operands, and a cache whose rows have lost tokens: positions ascend with gaps."""

    operands: tuple[Tensor, Tensor, Tensor]
    state: list[Tensor]  # k_pages, v_pages, slot_position, slot_mass
    in_keys: bool
    table: Tensor
    length: Tensor
    positions: Tensor
    new: Tensor
    sinks: Tensor  # [sets * heads]
    slopes: Tensor  # [sets * heads]

    def run(self, kernel: Callable[..., Tensor], options: dict[str, Any], double: bool = False) -> tuple[Tensor, Case]:
        """The output of `kernel`, and the case as it leaves it; this one stays as it is."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.double() if double else tensor.clone()

        state = [cast(self.state[0]), cast(self.state[1]), self.state[2].clone(), self.state[MASS].clone()]
        after = replace(self, state=state, length=self.length.clone())
        learned = {name: getattr(self, name) if options.get(name) else None for name in ("sinks", "slopes")}
        options = {**options, **learned, "scale": 0.3}
        pools = [state[0], None if self.in_keys else state[1], *state[2:]]
        tensors = [*map(cast, self.operands), *pools, self.table, after.length, self.positions, self.new]
        return kernel(*tensors, **options), after

    def slots(self, row: int, begin: int = 0) -> tuple[Tensor, Tensor]:
        """Pages and offsets of the row's tokens from `begin` on."""
        slot = torch.arange(begin, int(self.length[row]), device=self.table.device)
        page = self.state[0].shape[2]
        return self.table[row, slot // page].long(), slot % page


def case(
    heads: Heads,
    page: int,
    lengths: list[int],
    new: list[int],
    dtype: torch.dtype,
    device: str = "cpu",
    sets: int = 1,
) -> Case:
    rows, tokens = len(lengths), max(new)
    held = [-(-(n + more) // page) for n, more in zip(lengths, new, strict=True)]
    pages = sum(held) + 3
    order, table = torch.randperm(pages).int(), torch.zeros(rows, max(held) + 1, dtype=torch.int32)
    for row, count in enumerate(held):
        start = sum(held[:row])
        table[row, :count] = order[start : start + count]
    state = [
        torch.full((pages, heads.kv, page, heads.k_dim), torch.nan, dtype=dtype),
        torch.full((pages, heads.kv, page, heads.v_dim), torch.nan, dtype=dtype),
        torch.full((pages, page), -7, dtype=torch.int32),
        torch.full((pages, page), torch.nan),
    ]
    for row, count in enumerate(lengths):
        slot = torch.arange(count)
        at, offset = table[row, slot // page].long(), slot % page
        state[0][at, :, offset] = torch.randn(count, heads.kv, heads.k_dim).to(dtype) * 2
        state[1][at, :, offset] = torch.randn(count, heads.kv, heads.v_dim).to(dtype)
        state[2][at, offset] = torch.randperm(2 * count + 1)[:count].sort().values.int()
        state[3][at, offset] = torch.rand(count) * 0.1
    length = torch.tensor(lengths, dtype=torch.int32)
    positions = (2 * length.long() + 5)[:, None] + torch.arange(tokens)
    operands = (
        torch.randn(rows, heads.query, tokens, heads.k_dim).to(dtype),
        torch.randn(rows, heads.kv, tokens, heads.k_dim).to(dtype) * 2,
        torch.randn(rows, tokens, heads.kv, heads.v_dim).to(dtype).transpose(1, 2),  # strided, as a model's are
    )
    if heads.in_keys:
        operands = (*operands[:2], operands[1][..., : heads.v_dim])
    per_head = torch.randn(sets * heads.query), torch.rand(sets * heads.query) * 0.2
    whole = Case(
        operands, state, heads.in_keys, table, length, positions, torch.tensor(new, dtype=torch.int32), *per_head
    )
    for name, value in vars(whole).items():
        if not isinstance(value, bool):
            moved = value.to(device) if isinstance(value, Tensor) else type(value)(one.to(device) for one in value)
            setattr(whole, name, moved)
    return whole


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative; infinite where either is NaN."""
    difference = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    return difference if difference == difference else float("inf")  # noqa: PLR0124  (NaN)


def assert_agrees(kernel: Callable[..., Tensor], given: Case, options: dict[str, Any]) -> None:
    """Output, stored keys and values, positions, scores, and lengths, against the reference in float64."""
    dtype = given.operands[0].dtype
    expected, want = given.run(reference.attention, options, double=True)
    actual, got = given.run(kernel, options)
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert error(actual, expected) < TOLERANCE[dtype]
    idle = given.new == 0
    assert not actual[idle].any(), "a row that takes no part gives zeros"
    assert got.length.tolist() == want.length.tolist()
    for row in range(len(given.length)):
        at = want.slots(row)
        for index in (0,) if given.in_keys else (0, 1):
            assert torch.equal(got.state[index][at[0], :, at[1]].double(), want.state[index][at[0], :, at[1]])
        assert torch.equal(got.state[2][at], want.state[2][at])
        if options.get("decay") is not None and len(at[0]):
            assert error(got.state[MASS][at], want.state[MASS][at]) < TOLERANCE[dtype]


LATENT = [Heads(6, 1, 24, 16, True), Heads(10, 2, 40, 40, True), Heads(5, 1, 20, 9, True)]
SHAPES = [Heads(4, 2, 16, 16), Heads(6, 2, 24, 40), Heads(7, 1, 16, 8)]


@pytest.mark.interpreted
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("heads", "page"), zip(SHAPES, (4, 16, 64), strict=True), ids=str)
def test_decode(heads: Heads, page: int, options: dict[str, Any]) -> None:
    assert_agrees(decode.attention, case(heads, page, [33, 0, 81], [1, 1, 1], torch.float32), options)


@pytest.mark.interpreted
@pytest.mark.slow
@pytest.mark.parametrize("page", [4, 16, 64])
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_decode_on_pages_of_any_size(heads: Heads, page: int) -> None:
    assert_agrees(decode.attention, case(heads, page, [33, 0, 81], [1, 1, 1], torch.float32), OPTIONS["peak"])


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.slow
def test_decode_in_half_precision(dtype: torch.dtype) -> None:
    for options in OPTIONS.values():
        assert_agrees(decode.attention, case(SHAPES[1], 16, [70, 5, 16], [1, 0, 1], dtype), options)


@pytest.mark.interpreted
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.slow
def test_decode_of_blocks_loaded_in_bulk(options: dict[str, Any]) -> None:
    """Full blocks come through descriptors, the last one, which NaN follows, does not."""
    kernel = partial(decode.attention, tune=decode.Tuning(16, programs=1, warps=4, stages=2, bulk=True))
    assert_agrees(kernel, case(SHAPES[1], 32, [33, 0, 64], [1, 1, 1], torch.float32), options)


@pytest.mark.interpreted
def test_decode_of_halves_loaded_in_bulk() -> None:
    kernel = partial(decode.attention, tune=decode.Tuning(16, programs=1, warps=4, stages=2, bulk=True))
    for heads, page, dtype in zip(SHAPES, (64, 16, 32), (torch.bfloat16, torch.float16, torch.bfloat16), strict=True):
        assert_agrees(kernel, case(heads, page, [33, 50], [1, 1], dtype), OPTIONS["peak"])


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("heads", "page", "options"), zip(LATENT, (4, 16, 64), ("windowed", "sum", "alibi"), strict=True)
)
def test_values_in_keys(heads: Heads, page: int, options: str) -> None:
    assert_agrees(decode.attention, case(heads, page, [19, 0, 35], [1, 1, 0], torch.float32), OPTIONS[options])
    assert_agrees(prefill.attention, case(heads, page, [0, 9, 20], [20, 0, 7], torch.float32), OPTIONS[options])


@pytest.mark.interpreted
@pytest.mark.slow
def test_values_in_keys_in_half_precision() -> None:
    assert_agrees(decode.attention, case(LATENT[0], 16, [20, 5], [1, 0], torch.bfloat16), OPTIONS["peak"])
    assert_agrees(prefill.attention, case(LATENT[0], 16, [0, 9], [12, 0], torch.bfloat16), OPTIONS["sum"])


@pytest.mark.interpreted
@pytest.mark.slow
@pytest.mark.parametrize("in_keys", [True, False])
def test_query_heads_in_tiles(in_keys: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a program holds, here 16: 40 heads over one KV head, and over two."""
    monkeypatch.setattr(decode, "_SUMS", 16)
    for kv, options in ((1, "windowed"), (2, "sum")):
        assert decode._tiles(40 // kv, 16, 4) == (4 if kv == 1 else 2)
        given = case(Heads(40, kv, 24, 16, in_keys), 16, [20, 0, 50], [1, 1, 1], torch.float32)
        assert_agrees(decode.attention, given, OPTIONS[options])


@pytest.mark.interpreted
def test_decode_of_rows_that_share_programs() -> None:
    """More items than programs, and items that several programs share."""
    assert_agrees(decode.attention, case(SHAPES[0], 16, [3] * 9, [1] * 9, torch.float32), OPTIONS["peak"])
    assert_agrees(decode.attention, case(SHAPES[2], 64, [900, 1], [1, 1], torch.float32), OPTIONS["sum"])


@pytest.mark.interpreted
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "lengths", [pytest.param([0, 0, 0], id="prefill", marks=pytest.mark.slow), pytest.param([0, 9, 50], id="extension")]
)
def test_prefill(lengths: list[int], options: dict[str, Any]) -> None:
    for heads, page in zip(SHAPES, (4, 16, 64), strict=True):
        assert_agrees(prefill.attention, case(heads, page, lengths, [70, 0, 33], torch.float32), options)


@pytest.mark.interpreted
@pytest.mark.parametrize("options", ["peak", "windowed", "sloped"])
def test_kv_heads_as_rows(options: str) -> None:
    """Two sequences of three KV heads, each a row with tokens, sinks and slopes of its own."""
    for kernel, new in ((decode.attention, [1] * 6), (prefill.attention, [9, 9, 9, 4, 4, 4])):
        given = case(Heads(2, 1, 16, 24), 4, [33, 5, 12, 0, 17, 8], new, torch.float32, sets=3)
        assert_agrees(kernel, given, OPTIONS[options])


@pytest.mark.slow
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


BIG = [Heads(32, 8, 128, 128), Heads(14, 2, 80, 80), Heads(8, 8, 96, 64), Heads(16, 1, 256, 256), Heads(28, 4, 112, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", BIG, ids=str)
def test_gpu_decode(heads: Heads, dtype: torch.dtype) -> None:
    for page, options in zip((16, 64, 64, 256, 16, 64, 32, 64), OPTIONS.values(), strict=True):
        given = case(heads, page, [1500, 0, 3, 640, 64], [1, 1, 0, 1, 1], dtype, "cuda")
        assert_agrees(decode.attention, given, options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", BIG, ids=str)
def test_gpu_prefill(heads: Heads, dtype: torch.dtype) -> None:
    for page, options in zip((16, 64, 64, 256, 16, 64, 32, 64), OPTIONS.values(), strict=True):
        assert_agrees(prefill.attention, case(heads, page, [0, 300, 77], [333, 0, 128], dtype, "cuda"), options)


MLA = [Heads(128, 1, 576, 512, True), Heads(16, 1, 576, 512, True), Heads(40, 1, 288, 256, True)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", MLA, ids=str)
def test_gpu_latent(heads: Heads, dtype: torch.dtype) -> None:
    """The shapes of DeepSeek V3, DeepSeek V2 Lite and MiniCPM3."""
    for page, options in zip((16, 64, 64, 256, 16, 64, 32, 64), OPTIONS.values(), strict=True):
        given = case(heads, page, [1500, 0, 3, 640, 64], [1, 1, 0, 1, 1], dtype, "cuda")
        assert_agrees(decode.attention, given, options)
        assert_agrees(prefill.attention, case(heads, page, [0, 300, 77], [333, 0, 128], dtype, "cuda"), options)


@pytest.mark.gpu
def test_gpu_latent_bits_repeat() -> None:
    given = case(MLA[0], 64, [5000, 17, 900], [1, 1, 1], torch.bfloat16, "cuda")
    runs = [given.run(decode.attention, {"decay": 0.9, "peak": True}) for _ in range(10)]
    for out, after in runs[1:]:
        assert torch.equal(out, runs[0][0])
        for row in range(3):
            assert torch.equal(after.state[MASS][after.slots(row)], runs[0][1].state[MASS][after.slots(row)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gpu_kv_heads_as_rows(dtype: torch.dtype) -> None:
    """Four sequences of eight KV heads, each a row with tokens, sinks and slopes of its own."""
    lengths = [(37 * row) % 900 for row in range(32)]
    for options in OPTIONS.values():
        given = case(Heads(4, 1, 128, 128), 64, lengths, [1] * 32, dtype, "cuda", sets=8)
        assert_agrees(decode.attention, given, options)
        given = case(Heads(4, 1, 128, 128), 16, lengths, [70 + row // 8 for row in range(32)], dtype, "cuda", sets=8)
        assert_agrees(prefill.attention, given, options)


@pytest.mark.gpu
def test_gpu_decode_of_131072_tokens() -> None:
    given = case(BIG[0], 64, [131_072, 1], [1, 1], torch.bfloat16, "cuda")
    assert_agrees(decode.attention, given, {"decay": 0.9})


@pytest.mark.gpu
def test_gpu_mass_is_conserved() -> None:
    """Each query gives each head a probability of one."""
    for kernel, tokens in ((decode.attention, 1), (prefill.attention, 200)):
        given = case(BIG[0], 64, [1000, 500], [tokens, tokens], torch.bfloat16, "cuda")
        for row in range(2):
            given.state[MASS][given.slots(row)] = 0
        _, after = given.run(kernel, {"decay": 0.5})
        for row in range(2):
            assert float(after.state[MASS][after.slots(row)].sum()) == pytest.approx(32 * tokens, rel=1e-3)


@pytest.mark.gpu
def test_gpu_sets_l2_aside() -> None:
    from lethe_compile.kernels.decode.l2 import set_aside

    device = torch.zeros(1, device="cuda").device
    assert 0 < set_aside(device) <= torch.cuda.get_device_properties(device).L2_cache_size


@pytest.mark.gpu
def test_gpu_bits_repeat() -> None:
    given = case(BIG[0], 64, [5000, 17, 900], [1, 1, 1], torch.bfloat16, "cuda")
    runs = [given.run(decode.attention, {"decay": 0.9}) for _ in range(20)]
    for out, after in runs[1:]:
        assert torch.equal(out, runs[0][0])
        for row in range(3):
            assert torch.equal(after.state[MASS][after.slots(row)], runs[0][1].state[MASS][after.slots(row)])


def test_blocks_are_powers_of_two_whatever_the_dimensions() -> None:
    """And they are no larger than a page, or whole pages."""
    for k_dim, v_dim in product(range(16, 577, 16), repeat=2):
        for itemsize, page in product((2, 4), (16, 32, 64, 128, 256)):
            block = decode.tuning(k_dim, v_dim, itemsize, page).block
            assert block >= 16 and block & (block - 1) == 0, (k_dim, v_dim, itemsize, page, block)
            assert page % block == 0 or block % page == 0


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("dim", "group", "page"), [(64, 4, 64), (128, 4, 64), (128, 8, 16), (80, 7, 16), (256, 1, 64)])
def test_decode_on_hopper(dtype: str, dim: int, group: int, page: int, tmp_path: Path) -> None:
    """It compiles for sm_90 without spilling, and its blocks in flight fit."""
    tune = decode.tuning(dim, dim, 4 if dtype == "fp32" else 2, page)
    used = decode_resources(dtype, Heads(8 * group, 8, dim, dim), page, tune, tmp_path)
    # A few registers: in a precision no one serves in, and for small pages, where fewer warps are faster all the same.
    assert used.spilled <= (24 if dtype == "fp32" else 16 if page < 64 else 0), used
    assert used.shared * tune.programs <= 227 * 1024, used


@pytest.mark.parametrize(("heads", "spilled"), [*zip(MLA, (640, 64, 16), strict=True)], ids=str)
def test_decode_of_latents_on_hopper(heads: Heads, spilled: int, tmp_path: Path) -> None:
    """Its blocks fit. Sums of 64 heads and 512 channels take half of all registers: what spills is what is around the
    loop over blocks, but for some addresses (24 of its 1,284 instructions)."""
    group = heads.query // decode._tiles(heads.query, heads.v_dim, 2)
    tune = decode.tuning(heads.k_dim, heads.v_dim, 2, 64, group=group, in_keys=True)
    used = decode_resources("bf16", heads, 64, tune, tmp_path)
    assert used.spilled <= spilled, used
    assert used.shared * tune.programs <= 227 * 1024, used


@pytest.mark.parametrize("heads", MLA[::2], ids=str)
@pytest.mark.parametrize("name", ["_append", "_forward", "_score"])
def test_prefill_of_latents_on_hopper(heads: Heads, name: str, tmp_path: Path) -> None:
    from tests.kernels.resources import resources

    rest, block_v = heads.k_dim - heads.v_dim, decode._padded(heads.v_dim)
    tune, kernel = prefill.tuning(block_v, 2, in_keys=True), getattr(prefill, name)
    types = dict.fromkeys(("query", "key", "value", "k_pages", "v_pages", "out"), "*bf16") | {"positions": "*i64"}
    types |= dict.fromkeys(("lse", "seen", "sinks", "slopes"), "*fp32")
    types |= dict.fromkeys(("slot_position", "page_table", "length", "new_lengths"), "*i32")
    values = {"SCALE": 0.1, "SOFTCAP": None, "WINDOW": None, "CHUNKED": False, "SLOPES": False, "SINKS": False}
    values |= {
        "HEADS": heads.query,
        "GROUP": heads.query,
        "KV_HEADS": 1,
        "PEAK": True,
        "PAGE": 64,
        "TOKENS": 8,
        "SETS": 1,
    }
    values |= {"K_DIM": heads.k_dim, "V_DIM": heads.v_dim, "IN_KEYS": True, "REST": rest, "UPCAST": False}
    values |= {"M": tune.m, "BLOCK": tune.block, "STAGES": tune.stages, "BLOCK_V": block_v}
    values |= {
        "BLOCK_K": decode._padded(heads.k_dim) if name == "_append" else block_v,
        "BLOCK_R": decode._padded(rest),
    }
    names = [p.name for p in kernel.params]
    arguments = {n: values[n] if n in values else types.get(n, "i32") for n in names}
    strides = [n for n in names if arguments[n] == "i32" and n not in ("tokens", "position_row")]
    launch = {} if name == "_append" else {"num_warps": tune.warps, "num_stages": tune.stages}
    used = resources(kernel, arguments, tmp_path, multiples=strides, **launch)
    assert used.spilled == 0 and used.shared <= 227 * 1024, used


def decode_resources(dtype: str, heads: Heads, page: int, tune: Any, tmp_path: Path) -> Any:
    """What `_attend` takes on a Hopper GPU with its options off, and scoring on."""
    from tests.kernels.resources import resources

    itemsize = 4 if dtype == "fp32" else 2
    tiles = decode._tiles(heads.query // heads.kv, heads.v_dim, itemsize)
    group = heads.query // heads.kv // tiles
    block_v, rest = decode._padded(heads.v_dim), heads.k_dim - heads.v_dim if heads.in_keys else 0
    block_k = block_v if heads.in_keys else decode._padded(heads.k_dim)
    floats = ("block_max", "lse", "part_out", "part_stat")
    ints = ("slot_position", "page_table", "length", "new_lengths", "counter")
    types = dict.fromkeys(("query", "key", "value", "k_pages", "v_pages", "out"), f"*{dtype}")
    types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(ints, "*i32") | {"positions": "*i64"}
    types["weight"] = "*fp32" if dtype == "fp32" else "*fp16"
    bulk = tune.bulk and page % tune.block == 0
    descriptor = f"tensordesc<{dtype}[{tune.block}, {block_k}]>"
    types |= dict.fromkeys(("k_rows", "v_rows"), descriptor if bulk else f"*{dtype}")
    scalars = [
        p.name for p in decode._attend.params if not p.is_constexpr and p.name not in (*types, "sinks", "slopes")
    ]
    arguments: dict[str, Any] = {**types, **dict.fromkeys(scalars, "i32"), "sinks": "*fp32", "slopes": "*fp32"}
    arguments |= {"SCALE": 0.1, "SOFTCAP": None, "WINDOW": None, "CHUNKED": False, "SLOPES": False, "SINKS": False}
    arguments |= {"SCORED": True, "KV_HEADS": heads.kv * tiles, "TILES": tiles, "SETS": 1, "GROUP": group, "PAGE": page}
    arguments |= {"K_DIM": heads.k_dim, "V_DIM": heads.v_dim, "IN_KEYS": heads.in_keys, "ROWS": 16, "BLOCK": tune.block}
    arguments |= {"M": decode._padded(group), "BLOCK_K": block_k, "BLOCK_V": block_v, "BLOCK_R": decode._padded(rest)}
    arguments |= {"LEAST": 2, "UPCAST": dtype == "fp32", "STAGES": tune.stages, "KEEP": dtype != "fp32", "BULK": bulk}
    strides = [name for name in scalars if name not in ("rows", "position_row")]
    launch = {"num_warps": tune.warps, "num_stages": tune.stages, "multiples": strides}
    registers = None if dtype == "fp32" else decode.REGISTERS
    return resources(decode._attend, arguments, tmp_path, **launch, maxnreg=registers)

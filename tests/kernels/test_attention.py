"""Cached attention against its definition, written out token by token in float64 over plain lists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lethe_compile.kernels.ops  # noqa: F401  (registers the operators)
from lethe_compile.kernels.attention import cpu, reference

LAYERS, LAYER = 3, 1  # the op gets the tables of all layers and serves one of them
STATE = ("k_pages", "v_pages", "slot_position", "slot_mass", "page_table", "length")


@dataclass(frozen=True)
class Case:
    """Rows hold `old` tokens at positions with gaps and get `new` more; the rest of every buffer is NaN or garbage."""

    old: tuple[int, ...] = (0, 7, 20)
    new: tuple[int, ...] = (3, 1, 2)
    kv_heads: int = 2
    group: int = 2
    k_dim: int = 16
    v_dim: int = 24
    page: int = 4
    window: int | None = None
    chunked: bool = False
    softcap: float | None = None
    sinks: bool = False
    slopes: bool = False
    sets: int = 1  # of sinks and slopes, which rows take turns in
    bias: str | None = None  # by position: "shared" by the heads, or for "each"
    decay: float | None = 0.9
    peak: bool = False
    consecutive: bool = True  # a row's pages follow each other
    head_major: bool = True  # storage is [kv_heads, pages, page, dim], as on a CPU
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def sees(self, now: int, position: int) -> bool:
        """Whether the window lets a query at `now` see an earlier position."""
        if self.window is None:
            return True
        return now // self.window == position // self.window if self.chunked else now - position < self.window


@dataclass
class Token:
    """What a slot holds."""

    key: Tensor  # [kv_heads, k_dim]
    value: Tensor  # [kv_heads, v_dim]
    position: int
    mass: float


@dataclass
class Inputs:
    case: Case
    tensors: dict[str, Any]
    rows: list[list[Token]] = field(default_factory=list)  # what is retained before the call

    def call(self, kernel: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run on a copy of the state: (out, state afterwards). A kernel sees one layer of the table, the op all."""
        state = {name: self.tensors[name].clone() for name in STATE}
        arguments = {**self.tensors, **state}
        if kernel is torch.ops.lethe.attention:
            return kernel(**arguments, layer=LAYER), state
        arguments |= {"page_table": state["page_table"][LAYER], "length": state["length"][LAYER]}
        return kernel(**arguments), state


def build(case: Case) -> Inputs:
    rng = torch.Generator().manual_seed(case.seed)
    rows, steps, heads, page = len(case.old), max(case.new), case.kv_heads * case.group, case.page

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(case.dtype)

    held = [-(-(o + n) // page) for o, n in zip(case.old, case.new, strict=True)]
    pages, width = sum(held) + 3, max([1, *held]) + 2
    order = list(range(1, pages)) if case.consecutive else (torch.randperm(pages - 1, generator=rng) + 1).tolist()
    table = torch.randint(pages, (LAYERS, rows, width), generator=rng, dtype=torch.int32)  # beyond `held`: stale
    length = torch.full((LAYERS, rows), 3, dtype=torch.int32)
    pools = [
        torch.full((pages, case.kv_heads, page, dim), math.nan, dtype=case.dtype) for dim in (case.k_dim, case.v_dim)
    ]
    if case.head_major:
        pools = [pool.transpose(0, 1).contiguous().transpose(0, 1) for pool in pools]
    slot_position = torch.full((pages, page), 10**6, dtype=torch.int32)
    slot_mass = torch.full((pages, page), math.nan)
    positions = torch.full((rows, steps), -(10**6))
    retained: list[list[Token]] = []
    for row in sorted(range(rows), key=lambda _: torch.rand((), generator=rng).item()):  # places in any order of rows
        table[LAYER, row, : held[row]] = torch.tensor([order.pop(0) for _ in range(held[row])], dtype=torch.int32)
    for row, (old, new) in enumerate(zip(case.old, case.new, strict=True)):
        length[LAYER, row] = old
        gaps = torch.randint(1, 4, (old + 1,), generator=rng).cumsum(0).tolist()
        tokens = [
            Token(normal(case.kv_heads, case.k_dim), normal(case.kv_heads, case.v_dim), gaps[j], j * 0.37)
            for j in range(old)
        ]
        for j, token in enumerate(tokens):
            at, offset = int(table[LAYER, row, j // page]), j % page
            pools[0][at, :, offset], pools[1][at, :, offset] = token.key, token.value
            slot_position[at, offset], slot_mass[at, offset] = token.position, token.mass
            token.mass = float(slot_mass[at, offset])
        retained.append(tokens)
        positions[row, :new] = gaps[-1] + torch.arange(new)
    query, key, value = (
        normal(rows, heads, steps, case.k_dim),
        *(normal(rows, case.kv_heads, steps, d) for d in (case.k_dim, case.v_dim)),
    )
    for row, new in enumerate(case.new):
        query[row, :, new:], key[row, :, new:], value[row, :, new:] = math.nan, math.nan, math.nan
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "k_pages": pools[0],
        "v_pages": pools[1],
        "slot_position": slot_position,
        "slot_mass": slot_mass,
        "page_table": table,
        "length": length,
        "positions": positions,
        "new_lengths": torch.tensor(case.new, dtype=torch.int32),
        "sinks": normal(case.sets * heads) if case.sinks else None,
        "slopes": normal(case.sets * heads).abs() if case.slopes else None,
        "scale": 0.3,
        "window": case.window,
        "chunked": case.chunked and case.window is not None,
        "softcap": case.softcap,
        "decay": case.decay,
        "peak": case.peak,
    }
    if case.bias is not None:
        furthest = max([1, *(int(p) + 1 for p in positions.flatten())])
        tensors["bias"] = normal(rows, 1 if case.bias == "shared" else heads, steps, furthest)
    return Inputs(case, tensors, retained)


def expected(inputs: Inputs) -> tuple[Tensor, list[list[Token]]]:
    """(out [rows, heads, T, v_dim] float64, every row's tokens afterwards), one query of one head at a time."""
    case, t = inputs.case, inputs.tensors
    out = torch.zeros(*t["query"].shape[:3], case.v_dim, dtype=torch.float64)
    after = []
    for row, retained in enumerate(inputs.rows):
        tokens = [replace(token) for token in retained]
        for step in range(case.new[row]):
            tokens.append(Token(t["key"][row, :, step], t["value"][row, :, step], int(t["positions"][row, step]), 0.0))
        if case.decay is not None and case.new[row]:
            for token in tokens:
                token.mass *= case.decay
        for step in range(case.new[row]):
            now = int(t["positions"][row, step])
            visible = [x for x in tokens if x.position <= now and case.sees(now, x.position)]
            for head in range(t["query"].shape[1]):
                query, kv = t["query"][row, head, step].double(), head // case.group
                learned = row % case.sets * t["query"].shape[1] + head
                logits = [0.3 * float(query @ x.key[kv].double()) for x in visible]
                if case.softcap is not None:
                    logits = [case.softcap * math.tanh(logit / case.softcap) for logit in logits]
                if case.slopes:
                    slope = float(t["slopes"][learned])
                    logits = [a - slope * (now - x.position) for a, x in zip(logits, visible, strict=True)]
                if case.bias is not None:
                    bias = t["bias"][row, head if case.bias == "each" else 0, step]
                    logits = [a + float(bias[x.position]) for a, x in zip(logits, visible, strict=True)]
                extra = [float(t["sinks"][learned])] if case.sinks else []
                top = max(logits + extra)
                total = sum(math.exp(x - top) for x in logits + extra)
                for token, logit in zip(visible, logits, strict=True):
                    share = math.exp(logit - top) / total
                    out[row, head, step] += share * token.value[kv].double()
                    if case.decay is not None:
                        token.mass = max(token.mass, share) if case.peak else token.mass + share
        after.append(tokens)
    return out, after


def check(inputs: Inputs, out: Tensor, state: dict[str, Tensor], tolerance: float) -> None:
    """`out` and the whole state are what the definition says, and nothing else has changed, to the bit."""
    want, after = expected(inputs)
    case, before = inputs.case, inputs.tensors
    assert out.dtype == case.dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    rows = {LAYER: before["length"][LAYER] + before["new_lengths"]}
    assert torch.equal(state["length"], torch.stack([rows.get(i, before["length"][i]) for i in range(LAYERS)]))
    assert torch.equal(state["page_table"], before["page_table"])

    untouched = {name: before[name].clone() for name in STATE[:4]}
    for row, tokens in enumerate(after):
        for j, token in enumerate(tokens):
            at = int(before["page_table"][LAYER, row, j // case.page]), j % case.page
            assert torch.equal(state["k_pages"][at[0], :, at[1]], token.key)
            assert torch.equal(state["v_pages"][at[0], :, at[1]], token.value)
            assert int(state["slot_position"][at]) == token.position
            assert float(state["slot_mass"][at]) == pytest.approx(
                token.mass, rel=max(tolerance, 1e-5), abs=max(tolerance, 1e-6)
            )
            takes_part = case.new[row] > 0
            untouched["slot_mass"][at] = state["slot_mass"][at] if takes_part else untouched["slot_mass"][at]
            if j >= case.old[row]:
                for name in ("k_pages", "v_pages"):
                    untouched[name][at[0], :, at[1]] = state[name][at[0], :, at[1]]
                untouched["slot_position"][at] = state["slot_position"][at]
    for name, tensor in untouched.items():
        torch.testing.assert_close(
            state[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name}: a foreign slot changed"
        )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that the op chose, call by call."""
    names: list[str] = []

    def spy(module: Any, name: str) -> None:
        kernel = module.attention

        def attention(*args: Any, **options: Any) -> Tensor:
            names.append(name)
            return kernel(*args, **options)

        monkeypatch.setattr(module, "attention", attention)

    spy(cpu, "cpu")
    spy(reference, "reference")
    return names


ROWS = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 6)), min_size=1, max_size=4)
CASES = st.builds(
    lambda rows, **options: Case(old=tuple(o for o, _ in rows), new=tuple(n for _, n in rows), **options),
    ROWS.filter(lambda rows: any(n for _, n in rows)) | ROWS.map(lambda rows: [(o, 1) for o, _ in rows]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 8]),
    k_dim=st.sampled_from([16, 24, 64, 80]),
    v_dim=st.sampled_from([16, 24, 64, 80]),
    page=st.sampled_from([1, 4, 16]),
    window=st.none() | st.integers(1, 30),
    chunked=st.booleans(),
    slopes=st.booleans(),
    sets=st.sampled_from([1, 2, 3]),
    bias=st.sampled_from([None, "shared", "each"]),
    softcap=st.none() | st.sampled_from([0.5, 20.0]),
    sinks=st.booleans(),
    decay=st.none() | st.sampled_from([0.5, 0.95]),
    peak=st.booleans(),
    consecutive=st.booleans(),
    head_major=st.booleans(),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=120)
@given(case=CASES)
def test_reference_matches_the_definition(case: Case) -> None:
    inputs = build(replace(case, dtype=torch.float64))
    check(inputs, *inputs.call(reference.attention), tolerance=1e-12)


@settings(max_examples=120)
@given(case=CASES, elements=st.sampled_from([1, 300, cpu._SCORE_ELEMENTS]))
def test_cpu_matches_the_definition(case: Case, elements: int) -> None:
    """In blocks of one query, of a few, and of all."""
    inputs = build(replace(case, consecutive=True, head_major=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_SCORE_ELEMENTS", elements)
        check(inputs, *inputs.call(cpu.attention), tolerance=1e-5)


@given(case=CASES)
def test_op_equals_the_reference_whichever_kernel_runs(case: Case) -> None:
    inputs = build(case)
    out, state = inputs.call(torch.ops.lethe.attention)
    want, want_state = inputs.call(reference.attention)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    for name in STATE:
        torch.testing.assert_close(state[name], want_state[name], rtol=1e-5, atol=1e-5, equal_nan=True)


FALLBACKS = {
    "scattered pages": Case(consecutive=False, old=(9, 30, 17)),
    "storage by page": Case(head_major=False),
    "scattered pages, storage by page": Case(consecutive=False, head_major=False, old=(9, 30, 17)),
}


@pytest.mark.parametrize("case", FALLBACKS.values(), ids=FALLBACKS)
def test_op_falls_back_to_the_reference(case: Case, ran: list[str]) -> None:
    inputs = build(case)
    check(inputs, *inputs.call(torch.ops.lethe.attention), tolerance=1e-5)
    assert ran == ["reference"]


SERVED = {
    "prefill": Case(old=(0, 0, 0), new=(5, 1, 9)),
    "extension": Case(old=(3, 12, 30), new=(4, 7, 1)),
    "decode": Case(old=(3, 12, 30), new=(1, 1, 1)),
    "decode, a row out": Case(old=(3, 12, 0), new=(1, 0, 1)),
    "no row takes part": Case(old=(3, 12, 0), new=(0, 0, 0)),
    "one page a row wherever it lies": Case(old=(3, 12, 9), new=(1, 1, 1), page=16, consecutive=False),
    "window, sinks, softcap": Case(old=(3, 12, 30), new=(1, 1, 1), window=8, sinks=True, softcap=2.0),
    "window within the new tokens": Case(old=(3, 12, 30), new=(9, 1, 8), window=3),
    "chunks": Case(old=(3, 12, 30), new=(9, 1, 8), window=6, chunked=True),
    "slopes": Case(old=(3, 12, 30), new=(9, 1, 8), window=20, slopes=True),
    "sets of sinks and slopes": Case(new=(1, 1, 1), kv_heads=1, sinks=True, slopes=True, sets=2),
    "bias": Case(old=(3, 12, 30), new=(9, 1, 8), window=20, bias="each"),
}


@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
def test_op_runs_the_cpu_kernel(case: Case, ran: list[str]) -> None:
    inputs = build(case)
    check(inputs, *inputs.call(torch.ops.lethe.attention), tolerance=1e-5)
    assert ran == ["cpu"]


def test_storage_by_dimension_is_left_to_the_reference(ran: list[str]) -> None:
    inputs = build(Case())
    keys = inputs.tensors["k_pages"]  # [pages, kv_heads, page, k_dim]
    inputs.tensors["k_pages"] = keys.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    check(inputs, *inputs.call(torch.ops.lethe.attention), tolerance=1e-5)
    assert ran == ["reference"]


def test_a_cache_of_another_dtype_is_left_to_the_reference(ran: list[str]) -> None:
    inputs = build(Case())
    for name in ("k_pages", "v_pages", "key", "value"):
        inputs.tensors[name] = inputs.tensors[name].double()
    out, _ = inputs.call(torch.ops.lethe.attention)
    assert ran == ["reference"] and not out.isnan().any()


@pytest.mark.parametrize("kernel", [reference.attention, cpu.attention], ids=["reference", "cpu"])
class TestEachKernel:
    @pytest.mark.parametrize("new", [(1, 1, 1), (4, 0, 7)], ids=["decode", "ragged"])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
    )
    def test_dtypes(self, kernel: Any, dtype: torch.dtype, tolerance: float, new: tuple[int, ...]) -> None:
        inputs = build(Case(old=(3, 0, 30), new=new, dtype=dtype, window=40, softcap=5.0, sinks=True))
        check(inputs, *inputs.call(kernel), tolerance=tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_mass_is_conserved(self, kernel: Any, dtype: torch.dtype) -> None:
        """Without sinks, each head of each query hands out exactly 1, in half precision too."""
        inputs = build(Case(old=(3, 0, 30), new=(1, 6, 4), decay=0.8, dtype=dtype))
        _, state = inputs.call(kernel)
        for row, tokens in enumerate(inputs.rows):
            total = int(state["length"][LAYER, row])
            slots = [(int(state["page_table"][LAYER, row, j // 4]), j % 4) for j in range(total)]
            added = sum(float(state["slot_mass"][at]) for at in slots) - 0.8 * sum(token.mass for token in tokens)
            assert added == pytest.approx(4 * inputs.case.new[row], rel=1e-5)

    def test_decay_is_exact_where_nothing_is_added(self, kernel: Any) -> None:
        """Slots that a window hides lose exactly the factor: float32 mass times gamma, rounded once."""
        inputs = build(Case(old=(12, 20), new=(1, 3), window=1, decay=0.9))
        _, state = inputs.call(kernel)
        for row, tokens in enumerate(inputs.rows):
            for j in range(len(tokens)):
                at = int(state["page_table"][LAYER, row, j // 4]), j % 4
                assert torch.equal(state["slot_mass"][at], inputs.tensors["slot_mass"][at] * 0.9)

    def test_without_decay_mass_stays_and_new_slots_start_at_zero(self, kernel: Any) -> None:
        inputs = build(Case(old=(3, 20), new=(1, 5), decay=None))
        _, state = inputs.call(kernel)
        for row, tokens in enumerate(inputs.rows):
            masses = [token.mass for token in tokens] + [0.0] * inputs.case.new[row]
            table = state["page_table"][LAYER, row]
            assert [float(state["slot_mass"][int(table[j // 4]), j % 4]) for j in range(len(masses))] == masses

    def test_repeats_to_the_bit(self, kernel: Any) -> None:
        inputs = build(Case(old=(130, 7, 64), new=(1, 40, 3), k_dim=64, v_dim=64, page=16, group=3))
        first, first_state = inputs.call(kernel)
        for _ in range(3):
            torch.empty(1 << 16).fill_(math.nan)  # what the allocator hands out next is not zero
            out, state = inputs.call(kernel)
            assert torch.equal(out, first)
            assert all(torch.allclose(state[n], first_state[n], rtol=0, atol=0, equal_nan=True) for n in STATE)

    def test_padding_gets_zeros(self, kernel: Any) -> None:
        inputs = build(Case(old=(3, 5), new=(0, 2)))
        out, _ = inputs.call(kernel)
        assert not out[0].any() and out[1].all()


def test_steps_equal_one_prefill() -> None:
    """Feeding tokens one by one is the same attention as feeding them at once; only decay counts steps."""
    whole = build(Case(old=(0, 0), new=(9, 9), decay=1.0, window=5))
    want, want_state = whole.call(torch.ops.lethe.attention)
    stepwise = build(Case(old=(0, 0), new=(9, 9), decay=1.0, window=5))
    t = stepwise.tensors
    outs = []
    for step in range(9):
        one = {name: t[name][:, :, step : step + 1] for name in ("query", "key", "value")}
        one |= {"positions": t["positions"][:, step : step + 1], "new_lengths": torch.ones(2, dtype=torch.int32)}
        outs.append(torch.ops.lethe.attention(**{**t, **one}, layer=LAYER))
    torch.testing.assert_close(torch.cat(outs, dim=2), want, rtol=1e-5, atol=1e-5)
    for name in STATE:
        torch.testing.assert_close(t[name], want_state[name], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("peak", [False, True])
@pytest.mark.parametrize("new", [(1, 1, 1), (3, 0, 6)])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_layer_that_shares_the_cache_appends_nothing(new: tuple[int, ...], decay: float | None, peak: bool) -> None:
    """It attends as if it had appended, and what it attends to joins the mass that the first layer has faded."""
    inputs = build(Case(new=new, decay=decay, peak=peak, window=9, sinks=True))
    first_out, first = inputs.call(torch.ops.lethe.attention)
    query = torch.randn_like(inputs.tensors["query"])
    alone = Inputs(inputs.case, {**inputs.tensors, "query": query}, inputs.rows)
    want, own = alone.call(torch.ops.lethe.attention)

    both = {name: tensor.clone() for name, tensor in first.items()}
    out = torch.ops.lethe.attention(**{**inputs.tensors, **both, "query": query}, layer=LAYER, shares=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, first_out)
    for name in ("k_pages", "v_pages", "slot_position", "page_table", "length"):
        torch.testing.assert_close(both[name], first[name], rtol=0, atol=0, equal_nan=True)
    for row, (old, fed) in enumerate(zip(inputs.case.old, new, strict=True)):
        for j in range(old + fed):
            at = int(inputs.tensors["page_table"][LAYER, row, j // 4]), j % 4
            before = float(inputs.tensors["slot_mass"][at]) if j < old else 0.0
            faded = before * (decay or 1.0) if fed else before
            one, other = float(first["slot_mass"][at]), float(own["slot_mass"][at])
            joined = one if decay is None else max(one, other) if peak else one + other - faded
            assert float(both["slot_mass"][at]) == pytest.approx(joined, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kernel", [reference.attention, cpu.attention], ids=["reference", "cpu"])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 9, "sinks": True, "new": (1, 1, 1)}, {"slopes": True, "softcap": 2.0, "bias": "each"}],
    ids=str,
)
def test_values_in_keys_are_as_values_beside_them(kernel: Any, options: dict[str, Any]) -> None:
    """128 heads over one key of 576 numbers, whose first 512 are the value: the same without a pool of values."""
    inputs = build(Case(kv_heads=1, group=128, k_dim=576, v_dim=512, peak=True, **options))
    tensors = inputs.tensors
    tensors["value"] = tensors["key"][..., :512]
    tensors["v_pages"] = tensors["k_pages"][..., :512].clone()
    if kernel is cpu.attention:
        tensors["v_pages"] = tensors["v_pages"].transpose(0, 1).contiguous().transpose(0, 1)
    expected, after = inputs.call(kernel)
    state = {name: tensors[name].clone() for name in STATE if name != "v_pages"}
    arguments = {**tensors, **state, "v_pages": None}
    one = torch.ops.lethe.attention(**arguments, layer=LAYER)
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["slot_mass"], after["slot_mass"], rtol=1e-4, atol=1e-5, equal_nan=True)
    for name in ("k_pages", "slot_position", "length"):
        torch.testing.assert_close(state[name], after[name], rtol=0, atol=0, equal_nan=True)
    if kernel is reference.attention:
        state = {name: tensors[name].clone() for name in STATE if name != "v_pages"}
        arguments = {**tensors, **state, "page_table": state["page_table"][LAYER], "length": state["length"][LAYER]}
        assert torch.equal(reference.attention(**{**arguments, "v_pages": None}), expected)


def test_no_rows() -> None:
    tensors = build(Case()).tensors
    for name in ("query", "key", "value", "positions", "new_lengths"):
        tensors[name] = tensors[name][:0]
    for name in ("page_table", "length"):
        tensors[name] = tensors[name][:, :0]
    assert torch.ops.lethe.attention(**tensors, layer=LAYER).shape == (0, 4, 3, 24)


# --- the operators as PyTorch's compilers see them --------------------------------------------------


def finite(inputs: Inputs) -> dict[str, Any]:
    """opcheck compares states with NaN by equality."""
    return {n: torch.nan_to_num(v) if isinstance(v, Tensor) else v for n, v in inputs.tensors.items()}


@pytest.mark.parametrize("case", [Case(new=(1, 1, 1)), Case(sinks=True, window=9, consecutive=False, kv_heads=1)])
def test_opcheck_attention(case: Case) -> None:
    torch.library.opcheck(torch.ops.lethe.attention.default, (), {**finite(build(case)), "layer": LAYER})


def site(**changes: Any) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"query": (2, 6, 5, 16), "key": (2, 3, 5, 16), "value": (2, 3, 5, 8)}
    tensors = {name: torch.randn(*shape, generator=rng) for name, shape in shapes.items()}
    options = {"mask": None, "sinks": None, "bias": None, "scale": 0.25, "softcap": None, "window": None, "layer": 0}
    return {**tensors, **options, **changes}


def test_opcheck_attention_site() -> None:
    mask = torch.full((5, 5), -math.inf).triu(1)
    arguments = site(mask=mask, sinks=torch.zeros(6), bias=torch.ones(6, 5, 5))
    torch.library.opcheck(torch.ops.lethe.attention_site.default, (), arguments)


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sinks": torch.linspace(-1, 1, 6)}])
def test_attention_site_equals_prefill_on_an_empty_cache(boolean: bool, options: dict[str, Any]) -> None:
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = allowed if boolean else torch.zeros(5, 5).masked_fill(~allowed, -math.inf)
    arguments = site(mask=mask, **options)
    tokens = [[Token(arguments["key"][0], arguments["value"][0], 0, 0.0)][:0] for _ in range(2)]
    case = Case(
        old=(0, 0), new=(5, 5), kv_heads=3, group=2, v_dim=8, sinks="sinks" in options, softcap=options.get("softcap")
    )
    inputs = Inputs(case, {**arguments, "positions": torch.arange(5).expand(2, 5)}, tokens)
    inputs.tensors["query"] = arguments["query"] * (0.25 / 0.3)  # `expected` scales by 0.3
    want, _ = expected(inputs)
    torch.testing.assert_close(torch.ops.lethe.attention_site(**arguments).double(), want, rtol=1e-5, atol=1e-5)


def test_fake_tensors_give_shape_dtype_and_strides() -> None:
    inputs = build(Case(dtype=torch.bfloat16))
    out, _ = inputs.call(torch.ops.lethe.attention)
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in inputs.tensors.items()}
        fake = torch.ops.lethe.attention(**fakes, layer=LAYER)
    assert (fake.shape, fake.dtype, fake.stride()) == (out.shape, out.dtype, out.stride())


def test_export_records_the_mutations() -> None:
    class Step(torch.nn.Module):
        def forward(self, query: Tensor, **state: Any) -> Tensor:
            return torch.ops.lethe.attention(query * 1, **state, **options, layer=LAYER)

    inputs = build(Case())
    options = {n: v for n, v in inputs.tensors.items() if not isinstance(v, Tensor)}
    tensors = {n: v for n, v in inputs.tensors.items() if isinstance(v, Tensor)}
    query = tensors.pop("query")
    program = torch.export.export(Step(), (query,), tensors, strict=False)
    functional = program.run_decompositions({})
    assert set(functional.graph_signature.user_inputs_to_mutate.values()) == set(STATE) - {"page_table"}
    want, want_state = inputs.call(reference.attention)
    out = program.module()(query, **tensors)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    for name in STATE:
        torch.testing.assert_close(tensors[name], want_state[name], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_gradients_do_not_enter_the_cache() -> None:
    inputs = build(Case())
    inputs.tensors["key"].requires_grad_()
    _, state = inputs.call(torch.ops.lethe.attention)
    assert not any(tensor.requires_grad for tensor in state.values())
